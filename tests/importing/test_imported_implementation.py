"""A recorded step at other sizes is what recording it anew there gives, and so is a scenario that runs it."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_moe
import torch
from small_moe import FIRST, HEADS, HIDDEN, TOP_K, VOCAB, WIDTH, recorded, small_step
from torch.utils.checkpoint import checkpoint

import moesim
from moesim.errors import UserError
from moesim.importing.recording import record_step
from moesim.kernels import kernel_model
from moesim.parallel.memory.report import memory_report
from moesim.parallel.memory.rows import even_rows
from moesim.program.scenario_fabric import node_fabric
from moesim.recorded.estimate import slowest_host, step_estimate
from moesim.recorded.host import HOST
from moesim.recorded.layers import DENSE, MOE
from moesim.recorded.peak import recorded_memory, step_peak
from moesim.recorded.scaling import scaled, updating
from moesim.recorded.sizes import matched, sizes_of
from moesim.recorded.spread import FSDP2, Ranks
from moesim.recorded.step_file import AGAIN, GRADIENT_WIDTHS, MODEL_SIZES, RecordedOp, load_step, save_step

pytestmark = pytest.mark.usefixtures("few_tokens")
OTHERS = [{"sequences": 8}, {"layers": 5}, {"experts": 32}, {"sequences": 1, "length": 2048}]


@pytest.fixture(scope="module")
def first() -> list[RecordedOp]:
    return recorded()


def not_followed(ops: list[RecordedOp]) -> list[RecordedOp]:
    """As older recordings and traces are: they do not say which widths the dimensions are."""
    facts = ({key: fact for key, fact in op.facts.items() if key not in (GRADIENT_WIDTHS, MODEL_SIZES)} for op in ops)
    return [replace(op, widths=None, facts=kept) for op, kept in zip(ops, facts, strict=True)]


@pytest.fixture(scope="module")
def old_file(first: list[RecordedOp], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("step") / "old.json"
    save_step(path, not_followed(first), source="small_moe")
    return path


@pytest.fixture(scope="module")
def file(first: list[RecordedOp], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("step") / "step.json"
    save_step(path, first, source="small_moe")
    return path


def scenario(file: Path, **more: Any) -> moesim.Scenario:
    model = {
        "layers": 3, "hidden": HIDDEN, "heads": HEADS, "kv_heads": HEADS, "head_dim": HIDDEN // HEADS,
        "vocab": VOCAB, "experts": 16, "top_k": TOP_K, "expert_intermediate": WIDTH, "dense_layers": 1,
        "dense_intermediate": 2 * HIDDEN,
    }  # fmt: skip
    precision = {"gemm": "bf16", "weights": "bf16", "gradients": "bf16", "master": "none", "optimizer": "bf16"}
    workload = {
        "kind": "training",
        "sequence_length": 8192,
        "micro_batch": 4,
        "global_batch": 4,
        "precision": precision,
    }
    changes = {
        "model": model,
        "routing": {"kind": "uniform"},
        "capacity": {"kind": "none"},
        "cluster": {
            "gpu": "h100",
            "nodes": 1,
            "gpus_per_node": 1,
            "fabric": {"preset": "rail_optimised", "nic": "400 Gbps"},
        },
        "parallelism": {"data": 1, "expert": 1, "pipeline": 1, "tensor": 1},
        "workload": workload,
        "implementation": {"kind": "imported", "file": str(file)},
        "uncertainty.samples": 2,
    }
    return moesim.load_scenario("quickstart", changes | more)


def test_every_operation_has_its_layer_and_every_dimension_its_symbol(first: list[RecordedOp]) -> None:
    sizes = sizes_of(first, where="it")
    assert (sizes.sequences, sizes.sequence_length, sizes.experts, sizes.top_k) == (4, 8192, 16, TOP_K)
    assert (sizes.dense_layers, sizes.moe_layers, sizes.expert_width) == (1, 2, WIDTH)
    assert all(each.known for each in matched(first, sizes))
    of_layers = {kind: {op.phase for op in first if op.layer == kind} for kind in (DENSE, MOE)}
    assert of_layers == {kind: {"forward", "backward"} for kind in (DENSE, MOE)}


@pytest.mark.parametrize("change", OTHERS, ids=str)
def test_scaled_is_recorded_anew(first: list[RecordedOp], change: dict[str, int]) -> None:
    anew, kernels = recorded(**change), kernel_model("h100")
    sizes, to = sizes_of(first, where="it"), sizes_of(anew, where="it")
    estimates = [step_estimate(ops, kernels) for ops in (scaled(first, sizes, to), anew)]
    assert estimates[0].kernels_s == pytest.approx(estimates[1].kernels_s, rel=0.01)
    assert estimates[0].gaps_s == pytest.approx(estimates[1].gaps_s, rel=0.01)
    phases = [
        {
            phase: sum(op.count * op.seconds for op in each.ops if op.phase == phase)
            for phase in ("backward", "optimizer")
        }
        for each in estimates
    ]
    assert phases[0] == pytest.approx(phases[1], rel=0.01)


def memory_changes(sequences: int = 4, length: int = 8192, layers: int = 3, experts: int = 16) -> dict[str, Any]:
    """A scenario of those sizes, of which the allocator takes nothing for itself."""
    return {
        "workload.micro_batch": sequences, "workload.global_batch": sequences, "workload.sequence_length": length,
        "model.layers": layers, "model.experts": experts,
        "memory": {"reserved": "0 GB", "allocator_overhead": 0.0},
    }  # fmt: skip


@pytest.mark.parametrize("change", [{}, *OTHERS], ids=str)
def test_a_scenario_has_the_peak_of_the_recording_and_at_other_sizes_what_it_says_of_the_list(
    file: Path, tmp_path: Path, change: dict[str, int]
) -> None:
    """The list alone is 6 to 13 % high; what of that grows with the layers, no recording of one size tells."""
    anew = step_peak(recorded(**change))
    assert anew is not None
    changed = scenario(file, **memory_changes(**change))
    found = moesim.simulate(changed).result["memory"]
    listed = memory_report(changed, even_rows(changed)).peak_bytes
    assert anew.total * 0.999 < found["peak_bytes"] < listed
    assert found["peak_bytes"] < anew.total * (1.05 if "layers" in change else 1.001)
    assert sum(found["parts_bytes_by_pipeline_rank"][0].values()) == pytest.approx(found["peak_bytes"])
    save_step(tmp_path / "trace.json", [*recorded()[:-1], updating(recorded()[-1], 77)], source="without a peak")
    assert recorded_memory(scenario(tmp_path / "trace.json")) is None


@pytest.mark.parametrize("followed", [True, False])
@pytest.mark.parametrize(
    ("widths", "change"),
    [
        ({"WIDTH": 640}, {"WIDTH": 1280}),
        ({"WIDTH": 640}, {"WIDTH": 320, "TOP_K": 8, "VOCAB": 24576}),
    ],
    ids=str,
)
def test_other_widths_are_recorded_anew(
    widths: dict[str, int], change: dict[str, int], followed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts of another width, more or fewer of them for a token, another vocabulary."""
    for name, value in widths.items():
        monkeypatch.setattr(small_moe, name, value)
    before = recorded() if followed else not_followed(recorded())
    for name, value in change.items():
        monkeypatch.setattr(small_moe, name, value)
    anew, kernels = recorded(), kernel_model("h100")
    sizes, to = sizes_of(before, where="it"), sizes_of(anew, where="it")
    ours, theirs = (step_estimate(ops, kernels) for ops in (scaled(before, sizes, to), anew))
    assert ours.kernels_s == pytest.approx(theirs.kernels_s, rel=0.01)
    assert len(ours.ops) == len(theirs.ops)


