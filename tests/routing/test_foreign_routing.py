"""`routing.file` takes what others recorded: told by its content, read as an import reads it, said in the run."""

import pickle
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesim import load_scenario, simulate
from moesim.errors import UserError
from moesim.report.facts import routing as routing_facts
from moesim.routing.importing import FORMS, ImportRequest, form_of, import_routing
from moesim.routing.request import content_digest
from moesim.run import obtain_trace
from moesim.strict_json import json_text, parse_json
from moesim.study import scenario_id
from moesim.trace import RoutingTrace, trace_hash
from moesim.trace.draws import draw_by_weight, shares_of_counts, weights_of_shares

SAMPLES = Path(__file__).parent / "samples"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def scenario(file: Path, *, experts: int, top_k: int, length: int = 8, **more: Any) -> Any:
    return load_scenario(
        {
            "schema_version": 1,
            "name": "foreign",
            "model": {
                "layers": 3, "hidden": 256, "heads": 4, "kv_heads": 4, "head_dim": 64, "experts": experts,
                "top_k": top_k, "expert_intermediate": 256, "vocab": 1024,
            },
            "routing": {"kind": "trace", "file": str(file)},
            "cluster": {"gpu": "h100", "nodes": 1, "gpus_per_node": 2},
            "parallelism": {"data": 2, "expert": 2},
            "workload": {"kind": "training", "sequence_length": length, "micro_batch": 1, "global_batch": 2},
            "uncertainty": {"samples": 1},
            **more,
        }
    )  # fmt: skip


def traced(file: Path, **shape: Any) -> RoutingTrace:
    trace = obtain_trace(scenario(file, **shape))
    assert trace is not None
    return trace


# file, experts, top-K, form
SOURCES = [
    ("flame", 64, 6, "flame"),
    ("flame/flame-moe-290m/actives", 64, 6, "flame"),
    ("flame/flame-moe-290m/actives/iter_0540", 64, 6, "flame"),
    ("flame/flame-moe-290m/actives/iter_0540/layer_02.parquet", 64, 6, "flame"),
    ("flame_capture", 64, 6, "flame"),
    ("megatron", 64, 6, "megatron"),
    ("megatron/router_trace_rank1.jsonl", 64, 6, "megatron"),
    ("megatron/router_replay_indices.pt", 64, 6, "megatron"),
    ("sglang", 16, 8, "sglang"),
    ("sglang/expert_distribution_recorder_1764100000.0.pt", 16, 4, "sglang"),
    ("sglang/expert_distribution_recorder_1764100001.5_1.pt", 16, 8, "sglang"),
    ("vllm", 60, 4, "vllm"),
    ("vllm/moe_routes.jsonl", 60, 4, "vllm"),
    ("vllm/eplb_state_tensors.pt", 16, 4, "vllm"),
    ("trtllm", 16, 4, "trtllm"),
    ("trtllm/expert_statistic", 16, 4, "trtllm"),
    ("olmoe", 64, 8, "olmoe"),
    ("olmoe/c4_results.jsonl", 64, 8, "olmoe"),
    ("olmoe/expert_counts", 64, 8, "olmoe"),
    ("olmoe/expert_counts/synthetic.pkl", 64, 8, "olmoe"),
    ("eplb", 12, 2, "counts"),
    ("eplb/rebalance_input.json", 12, 2, "counts"),
]


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize(("file", "experts", "top_k", "form"), SOURCES)
def test_every_sample_is_simulated_as_it_lies_there(file: str, experts: int, top_k: int, form: str) -> None:
    assert form_of(SAMPLES / file).name == form
    result = simulate(scenario(SAMPLES / file, experts=experts, top_k=top_k)).result
    assert result["step_time_s"] > 0
    assert f"({form})" in result["router"]["rests_on"]


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize(("file", "experts", "top_k", "form"), [each for each in SOURCES if each[0] != "olmoe"])
def test_a_scenario_reads_what_an_import_reads(file: str, experts: int, top_k: int, form: str) -> None:
    recorded = "olmoe/c4" not in file  # its lines are sequences, which an import cannot cut anew
    trace = traced(SAMPLES / file, experts=experts, top_k=top_k)
    asked = ImportRequest(
        experts=experts, top_k=top_k, sequence_length=8 if recorded else None, tokens=trace.final.num_tokens
    )
    assert trace.provenance["form"] == form
    assert trace_hash(import_routing("auto", SAMPLES / file, asked=asked)) == trace_hash(trace)


