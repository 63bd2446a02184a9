"""The table of dispatch algorithms: one entry is enough, and what each reaches on the wires is its own."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from network_cases import make_fabric

from moesim import simulate
from moesim.errors import UserError
from moesim.network import all_gather_seconds, prepare_combine, prepare_dispatch, reduce_scatter_seconds
from moesim.network.parameters import NetworkParameters
from moesim.parallel.traffic import ring_copies
from moesim.scenario import load_scenario_text
from moesim.scenario.dispatch import DIRECT, DISPATCH, HIERARCHICAL, Kernel, Kernels
from moesim.serving.loading import load_serving_text
from moesim.strict_json import parse_json, unpacked

SMALL = """schema_version: 1
name: small
model: {preset: deepseek-moe-16b, layers: 2}
routing: {kind: uniform}
cluster: {gpu: h200, nodes: 2, gpus_per_node: 8}
parallelism: {data: 16, expert: 16}
workload: {sequence_length: 1024, micro_batch: 1, global_batch: 16}
"""
BETWEEN_NODES = sorted(name for name, facts in DISPATCH.items() if not facts.needs_one_domain and not facts.gathers)


def test_an_algorithm_is_added_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow relative of `direct`, and one of two stages: loaded, checked, simulated and named in messages."""
    pigeons = dataclasses.replace(
        DIRECT,
        name="pigeons",
        nic_share=0.1,
        nvlink_share=0.1,
        deduplicate=("per_rank",),
        kernels=Kernels.alike(Kernel(call_seconds=1e-3)),
    )
    relay = dataclasses.replace(HIERARCHICAL, name="relay", nic_share=0.4)
    text = SMALL + "dispatch: {algorithm: pigeons}\n"
    with pytest.raises(UserError, match='"pigeons" is not allowed'):
        load_scenario_text(text, source="f.yaml")
    for facts in (pigeons, relay):
        monkeypatch.setitem(DISPATCH, facts.name, facts)
    plain, slow, two = (
        simulate(load_scenario_text(SMALL + line, source="f.yaml")).result["step_time_s"]
        for line in ("", "dispatch: {algorithm: pigeons}\n", "dispatch: {algorithm: relay, deduplicate: per_node}\n")
    )
    assert slow > plain and two > 0
    with pytest.raises(UserError, match=r"set dispatch\.deduplicate: per_rank"):
        load_scenario_text(SMALL + "dispatch: {algorithm: pigeons, deduplicate: per_expert}\n", source="f.yaml")
    with pytest.raises(UserError, match=r"set dispatch\.algorithm: hierarchical or hybrid_ep or relay"):
        load_scenario_text(SMALL + "dispatch: {algorithm: pigeons, deduplicate: per_node}\n", source="f.yaml")


def seconds(algorithm: str, **keys: object) -> float:
    """1 GB from each GPU of one node to the same rail of another."""
    copies_RR = np.zeros((16, 16))
    copies_RR[np.arange(8), np.arange(8) + 8] = 1e5
    copies = [copies_RR, np.zeros((16, 16))] if DISPATCH[algorithm].fans_out else [copies_RR]
    prepared = prepare_dispatch(make_fabric(2, **keys), copies, token_bytes=1e4, algorithm=algorithm)
    assert DISPATCH[algorithm].source in prepared.source
    return float(prepared.alone_R.max())


@pytest.mark.parametrize("algorithm", BETWEEN_NODES)
def test_each_algorithm_reaches_its_own_share_of_a_nic(algorithm: str) -> None:
    facts, library = DISPATCH[algorithm], NetworkParameters()
    share = library.nic_efficiency if facts.nic_share is None else facts.nic_share
    assert seconds(algorithm) == pytest.approx(1e9 / (50e9 * share), rel=0.1)


@pytest.mark.parametrize("algorithm", BETWEEN_NODES)
def test_a_stated_share_holds_for_every_algorithm(algorithm: str) -> None:
    assert seconds(algorithm, nic_efficiency=1.0) == pytest.approx(1e9 / 50e9, rel=0.1)
    assert seconds(algorithm, nic_efficiency=0.5) == pytest.approx(1e9 / 25e9, rel=0.1)


