"""The table of dispatch algorithms: one entry is enough, and what each reaches on the wires is its own."""

import dataclasses

import numpy as np
import pytest
from network_cases import make_fabric

from moesim import simulate
from moesim.errors import UserError
from moesim.network import all_gather_seconds, prepare_dispatch
from moesim.network.parameters import NetworkParameters
from moesim.scenario import load_scenario_text
from moesim.scenario.dispatch import DIRECT, DISPATCH, HIERARCHICAL

SMALL = """schema_version: 1
name: small
model: {preset: deepseek-moe-16b, layers: 2}
routing: {kind: uniform}
cluster: {gpu: h200, nodes: 2, gpus_per_node: 8}
parallelism: {data: 16, expert: 16}
workload: {sequence_length: 1024, micro_batch: 1, global_batch: 16}
"""


def test_an_algorithm_is_added_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow relative of `direct`, and one of two stages: loaded, checked, simulated and named in messages."""
    pigeons = dataclasses.replace(
        DIRECT, name="pigeons", nic_share=0.1, nvlink_share=0.1, call_seconds=1e-3, deduplicate=("per_rank",)
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
    with pytest.raises(UserError, match=r"set dispatch\.algorithm: hierarchical or relay"):
        load_scenario_text(SMALL + "dispatch: {algorithm: pigeons, deduplicate: per_node}\n", source="f.yaml")


def seconds(algorithm: str, **keys: object) -> float:
    """1 GB from each GPU of one node to the same rail of another."""
    copies_RR = np.zeros((16, 16))
    copies_RR[np.arange(8), np.arange(8) + 8] = 1e5
    copies = [copies_RR, np.zeros((16, 16))] if DISPATCH[algorithm].fans_out else [copies_RR]
    prepared = prepare_dispatch(make_fabric(2, **keys), copies, token_bytes=1e4, algorithm=algorithm)
    assert DISPATCH[algorithm].source in prepared.source
    return float(prepared.alone_R.max())


@pytest.mark.parametrize("algorithm", sorted(DISPATCH))
def test_each_algorithm_reaches_its_own_share_of_a_nic(algorithm: str) -> None:
    facts, library = DISPATCH[algorithm], NetworkParameters()
    share = library.nic_efficiency if facts.nic_share is None else facts.nic_share
    assert seconds(algorithm) == pytest.approx(1e9 / (50e9 * share), rel=0.1)


@pytest.mark.parametrize("algorithm", sorted(DISPATCH))
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