def test_flame_arrives_with_its_checkpoints_layers_and_tokens() -> None:
    from pyarrow import parquet

    trace = traced(SAMPLES / "flame", experts=64, top_k=6, length=48)
    assert [step.step for step in trace.steps] == [540, 5473]
    assert trace.provenance["layers"] == [2, 3, 4]
    for step in trace.steps:
        for layer in range(3):
            file = SAMPLES / f"flame/flame-moe-290m/actives/iter_{step.step:04d}/layer_{layer + 2:02d}.parquet"
            table = parquet.read_table(file)
            assert step.expert_ids_LSTK[layer, 0].tolist() == table["indices"].to_pylist()
            assert np.allclose(step.gates_LSTK[layer, 0], np.array(table["scores"].to_pylist(), dtype=float))


def test_megatron_arrives_with_both_ranks_and_without_prediction_layers() -> None:
    trace = traced(SAMPLES / "megatron", experts=64, top_k=6, length=16)
    assert trace.provenance["layers"] == [3, 4, 5]
    assert trace.final.expert_ids_LSTK.shape == (3, 2, 16, 6)
    for rank in range(2):
        lines = (SAMPLES / f"megatron/router_trace_rank{rank}.jsonl").read_text().splitlines()
        for record in map(parse_json, lines):
            if record["block"] == "decoder" and record["step"] == 1:
                assert trace.final.expert_ids_LSTK[record["layer"] - 3, rank].tolist() == record["top_indices"]
    assert any("multi-token prediction" in note for note in trace.provenance["notes"])  # type: ignore[union-attr]


def test_olmoe_arrives_with_sixteen_layers_and_a_line_a_sequence() -> None:
    trace = traced(SAMPLES / "olmoe", experts=64, top_k=8, length=32)
    assert trace.final.expert_ids_LSTK.shape == (16, 2, 32, 8)
    for line, text in enumerate((SAMPLES / "olmoe/c4_results.jsonl").read_text().splitlines()):
        chosen_TKL = np.array(parse_json(text)["exp_ids"])
        assert (trace.final.expert_ids_LSTK[:, line] == chosen_TKL.transpose(2, 0, 1)).all()
    assert traced(SAMPLES / "olmoe/expert_counts", experts=64, top_k=8).provenance["layers"] == [0, 7, 15]


def test_the_run_says_where_the_length_of_sequences_comes_from() -> None:
    silent = simulate(scenario(SAMPLES / "flame", experts=64, top_k=6)).result
    assert any("workload.sequence_length = 8" in warning for warning in silent["warnings"])
    assert silent["router"]["sequences_rest_on"] == "workload.sequence_length"
    assert [fact.value for fact in routing_facts(silent)] == ["tokens of flame (flame)", "workload.sequence_length"]
    said = simulate(scenario(SAMPLES / "olmoe/c4_results.jsonl", experts=64, top_k=8)).result
    assert not any("workload.sequence_length" in warning for warning in said["warnings"])
    assert said["router"]["sequences_rest_on"] is None


def test_few_tokens_are_repeated_and_the_run_says_so() -> None:
    short = traced(SAMPLES / "flame", experts=64, top_k=6, length=48).final.expert_ids_LSTK[:, 0]
    trace = traced(SAMPLES / "flame", experts=64, top_k=6, length=100)
    assert trace.num_sequences == 1
    assert (trace.final.expert_ids_LSTK[:, 0] == short[:, np.arange(100) % 48]).all()
    assert any("48 tokens are repeated" in note for note in trace.provenance["notes"])  # type: ignore[union-attr]


MISTAKES = [
    ("flame", {"experts": 64, "top_k": 8}, r"top-K is 6 there, but model.top_k says 8"),
    ("flame", {"experts": 32, "top_k": 6}, r"of 32 is chosen there; give the right model.experts"),
    ("trtllm/expert_statistic", {"experts": 32, "top_k": 4}, r"is 16 there, but model.experts says 32"),
    (
        "trtllm/moe_load_balancer.yaml",
        {"experts": 16, "top_k": 4},
        r"a placement, not routing; placement: \{kind: explicit",
    ),
    ("vllm/eplb_log.txt", {"experts": 16, "top_k": 4}, r"neither which experts nor how often; .*over 4 steps"),
    ("flame/flame-moe-290m/samples", {"experts": 64, "top_k": 6}, r"tried flame, .*`moesim trace import KIND"),
    (".", {"experts": 64, "top_k": 6}, r"holds 2 folders named actives; name the folder of one run"),
]