def test_a_width_that_no_shape_tells_is_refused(first: list[RecordedOp]) -> None:
    """Two experts' widths beside each other are the hidden size here."""
    ops = not_followed(first)
    sizes = sizes_of(ops, where="it")
    with pytest.raises(UserError, match="record it at that width"):
        scaled(ops, sizes, replace(sizes, expert_width=256))
    with pytest.raises(UserError, match="record it at that width"):
        scaled(ops, sizes, replace(sizes, hidden=2048))


def test_a_scenario_of_it_takes_the_predicted_time(first: list[RecordedOp], file: Path) -> None:
    predicted = step_estimate(first, kernel_model("h100"))
    result = moesim.simulate(scenario(file)).result
    assert result["step_time_s"] == pytest.approx(predicted.step_s, rel=0.01)


def test_a_step_far_larger_than_the_recorded_one_that_does_not_fit_is_simulated_where_that_is_asked_for(
    file: Path,
) -> None:
    """Operations of several kernels, of which some are known less firmly, rest on the weakest."""
    large = memory_changes(sequences=64) | {"memory": {"check": "warn"}}
    result = moesim.simulate(scenario(file, **large)).result
    assert result["memory"]["fits_share"] == 0.0
    assert any("do not fit into memory" in text for text in result["warnings"])


