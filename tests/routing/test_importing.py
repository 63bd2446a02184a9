"""Every form of recorded routing arrives as what its program wrote, is kept and simulated, and is never run as code."""

import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim import load_scenario, simulate
from moesim.errors import UserError
from moesim.routing.importing import ImportRequest, import_routing
from moesim.routing.importing.source import logical_ids
from moesim.strict_json import json_text
from moesim.trace import load_trace, save_trace

SAMPLES = Path(__file__).parent / "samples"

# form, file, what the user must add, layers, experts, top-K, recorded steps
FORMS: list[tuple[str, str, dict[str, int], int, int, int, list[int]]] = [
    ("flame", "flame", {"experts": 64, "sequence_length": 16}, 3, 64, 6, [540, 5473]),
    ("flame", "flame_capture", {"experts": 64, "sequence_length": 8}, 1, 64, 6, [540]),
    ("megatron", "megatron", {"experts": 64, "sequence_length": 16}, 3, 64, 6, [0, 1]),
    ("megatron", "megatron/router_replay_indices.pt", {"experts": 64, "sequence_length": 8}, 4, 64, 6, [0]),
    ("sglang", "sglang/expert_distribution_recorder_1764100000.0.pt", {"top_k": 4}, 3, 16, 4, [0]),
    ("sglang", "sglang/expert_distribution_recorder_1764100001.5_0.pt", {}, 3, 16, 8, [0]),
    ("vllm", "vllm/moe_routes.jsonl", {"experts": 60, "sequence_length": 8}, 1, 60, 4, [0]),
    ("vllm", "vllm/eplb_state_tensors.pt", {"top_k": 4}, 3, 16, 4, [0]),
    ("trtllm", "trtllm/expert_statistic", {"sequence_length": 10}, 2, 16, 4, [0]),
    ("olmoe", "olmoe/c4_results.jsonl", {"experts": 64}, 16, 64, 8, [0]),
    ("olmoe", "olmoe/expert_counts/synthetic.pkl", {"experts": 64, "top_k": 8}, 3, 64, 8, [0]),
    ("counts", "eplb/rebalance_input.json", {"top_k": 2}, 2, 12, 2, [0]),
]


@pytest.mark.parametrize(("kind", "file", "asked", "layers", "experts", "top_k", "steps"), FORMS)
def test_every_sample_arrives_and_is_kept(
    kind: str, file: str, asked: dict[str, int], layers: int, experts: int, top_k: int, steps: list[int], tmp_path: Path
) -> None:
    trace = import_routing(kind, SAMPLES / file, asked=ImportRequest(tokens=8192, **asked))
    assert (trace.num_layers, trace.router.num_experts, trace.router.top_k) == (layers, experts, top_k)
    assert [step.step for step in trace.steps] == steps
    save_trace(trace, tmp_path / "imported.npz")
    assert (load_trace(tmp_path / "imported.npz").final.expert_ids_LSTK == trace.final.expert_ids_LSTK).all()


@pytest.mark.parametrize("form", [FORMS[2], FORMS[-1]], ids=["recorded", "drawn from counts"])
def test_what_was_kept_is_simulated(form: tuple[str, str, dict[str, int], int, int, int, list[int]], tmp_path: Path):
    kind, file, asked, _, experts, top_k, _ = form
    trace = import_routing(kind, SAMPLES / file, asked=ImportRequest(tokens=8192, **asked))
    save_trace(trace, tmp_path / "imported.npz")
    record = simulate(load_scenario(_scenario(tmp_path / "imported.npz", experts, top_k, trace.sequence_length)))
    assert record.result["step_time_s"] > 0


def _scenario(file: Path, experts: int, top_k: int, length: int) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "name": "imported",
        "model": {
            "layers": 2, "hidden": 256, "heads": 4, "kv_heads": 4, "head_dim": 64, "experts": experts, "top_k": top_k,
            "expert_intermediate": 256, "vocab": 1024,
        },
        "routing": {"kind": "trace", "file": str(file)},
        "cluster": {"gpu": "h100", "nodes": 1, "gpus_per_node": 2},
        "parallelism": {"data": 2, "expert": 2},
        "workload": {"kind": "training", "sequence_length": min(length, 8), "micro_batch": 1, "global_batch": 2},
        "uncertainty": {"samples": 1},
    }  # fmt: skip