@pytest.mark.parametrize(("file", "shape", "message"), MISTAKES)
def test_what_is_no_routing_of_the_model_is_one_line(file: str, shape: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        simulate(scenario(SAMPLES / file, **shape))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\x00\x01", b"{}", b"[]", b"hello", b"PK\x03\x04", b"PAR1", b"\x93NUMPY", b"1"]
)
def test_a_file_of_no_form_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "odd").write_bytes(content)
    with pytest.raises(UserError) as caught:
        form_of(tmp_path / "odd")
    assert "\n" not in str(caught.value)


def test_the_folder_of_a_run_names_its_trace(tmp_path: Path) -> None:
    from moesim.trace import save_trace

    save_trace(traced(SAMPLES / "flame", experts=64, top_k=6), tmp_path / "trace.npz")
    with pytest.raises(UserError, match=r"name its trace, .*trace\.npz"):
        traced(tmp_path, experts=64, top_k=6)
    with pytest.raises(UserError, match="is a routing trace of moesim already"):
        import_routing("auto", tmp_path / "trace.npz")


def test_what_a_point_is_known_by_follows_the_content(tmp_path: Path, cache: Path) -> None:
    """A changed, added or renamed file is another recording, for sweeps that go on and for the trace that is kept."""
    folder = tmp_path / "run"
    shutil.copytree(SAMPLES / "megatron", folder)
    asked = scenario(folder, experts=64, top_k=6)
    seen = {scenario_id(asked)}
    hashes = {trace_hash(traced(folder, experts=64, top_k=6))}
    assert scenario_id(asked) in seen
    lines = (folder / "router_trace_rank0.jsonl").read_text().splitlines()
    swapped = [line.replace('"rank": 0', '"rank": 2') for line in lines]
    (folder / "router_trace_rank0.jsonl").write_text("\n".join(swapped) + "\n")
    seen.add(scenario_id(asked))
    hashes.add(trace_hash(traced(folder, experts=64, top_k=6)))
    assert len(seen) == len(hashes) == 2
    (folder / "deeper").mkdir()
    (folder / "deeper" / "more.jsonl").write_text("{}")
    seen.add(scenario_id(asked))
    (folder / "router_trace_rank1.jsonl").rename(folder / "router_trace_rank3.jsonl")
    seen.add(scenario_id(asked))
    assert len(seen) == 4
    assert len(list((cache / "traces").glob("imported-*.npz"))) == 2


def test_an_import_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = traced(SAMPLES / "olmoe", experts=64, top_k=8)
    monkeypatch.setattr("moesim.routing.importing.import_routing", None)
    assert trace_hash(traced(SAMPLES / "olmoe", experts=64, top_k=8)) == trace_hash(first)