def test_a_dispatch_algorithms_share_does_not_slow_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    before = all_gather_seconds(make_fabric(2), [0, 8], 1e9).seconds
    for name, facts in DISPATCH.items():
        monkeypatch.setitem(DISPATCH, name, dataclasses.replace(facts, nic_share=0.1, nvlink_share=0.1))
    assert all_gather_seconds(make_fabric(2), [0, 8], 1e9).seconds == before
    assert before == pytest.approx(0.5e9 / (50e9 * NetworkParameters().nic_efficiency), rel=0.02)


def test_slower_software_takes_more_of_shared_links() -> None:
    """Two groups whose transfers reach less than NCCL still fill a link between them when both are open."""
    fabric = make_fabric(2, preset="leaf_spine", pod_nodes=1, oversubscription=4.0)
    copies_RR = np.zeros((16, 16))
    copies_RR[np.arange(8), np.arange(8) + 8] = 1e5
    ours = prepare_dispatch(fabric, [copies_RR, 0 * copies_RR], token_bytes=1e4, algorithm="hierarchical")
    theirs = prepare_dispatch(fabric, [copies_RR], token_bytes=1e4)
    ratio = ours.common_use(np.arange(16)).bytes_SX.sum() / theirs.common_use(np.arange(16)).bytes_SX.sum()
    assert ratio == pytest.approx(NetworkParameters().nic_efficiency / HIERARCHICAL.nic_share)


@pytest.mark.parametrize(
    ("line", "warns"),
    [("nvlink: 160 GB/s", True), ("nvlink: 160 GB/s, nvlink_efficiency: 1.0", False), ("nvlink: 450 GB/s", False)],
)
def test_a_bandwidth_of_the_scenarios_own_is_not_shortened_silently(line: str, warns: bool) -> None:
    scenario = load_scenario_text(
        SMALL.replace("gpus_per_node: 8}", f"gpus_per_node: 8, fabric: {{{line}}}}}"), source="f.yaml"
    )
    warnings = simulate(scenario).result["warnings"]
    assert any("cluster.fabric.nvlink: 160 GB/s is taken as nominal" in text for text in warnings) == warns


def test_low_latency_over_nvlink_sends_the_rest_over_nics() -> None:
    """Inside a node as fast as NVLink is, not as a NIC; between nodes less goes over NICs, and nothing else changes."""
    copies_RR = np.full((16, 16), 60.0)
    np.fill_diagonal(copies_RR, 0.0)
    one, two = copies_RR[:8, :8], copies_RR
    times = {
        (name, nodes): prepare_dispatch(make_fabric(nodes), [copies], token_bytes=7392.0, algorithm=name).alone_R.max()
        for name in ("low_latency", "low_latency_nvlink")
        for nodes, copies in ((1, one), (2, two))
    }
    assert times["low_latency_nvlink", 1] < 0.3 * times["low_latency", 1]
    sent_by_nics = 8 * 60 * (7392 + 16) / (50e9 * 0.87)
    assert sent_by_nics < times["low_latency_nvlink", 2] < sent_by_nics + 30e-6 < times["low_latency", 2]


def test_one_sided_stores_stay_in_one_domain() -> None:
    racks = "cluster: {gpu: gb200, nodes: 4, gpus_per_node: 4}\nparallelism: {data: 16, expert: 16}\n"
    lines = SMALL.splitlines(keepends=True)
    text = "".join(line for line in lines if not line.startswith(("cluster", "parallelism")))
    text += "dispatch: {algorithm: one_sided}\n"
    assert simulate(load_scenario_text(text + racks, source="f.yaml")).result["step_time_s"] > 0
    with pytest.raises(UserError, match="one_sided needs the 16 ranks of an expert group in one NVLink domain"):
        load_scenario_text(SMALL + "dispatch: {algorithm: one_sided}\n", source="f.yaml")
    with pytest.raises(UserError, match="one_sided needs all ranks in one NVLink domain"):
        prepare_dispatch(make_fabric(2), [np.ones((16, 16))], token_bytes=1.0, algorithm="one_sided")