@given(st.integers(1, 3), st.integers(1, 5), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_slots_become_the_experts_of_their_own_layer(layers: int, tokens: int, slots: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    map_LP = rng.integers(0, slots, (layers, slots))
    physical_LTK = rng.integers(0, slots, (layers, tokens, 2))
    found = logical_ids(physical_LTK, map_LP, "here")
    for layer, token, column in np.ndindex(found.shape):
        assert found[layer, token, column] == map_LP[layer, physical_LTK[layer, token, column]]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1,2,3,4", "", "5,6,7"], "line 3 has 3 counts, line 1 has 4"),
        (["a,b", "1,x"], "line 2: 'x' is no count"),
        (["1,2", "3,-4"], "line 2: '-4' is no count"),
        (["1,2", "1,inf"], "line 2: 'inf' is no count"),
        (["\x80\x04\x95,1"], "line 1 is no text; if it is a pickle"),
        (["e0,e1"], "no table of counts"),
    ],
)
def test_a_bad_line_of_counts_is_named(tmp_path: Path, lines: list[str], message: str) -> None:
    (tmp_path / "counts.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=re.escape(message)):
        import_routing("counts", tmp_path / "counts.csv", asked=ImportRequest(top_k=1))


def test_counts_set_the_popularity_that_is_drawn(tmp_path: Path) -> None:
    (tmp_path / "counts.csv").write_text("e0,e1,e2,e3\n100,300,500,100\n250,250,250,250\n")
    trace = import_routing("counts", tmp_path / "counts.csv", asked=ImportRequest(top_k=1))
    shares = np.bincount(trace.final.expert_ids_LSTK[0].ravel(), minlength=4) / trace.final.num_tokens
    assert np.allclose(shares, [0.1, 0.3, 0.5, 0.1], atol=0.01)


class _Bomb:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("exploded"),))


def test_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("bomb.pkl", [_Bomb()]), ("bomb.pt", {"records": _Bomb()})):
        (tmp_path / name).write_bytes(pickle.dumps(value))
    with pytest.raises(UserError, match="no pickle of counters"):
        import_routing("olmoe", tmp_path / "bomb.pkl")
    with pytest.raises(UserError, match="no file of plain tensors"):
        import_routing("sglang", tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()
    (tmp_path / "good.pkl").write_bytes(pickle.dumps([Counter({np.int64(1): 5, np.int64(0): 3})]))
    assert (
        import_routing("olmoe", tmp_path / "good.pkl", asked=ImportRequest(experts=4, top_k=1)).router.num_experts == 4
    )


MISTAKES: list[tuple[str, str, dict[str, int], str]] = [
    ("olmo", "olmoe", {}, "unknown form of routing 'olmo'"),
    ("flame", "flame", {"sequence_length": 16}, "add --experts"),
    ("flame", "flame", {"experts": 64}, "add --sequence-length"),
    ("flame", "flame", {"experts": 20, "sequence_length": 16}, "of 20 is chosen there"),
    ("flame", "flame", {"experts": 64, "sequence_length": 49}, "less than a sequence of 49"),
    ("trtllm", "trtllm/expert_statistic", {"experts": 32, "sequence_length": 5}, "is 16 there, but --experts says 32"),
    ("trtllm", "trtllm/moe_load_balancer.yaml", {}, "a placement, not routing"),
    ("vllm", "vllm/eplb_log.txt", {}, "neither which experts nor how often"),
    ("megatron", "olmoe", {}, "holds no router_trace_rank"),
    ("sglang", "nowhere", {}, "no such file or folder"),
    ("sglang", "vllm/eplb_state_tensors.pt", {}, "neither logical_count nor records"),
    ("counts", "olmoe/c4_results.jsonl", {}, "no table of counts"),
]


@pytest.mark.parametrize(("kind", "file", "asked", "message"), MISTAKES)
def test_what_does_not_fit_is_one_line(kind: str, file: str, asked: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        import_routing(kind, SAMPLES / file, asked=ImportRequest(**asked))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0.3, 0.5, 0.99])
@pytest.mark.parametrize(("kind", "file", "asked"), [(form[0], form[1], form[2]) for form in FORMS])
def test_a_file_that_was_cut_off_is_refused(
    kind: str, file: str, asked: dict[str, int], cut: float, tmp_path: Path
) -> None:
    """A cut recording must never become numbers: a whole line is the least that is read."""
    source = SAMPLES / file
    if source.is_dir():
        pytest.skip("folders are read file by file")
    data = source.read_bytes()
    (tmp_path / source.name).write_bytes(data[: int(len(data) * cut)])
    with pytest.raises(UserError) as caught:
        import_routing(kind, tmp_path / source.name, asked=ImportRequest(**asked))
    assert "\n" not in str(caught.value)


def test_a_megatron_step_without_a_layer_is_refused(tmp_path: Path) -> None:
    lines = [{"step": s, "layer": n, "rank": 0, "top_indices": [[0, 1]]} for s, n in ((0, 0), (0, 1), (1, 0))]
    (tmp_path / "router_trace_rank0.jsonl").write_text("\n".join(map(json_text, lines)))
    with pytest.raises(UserError, match="a recording may be incomplete"):
        import_routing("megatron", tmp_path, asked=ImportRequest(experts=4, sequence_length=1))