def test_the_digest_reads_the_bytes_and_not_the_name_alone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"same")
    assert content_digest(tmp_path / "a") == content_digest(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"other")
    assert content_digest(tmp_path / "a") != content_digest(tmp_path / "b")


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize("name", ["bomb.pkl", "bomb.pt", "bomb.npy", "bomb.npz", "bomb.jsonl", "bomb"])
def test_no_pickle_is_run_to_find_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content = np.array([_Bomb()], dtype=object)
    if name.endswith("npy"):
        np.save(tmp_path / name, content, allow_pickle=True)
    elif name.endswith("npz"):
        np.savez(tmp_path / name, ids=content)
    elif name.endswith("pt"):
        torch.save({"records": _Bomb()}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps([_Bomb()]))
    for place in (tmp_path / name, tmp_path):
        with pytest.raises(UserError) as caught:
            traced(place, experts=64, top_k=6)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_requests_of_vllm_follow_each_other(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    requests = [rng.permuted(np.tile(np.arange(16), (tokens, 3, 1)), axis=2)[..., :4] for tokens in (10, 7)]
    np.savez(tmp_path / "routed.npz", a=requests[0], b=requests[1])
    lines = [json_text({"routed_experts": each.tolist()}) for each in requests]
    (tmp_path / "routed.jsonl").write_text("\n".join(lines))
    for name in ("routed.npz", "routed.jsonl"):
        trace = traced(tmp_path / name, experts=16, top_k=4, length=17)
        assert (trace.final.expert_ids_LSTK[:, 0] == np.concatenate(requests).transpose(1, 0, 2)).all()


def test_token_numbers_that_begin_again_are_another_pass(tmp_path: Path) -> None:
    records = [
        {"layer": layer, "token_idx": token, "topk_ids": [(token + turn) % 4, (token + turn + 1) % 4]}
        for turn in range(2)
        for layer in range(2)
        for token in range(8)
    ]
    (tmp_path / "routes.jsonl").write_text("\n".join(map(json_text, records)))
    trace = traced(tmp_path, experts=4, top_k=2, length=16)
    wanted = [[(token + turn) % 4, (token + turn + 1) % 4] for turn in range(2) for token in range(8)]
    assert trace.final.expert_ids_LSTK[1, 0].tolist() == wanted


def _recorder(path: Path, ids_LTK: torch.Tensor, *, rank: int, slots: int, tokens: list[int]) -> None:
    record = {"forward_pass_id": 0, "rank": rank, "input_ids": tokens, "topk_ids_of_layer": ids_LTK}
    layers = ids_LTK.shape[0]
    maps = torch.arange(slots).repeat(layers, 1)
    torch.save({"records": [record], "last_physical_to_logical_map": maps}, path / f"recorder_{rank}.pt")


def test_sglang_counts_shared_tokens_once_and_leaves_dense_layers_out(tmp_path: Path) -> None:
    """Ranks of tensor parallelism record the same tokens; the first layers of DeepSeek are dense."""
    rng = np.random.default_rng(1)
    ids = rng.permuted(np.tile(np.arange(16), (3, 12, 1)), axis=2)[..., :4]
    ids[0] = -1
    for rank in range(2):
        _recorder(tmp_path, torch.tensor(ids, dtype=torch.int32), rank=rank, slots=16, tokens=list(range(12)))
    trace = traced(tmp_path, experts=16, top_k=4, length=12)
    assert trace.provenance["layers"] == [1, 2]
    assert (trace.final.expert_ids_LSTK[:, 0] == ids[1:]).all()
    assert trace.num_sequences == 1


def test_sglang_of_mixed_modes_reads_tokens_and_names_what_it_leaves(tmp_path: Path) -> None:
    ids = np.random.default_rng(2).permuted(np.tile(np.arange(16), (2, 8, 1)), axis=2)[..., :4]
    _recorder(tmp_path, torch.tensor(ids, dtype=torch.int32), rank=0, slots=16, tokens=list(range(8)))
    torch.save({"rank": 0, "logical_count": torch.ones(1, 2, 16, dtype=torch.int32)}, tmp_path / "stat.pt")
    trace = traced(tmp_path, experts=16, top_k=4)
    assert (trace.final.expert_ids_LSTK[:, 0] == ids).all()
    assert "stat.pt: not read, tokens of other files say more than counts" in trace.provenance["notes"]  # type: ignore[operator]


def test_a_folder_of_two_forms_is_refused_with_both(tmp_path: Path) -> None:
    shutil.copy(SAMPLES / "vllm/moe_routes.jsonl", tmp_path)
    shutil.copy(SAMPLES / "megatron/router_replay_indices.pt", tmp_path)
    with pytest.raises(UserError, match=r"several forms of routing \(megatron, vllm\).*`moesim trace import KIND"):
        traced(tmp_path, experts=64, top_k=6)


def test_layers_that_counted_nothing_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "counts.json").write_text("[[0, 0, 0, 0], [1, 2, 3, 4]]")
    trace = traced(tmp_path, experts=4, top_k=1)
    assert trace.provenance["layers"] == [1]


def test_a_pickle_of_domains_is_added_up(tmp_path: Path) -> None:
    folder = tmp_path / "expert_counts"
    folder.mkdir()
    for name, count in (("a", 5), ("b", 45)):
        counters = [Counter({np.int64(0): count, np.int64(1): 50 - count}) for _ in range(3)]
        (folder / f"{name}.pkl").write_bytes(pickle.dumps(counters))
    trace = traced(tmp_path, experts=2, top_k=1)
    shares = np.bincount(trace.final.expert_ids_LSTK[0].ravel(), minlength=2) / trace.final.num_tokens
    assert np.allclose(shares, 0.5, atol=0.02)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8), (16, 1), (5, 4), (64, 6)])