@pytest.mark.parametrize("sms", [-3, float("nan"), float("inf")])
def test_sms_that_are_none_are_refused(sms: float) -> None:
    with pytest.raises(UserError, match="is no number of SMs"):
        prepare_dispatch(make_fabric(1), [np.ones((8, 8))], token_bytes=1.0, sms=sms)


def test_one_sided_stores_reach_what_was_measured() -> None:
    """Plain stores into the other of two H100s, both ways at once, from 8 blocks on: tools/measure_ranks.py."""
    file = Path(__file__).parents[1] / "data" / "overlap_h100.json.gz"
    rows = [row for row in parse_json(unpacked(file.read_bytes()))["puts"] if row["both"]]
    best = max(row["bytes_per_second"] for row in rows)
    share = DISPATCH["one_sided"].nvlink_share  # of TensorRT-LLM's kernels
    assert share is not None and 0.85 < share / (best / 450e9) < 1.0
    assert all(row["bytes_per_second"] > 0.85 * best for row in rows if row["blocks"] >= 8)


def test_gathered_tokens_take_an_all_gather_and_outputs_a_reduce_scatter() -> None:
    """Whatever was routed; the last to come holds up all. Bytes are those round a ring, which leaves a node once."""
    fabric, tokens = make_fabric(2), 1000.0
    stages = [ring_copies(tokens, 16)]
    out = prepare_dispatch(fabric, stages, token_bytes=4096.0, algorithm="allgather")
    back = prepare_combine(fabric, stages, token_bytes=4096.0, algorithm="allgather")
    assert out.alone_R == pytest.approx(all_gather_seconds(fabric, None, 16 * tokens * 4096.0).seconds)
    assert back.alone_R == pytest.approx(reduce_scatter_seconds(fabric, None, 16 * tokens * 4096.0).seconds)
    start_R = np.zeros(16)
    start_R[3] = 1.0
    assert out.finish(start_R) == pytest.approx(1.0 + out.alone_R)
    few_words = SMALL.replace("layers: 2", "layers: 2, vocab: 1024")  # whose memory is fullest inside a layer
    scenarios = [
        load_scenario_text(few_words + f"dispatch: {{algorithm: {words}}}\n", source="f.yaml")
        for words in ("allgather, deduplicate: all_ranks", "direct, deduplicate: per_rank")
    ]
    gathered, sent = (simulate(scenario).result for scenario in scenarios)
    moved = gathered["communication"]
    assert moved["copies_per_token"] == 15.0 and moved["dispatch_bytes"] == moved["combine_bytes"]
    assert moved["inter_node_bytes"] == pytest.approx(moved["intra_node_bytes"] / 7)
    assert gathered["memory"]["peak_bytes"] > sent["memory"]["peak_bytes"]
    with pytest.raises(UserError, match=r"sends every token to all ranks, not per_rank; set .*: all_ranks"):
        load_scenario_text(SMALL + "dispatch: {algorithm: allgather}\n", source="f.yaml")


def test_hybrid_ep_sends_once_per_domain_and_fans_out() -> None:
    """Over nodes as fast as the NIC lets two stages be; in a rack everything stays on NVLink."""
    copies_RR = np.full((16, 16), 1000.0) * (1 - np.eye(16))
    racks = [
        prepare_dispatch(
            make_fabric(4, gpu="gb200", gpus_per_node=4, nic=nic), [copies_RR], token_bytes=7168.0,
            algorithm="hybrid_ep",
        ).alone_R.max()
        for nic in ("400 Gbps", "40 Gbps")
    ]  # fmt: skip
    assert racks[0] == racks[1]
    with pytest.raises(UserError, match="hybrid_ep over several nodes needs deduplicate: per_node"):
        prepare_dispatch(make_fabric(2), [np.ones((16, 16))], token_bytes=1.0, algorithm="hybrid_ep")