@pytest.mark.parametrize("factor", [0.5, 2.0, 4.0])
def test_a_host_that_sets_the_pace_is_ahead_into_the_next_step(
    first: list[RecordedOp], file: Path, factor: float
) -> None:
    """Of a step among many, as import-step gives it: the GPU's work behind the last launch hides the next launches."""
    sizes = sizes_of(first, where="it")
    short = scaled(first, sizes, replace(sizes, sequences=1, sequence_length=4096))
    predicted = step_estimate(short, kernel_model("h100"), host=HOST.paced(factor))
    assert (predicted.timeline.host_late_s > 0.0) is (factor > 1.0)
    less = {"sequence_length": 4096, "micro_batch": 1, "global_batch": 1}
    changes = {f"workload.{key}": value for key, value in less.items()} | {"compute.host_factor": factor}
    result = moesim.simulate(scenario(file, **changes)).result
    assert result["step_time_s"] == pytest.approx(predicted.step_s, rel=0.02)


def test_a_scenario_of_another_vocabulary_and_top_k(first: list[RecordedOp], file: Path) -> None:
    sizes = sizes_of(first, where="it")
    other = scaled(first, sizes, replace(sizes, vocabulary=32768, top_k=2))
    predicted = step_estimate(other, kernel_model("h100"))
    result = moesim.simulate(scenario(file, **{"model.vocab": 32768, "model.top_k": 2})).result
    assert result["step_time_s"] == pytest.approx(predicted.step_s, rel=0.01)


def test_a_scenario_at_other_sizes_takes_that_of_a_step_recorded_there(file: Path, tmp_path: Path) -> None:
    anew = tmp_path / "anew.json"
    save_step(anew, recorded(layers=5, length=16384, sequences=1), source="small_moe")
    larger = {
        "model.layers": 5,
        "workload.sequence_length": 16384,
        "workload.micro_batch": 1,
        "workload.global_batch": 1,
    }
    times = [moesim.simulate(scenario(each, **larger)).result["step_time_s"] for each in (file, anew)]
    assert times[0] == pytest.approx(times[1], rel=0.01)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_recorded(
    first: list[RecordedOp], reentrant: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's forward pass stands in the backward pass once more; torch stops a little earlier where it can."""
    plain = small_moe.Layer.forward

    def repeated(layer: small_moe.Layer, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(functools.partial(plain, layer), x, use_reentrant=reentrant)  # type: ignore[no-any-return]

    monkeypatch.setattr(small_moe.Layer, "forward", repeated)
    ops = record_step(*small_step(**FIRST))
    kernels = kernel_model("h100")
    before, after = (step_estimate(each, kernels) for each in (first, ops))
    layers = sum(op.count * op.seconds for op in before.ops if op.phase == "forward" and op.module[:6] == "layers")
    more = after.kernels_s - before.kernels_s
    least = 0.99 if reentrant else 0.75  # the last GEMMs of a layer are not needed
    assert least * layers < more < 1.01 * layers
    assert {op.layer for op in ops if AGAIN in op.facts} == {DENSE, MOE}
    file = tmp_path / "again.json"
    save_step(file, ops, source="small_moe")
    with pytest.raises(UserError, match=r"set workload\.recompute: full"):
        moesim.simulate(scenario(file))
    result = moesim.simulate(scenario(file, **{"workload.recompute": "full"})).result
    assert result["step_time_s"] == pytest.approx(after.step_s, rel=0.01 if reentrant else 0.06)


def test_expert_ranks_add_a_dispatch_and_skewed_routing_costs(file: Path) -> None:
    ranks = {"cluster.gpus_per_node": 4, "parallelism.data": 4, "parallelism.expert": 4, "workload.global_batch": 16}
    even, skewed = (
        moesim.simulate(scenario(file, **ranks, routing=routing)).result
        for routing in ({"kind": "uniform"}, {"kind": "balancedness", "value": 0.6})
    )
    assert even["communication"]["dispatch_bytes"] > 0
    assert skewed["step_time_s"] > 1.03 * even["step_time_s"]


def test_what_matches_no_size_is_a_warning_of_the_run(first: list[RecordedOp], tmp_path: Path) -> None:
    odd = (((12347, 89), "bfloat16", 2 * 12347 * 89),)
    own = replace(
        first[0], name="my_kernel", phase="forward", reads=odd, writes=odd, facts={}, count=1, layer="", widths=None
    )
    save_step(tmp_path / "odd.json", [*first, own], source="small_moe")
    told = [text for text in moesim.simulate(scenario(tmp_path / "odd.json")).result["warnings"] if "odd.json" in text]
    assert len(told) == 1
    assert "keep a dimension at its recorded size" in told[0] and "priced by their bytes alone: my_kernel" in told[0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"implementation": {"kind": "imported"}}, "implementation.file: is missing"),
        ({"implementation": {"kind": "fused", "file": __file__}}, "fused reads no file"),
        ({"implementation.norm": "fused"}, "implementation.norm: is as the recorded program has it"),
        ({"overlap.weight_gradients": True}, "overlap.weight_gradients: a recorded step keeps the order"),
        ({"implementation.file": "nowhere.json"}, "does not exist"),
        ({"implementation.file": __file__}, "is no recorded step"),
    ],
)
def test_mistakes_are_told_in_a_line(file: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        moesim.simulate(scenario(file, **changes))
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["hidden", "expert_intermediate"])
def test_widths_of_an_old_file_cannot_be_others(old_file: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"recorded with {key} .* which follows widths, or set model.{key}="):
        moesim.simulate(scenario(old_file, **{f"model.{key}": 256}))