def test_drawn_experts_get_the_shares_that_were_counted(experts: int, top_k: int) -> None:
    """Drawing by the counts themselves flattens them: a token takes a popular expert only once."""
    rng = np.random.default_rng(experts * top_k)
    counts_LE = rng.gamma(1.0, size=(2, experts)) + 0.2
    share_LE = shares_of_counts(counts_LE, top_k=top_k)
    assert share_LE.sum(axis=1) == pytest.approx([top_k] * 2)
    weights_LE = weights_of_shares(share_LE, top_k=top_k)
    tokens = 100_000
    for weights_E, share_E in zip(weights_LE, share_LE, strict=True):
        ids = draw_by_weight(tokens, weights_E=weights_E, top_k=top_k, rng=rng)
        found_E = np.bincount(ids.ravel(), minlength=experts) / tokens
        assert np.allclose(found_E, share_E, atol=5 * np.sqrt(0.25 / tokens))


def test_a_log_of_balancedness_says_which_routing_states_it() -> None:
    """The mean of the log's own lines, avg_tokens / max_tokens."""
    found = []
    for line in (SAMPLES / "vllm/eplb_log.txt").read_text().splitlines():
        mean, most = re.findall(r"avg_tokens=([\d.]+), max_tokens=([\d.]+)", line)[0]
        found.append(float(mean) / float(most))
    with pytest.raises(UserError) as caught:
        import_routing("vllm", SAMPLES / "vllm/eplb_log.txt")
    stated = re.findall(r"kind: balancedness, value: ([\d.]+)\}", str(caught.value))
    assert float(stated[0]) == pytest.approx(np.mean(found), abs=1e-3)


def test_every_form_is_told_from_every_other() -> None:
    assert {form for *_, form in SOURCES} | {"table"} == set(FORMS)


def _write(path: Path, columns: dict[str, Any]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path)


def test_a_table_of_export_comes_back_whatever_the_order_of_its_rows(tmp_path: Path) -> None:
    from pyarrow import parquet

    from moesim.routing.importing.source import write_parquet

    trace = traced(SAMPLES / "flame", experts=64, top_k=6, length=12)
    write_parquet(trace, tmp_path / "table.parquet")
    table = parquet.read_table(tmp_path / "table.parquet")
    parquet.write_table(table.take(np.random.default_rng(0).permutation(len(table))), tmp_path / "mixed.parquet")
    for name in ("table", "mixed"):
        found = import_routing("auto", tmp_path / f"{name}.parquet", asked=ImportRequest(experts=64))
        assert found.sequence_length == 12
        assert [step.step for step in found.steps] == [540, 5473]
        for step, wanted in zip(found.steps, trace.steps, strict=True):
            assert (step.expert_ids_LSTK == wanted.expert_ids_LSTK).all()
            assert (step.gates_LSTK == wanted.gates_LSTK).all()


def test_gates_with_a_factor_become_shares_and_the_run_says_so(tmp_path: Path) -> None:
    gates = [[2.0, 0.5], [1.25, 1.25]] * 8
    _write(tmp_path / "t.parquet", {"layer": [0] * 16, "experts": [[0, 1], [2, 3]] * 8, "gates": gates})
    trace = traced(tmp_path / "t.parquet", experts=4, top_k=2)
    assert np.allclose(trace.final.gates_LSTK.reshape(-1, 2), np.array(gates) / 2.0)
    assert any("divided by 2" in note for note in trace.provenance["notes"])  # type: ignore[union-attr]


BAD_TABLES = [
    ({"layer": [0, 0], "experts": [[0, 1], [2]]}, "different lengths"),
    ({"layer": [0, 0], "experts": [[0, 1], None]}, "empty rows"),
    ({"layer": [0, 0, 1], "experts": [[0, 1]] * 3}, "of equal size"),
    ({"layer": [0, 0], "experts": [0.5, 1.5]}, "no table of whole numbers"),
    ({"layer": ["a", "b"], "experts": [[0, 1]] * 2}, "no table of whole numbers"),
]


@pytest.mark.parametrize(("columns", "message"), BAD_TABLES)
def test_a_table_that_is_none_is_one_line(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    _write(tmp_path / "t.parquet", columns)
    with pytest.raises(UserError, match=message) as caught:
        import_routing("auto", tmp_path / "t.parquet", asked=ImportRequest(experts=4, sequence_length=1))
    assert "\n" not in str(caught.value)