@pytest.mark.parametrize("algorithm", [name for name, facts in DISPATCH.items() if facts.needs_nvlink])
def test_kernels_of_nvlink_need_nvlink(algorithm: str) -> None:
    text = SMALL.replace("gpu: h200, nodes: 2", "gpu: l40s, nodes: 1").replace(
        "data: 16, expert: 16", "data: 8, expert: 8"
    )
    line = f"dispatch: {{algorithm: {algorithm}, deduplicate: {DISPATCH[algorithm].deduplicate[0]}}}\n"
    with pytest.raises(UserError, match="needs NVLink inside a node, which l40s lacks; use "):
        load_scenario_text(text + line, source="f.yaml")
    load_scenario_text(text.replace("gpu: l40s", "gpu: h100") + line, source="f.yaml")


@pytest.mark.parametrize(
    ("gpu", "preset"),
    [("h200", "rail_optimised"), ("h200", "nvlink_node"), ("l40s", "leaf_spine"), ("l40s", "nvlink_node")],
)
def test_what_a_refused_dispatch_is_told_to_use_runs(gpu: str, preset: str) -> None:
    nodes = 1 if preset == "nvlink_node" else 2
    text = SMALL.replace("gpu: h200, nodes: 2", f"gpu: {gpu}, nodes: {nodes}, fabric: {{preset: {preset}}}")
    text = text.replace("data: 16, expert: 16", f"data: {8 * nodes}, expert: {8 * nodes}")

    def refusal(algorithm: str, deduplicate: str) -> str | None:
        try:
            load_scenario_text(
                text + f"dispatch: {{algorithm: {algorithm}, deduplicate: {deduplicate}}}\n", source="f.yaml"
            )
        except UserError as error:
            return str(error)
        return None

    copies = sorted({copy for facts in DISPATCH.values() for copy in facts.deduplicate})
    told = 0
    for algorithm, deduplicate in itertools.product(DISPATCH, copies):
        remedy = (refusal(algorithm, deduplicate) or "").split("; ")[-1]
        for way in remedy.split(", or ") if remedy else ():
            said = re.findall(r"\w+", way)
            names = [name for name in DISPATCH if name in said]
            for changed in itertools.product(names or [algorithm], [c for c in copies if c in said] or [deduplicate]):
                told += 1
                assert "parallelism" in way or refusal(*changed) is None, (algorithm, deduplicate, remedy, changed)
    assert told > len(DISPATCH)


@pytest.mark.parametrize(
    ("gpu", "dispatch", "refusal"),
    [
        ("l40s", "{algorithm: hybrid_ep, deduplicate: per_node}", r":8:23: dispatch.algorithm: hybrid_ep needs NVLink"),
        ("h100", "{algorithm: low_latency, deduplicate: per_rank}", r"dispatch.deduplicate: low_latency sends per sel"),
        ("h100", "{algorithm: one_sided}", r"one_sided needs the 16 ranks .* has 8; use direct$"),
    ],
)
def test_serving_refuses_the_dispatch_that_training_refuses(gpu: str, dispatch: str, refusal: str) -> None:
    lines = SMALL.replace("gpu: h200", f"gpu: {gpu}").splitlines(keepends=True)[:-1]
    arrivals = "{kind: poisson, rate: 9, input: {kind: fixed, tokens: 9}, output: {kind: fixed, tokens: 9}}"
    text = "".join(lines) + f"workload: {{kind: serving, requests: 9, arrivals: {arrivals}}}\n"
    load_serving_text(text, source="f.yaml")
    with pytest.raises(UserError, match=refusal):
        load_serving_text(f"{text}dispatch: {dispatch}\n", source="f.yaml")


def test_messages_over_nics_need_nics() -> None:
    one = SMALL.replace("nodes: 2, gpus_per_node: 8", "nodes: 1, gpus_per_node: 8, fabric: {preset: nvlink_node}")
    one = one.replace("data: 16, expert: 16", "data: 8, expert: 8") + "dispatch: {deduplicate: per_expert, algorithm: "
    load_scenario_text(one + "low_latency_nvlink}\n", source="f.yaml")
    with pytest.raises(UserError, match=r"low_latency sends over NICs inside a node, too, and nvlink_node has none"):
        load_scenario_text(one + "low_latency}\n", source="f.yaml")