def test_a_scenario_of_other_widths_takes_that_of_a_step_recorded_there(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HIDDEN": 2048, "HEADS": 16, "DENSE": 4096, "WIDTH": 768}.items():
        monkeypatch.setattr(small_moe, name, value)
    anew = tmp_path / "anew.json"
    save_step(anew, recorded(), source="small_moe")
    wider = {"hidden": 2048, "heads": 16, "kv_heads": 16, "expert_intermediate": 768, "dense_intermediate": 4096}
    changes = {f"model.{key}": value for key, value in wider.items()}
    times = [moesim.simulate(scenario(each, **changes)).result["step_time_s"] for each in (file, anew)]
    assert times[0] == pytest.approx(times[1], rel=0.01)


def test_a_file_without_layers_must_be_made_again(first: list[RecordedOp], tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    save_step(old, [replace(op, layer=None) for op in first], source="small_moe")
    with pytest.raises(UserError, match="does not say which layer"):
        moesim.simulate(scenario(old))
    assert load_step(old)[1][0].layer is None


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_layers_in_shards_cost_the_host_what_fully_shard_does(
    first: list[RecordedOp], file: Path, factor: float
) -> None:
    """A small step whose host sets the pace, much of it by what the wrapper does for each unit in each pass."""
    sizes = sizes_of(first, where="it")
    short = scaled(first, sizes, replace(sizes, sequences=1, sequence_length=2048))
    kernels = kernel_model("h100")
    host = HOST.paced(factor).times(1.0 / slowest_host(kernels, ranks=4))  # the scenario's hosts are alike
    ranks = Ranks(wrapper=FSDP2, fabric=node_fabric(kernels, gpu="h100", ranks=4), ranks=(0, 1, 2, 3))
    predicted = step_estimate(short, kernels, host=host, ranks=ranks)
    without = step_estimate(short, kernels, host=host._replace(unit=0.0), ranks=ranks)
    assert without.step_s < 0.85 * predicted.step_s
    changes = {
        "cluster.gpus_per_node": 4, "cluster.jitter": False, "compute.host_factor": factor,
        "workload.sequence_length": 2048, "workload.micro_batch": 1, "workload.global_batch": 4,
        "parallelism": {"data": 4, "expert": 1, "zero": {"dense": 3, "expert": 3}},
    }  # fmt: skip
    result = moesim.simulate(scenario(file, **changes)).result
    assert result["step_time_s"] == pytest.approx(predicted.step_s, rel=0.03)
