"""A recorded step over tensor, context and expert-tensor ranks: the kernels of a rank's share, and its exchanges."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_moe
from small_moe import recorded
from test_imported_implementation import not_followed, scenario

import moesim
from moesim.errors import UserError
from moesim.recorded.layers import DENSE
from moesim.recorded.pricing import GEMMS, OPTIMIZER, launch_of
from moesim.recorded.scaling import scaled_op, scaled_ops
from moesim.recorded.sharing import divided, shared_out
from moesim.recorded.sizes import MatchedOp, matched, sizes_of
from moesim.recorded.step_file import RecordedOp, save_step

pytestmark = pytest.mark.usefixtures("few_tokens")
DENSE_KEYS = ("layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "dense_intermediate")
RANKS = {"parallelism.data": 2, "workload.global_batch": 8, "cluster.gpus_per_node": 4}


@pytest.fixture(scope="module")
def ops() -> list[RecordedOp]:
    return recorded()


@pytest.fixture(scope="module")
def file(ops: list[RecordedOp], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("step") / "step.json"
    save_step(path, ops, source="small_moe")
    return path


def kernels(ops: Sequence[RecordedOp]) -> Counter[Any]:
    """What runs how often; the router's rows of zeros tell experts, not widths."""
    found: Counter[Any] = Counter()
    for op in ops:
        if op.name != OPTIMIZER:
            found[op.name, op.phase, op.layer, op.reads, op.writes] += op.count
    return found


@pytest.mark.parametrize(
    ("ranks", "share"),
    [
        ({"tensor": 2, "expert_tensor": 1}, {"HEADS": 4, "DENSE": 1024, "VOCAB": 6144}),
        ({"tensor": 1, "expert_tensor": 2}, {"WIDTH": 256}),
        ({"tensor": 4, "expert_tensor": 4}, {"HEADS": 2, "DENSE": 512, "VOCAB": 3072, "WIDTH": 128}),
    ],
    ids=str,
)
def test_a_share_is_a_model_of_fewer_heads_and_narrower_networks_recorded_anew(
    ops: list[RecordedOp], ranks: dict[str, int], share: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in share.items():
        monkeypatch.setattr(small_moe, name, value)
    anew, sizes = recorded(), sizes_of(ops, where="it")
    ours = scaled_ops(matched(ops, sizes), sizes, divided(sizes, **ranks))
    assert kernels(ours) == kernels(anew)


def flops(op: RecordedOp) -> float:
    return op.count * sum(float(np.sum(kernel.flops)) for kernel in launch_of(op).kernels)


@pytest.mark.parametrize("tensor", [2, 4])
def test_ranks_together_multiply_as_much_as_one_alone(ops: list[RecordedOp], tensor: int) -> None:
    """GEMMs on a share of a width see all tokens, others those of a rank."""
    sizes = sizes_of(ops, where="it")
    share = divided(sizes, tensor=tensor, expert_tensor=1)
    own = replace(share, sequence_length=sizes.sequence_length // tensor)
    all_ops = matched(ops, sizes)

    def of(phase: str, layer: str) -> list[MatchedOp]:
        return [each for each in all_ops if (each.op.phase, each.op.layer) == (phase, layer)]

    for layer in (DENSE, "moe"):
        for phase in ("forward", "backward"):
            mine = of(phase, layer)
            for each, part in zip(mine, shared_out(of("forward", layer), mine, sizes), strict=True):
                scaled = scaled_op(each, sizes, share if part.whole else own)
                assert scaled is not None
                if each.op.name in GEMMS:
                    assert tensor * flops(scaled) == pytest.approx(flops(replace(each.op, count=scaled.count)))


@pytest.mark.parametrize(
    "mesh",
    [
        {"parallelism.tensor": 4, "parallelism.data": 1, "workload.global_batch": 4},
        {"parallelism.tensor": 2, "parallelism.expert": 2, "parallelism.expert_tensor": 2},
        {"parallelism.tensor": 2, "parallelism.context": 2, "parallelism.data": 1, "workload.global_batch": 4},
    ],
    ids=str,
)
def test_ranks_exchange_what_they_do_of_a_listed_software(file: Path, mesh: dict[str, int]) -> None:
    switches = {"kind": "torchtitan", "qkv": "joined", "ffn_inputs": "joined"}
    ours, listed = (
        moesim.simulate(scenario(file, **(RANKS | mesh | more))).result for more in ({}, {"implementation": switches})
    )
    assert ours["communication"]["tensor_bytes"] == listed["communication"]["tensor_bytes"] > 0
    assert ours["step_time_s"] == pytest.approx(listed["step_time_s"], rel=0.25)


def test_dense_layers_without_sequence_parallelism_sum_instead(tmp_path: Path) -> None:
    file = tmp_path / "dense.json"
    save_step(file, recorded(layers=1), source="small_moe")
    dense = scenario(file).model.model_dump() | {"experts": 0, "top_k": 0, "dense_layers": 0, "layers": 3}
    dense = {key: value for key, value in dense.items() if key in DENSE_KEYS}
    switches = {"qkv": "joined", "ffn_inputs": "joined", "sequence_parallel": False}
    imported = {"kind": "imported", "file": str(file), "sequence_parallel": False}
    changes = RANKS | {"model": dense, "parallelism.tensor": 2}
    ours, listed = (
        moesim.simulate(scenario(file, **changes, implementation=implementation)).result
        for implementation in (imported, {"kind": "torchtitan", **switches})
    )
    assert ours["communication"]["tensor_bytes"] == listed["communication"]["tensor_bytes"] > 0


def test_more_tensor_ranks_take_less_time_than_one_and_more_than_a_share(file: Path) -> None:
    whole, half = (
        moesim.simulate(scenario(file, **RANKS, **{"parallelism.tensor": tensor})).result["step_time_s"]
        for tensor in (1, 2)
    )
    assert whole / 2 < half < whole


def test_a_file_that_does_not_say_its_widths_is_refused(ops: list[RecordedOp], tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    save_step(old, not_followed(ops), source="small_moe")
    with pytest.raises(UserError, match=r"does not follow widths .* or set parallelism.tensor: 1"):
        moesim.simulate(scenario(old, **RANKS, **{"parallelism.tensor": 2}))


def test_what_nothing_says_how_to_share_is_named(ops: list[RecordedOp], tmp_path: Path) -> None:
    first = next(op for op in ops if op.layer == DENSE)
    odd = (((12347, 89), "bfloat16", 2 * 12347 * 89),)
    own = replace(first, name="my_kernel", reads=odd, writes=odd, facts={}, widths=None)
    file = tmp_path / "odd.json"
    save_step(file, [*ops, own], source="small_moe")
    with pytest.raises(UserError, match=r"has what cannot be shared out: my_kernel; "):
        moesim.simulate(scenario(file, **RANKS, **{"parallelism.tensor": 2}))
