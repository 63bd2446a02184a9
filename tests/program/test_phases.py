"""Every operation says which phase of the step and which part of the model it belongs to."""

from typing import Any

import pytest

from moesim.kernels import kernel_model
from moesim.network import build_fabric
from moesim.program import build_program
from moesim.program.host import HostModel
from moesim.program.operations import Kind, Operation
from moesim.program.software import SwitchedKernels
from moesim.program.stage import StagePlan, stage_blocks
from moesim.results.spans import CATEGORY_OF_PART, Collective, Part, Phase
from moesim.run import draw_samples, obtain_trace
from moesim.schedules import Pass

pytestmark = pytest.mark.usefixtures("few_tokens")

EAGER = {"implementation.kind": "torch_eager", "dispatch.deduplicate": "per_expert", "workload.recompute": "none"}
STEPS: dict[str, dict[str, Any]] = {
    "fused": {"workload.recompute": "none"},
    "tensor": {"parallelism": {"data": 2, "tensor": 2, "expert": 2, "expert_tensor": 2}},
    "context": {"parallelism": {"data": 2, "context": 2, "expert": 4}, "workload.recompute": "full"},
    "sharded": {"parallelism": {"data": 4, "expert": 2, "zero": {"dense": 3, "expert": 3}}},
    "eager": EAGER,
}
ORDER = (Kind.FORK, Kind.JOIN, Kind.AWAIT)
GRADIENTS = (Phase.INPUT_GRADIENT, Phase.WEIGHT_GRADIENT)


def blocks_of(scenario: Any) -> dict[str, list[Operation]]:
    samples, _ = draw_samples(scenario, obtain_trace(scenario))
    kernels = kernel_model("h200", "roofline")
    program = build_program(scenario, fabric=build_fabric(scenario.cluster), kernels=kernels, samples=samples[:1])
    group = program.groups[0]
    blocks = {run.block.name: run.block for task in group.tasks for run in task.runs}
    found = {name: list(block.operations) for name, block in blocks.items()}
    return found | {"optimizer": list(group.optimizer.operations)}


@pytest.mark.parametrize("name", STEPS)
def test_operations_know_their_phase_part_and_collective(small, name: str) -> None:
    blocks = blocks_of(small(STEPS[name]))
    forward = [operation for operation in blocks["forward"] if operation.kind not in ORDER]
    backward = [operation for operation in blocks["backward"] if operation.kind not in ORDER]
    assert {operation.phase for operation in forward} == {Phase.FORWARD}
    assert {operation.phase for operation in backward} <= {*GRADIENTS, Phase.RECOMPUTE}
    assert Phase.OPTIMIZER in {operation.phase for operation in blocks["optimizer"]}
    for operation in (*forward, *backward):
        assert operation.part is not Part.NONE
        moves = operation.kind in (Kind.TRANSFER, Kind.COLLECTIVE)
        assert (operation.label.collective is not Collective.NONE) == moves


def test_a_kernel_of_a_part_with_a_category_counts_to_it(small) -> None:
    for changes in STEPS.values():
        for operations in blocks_of(small(changes)).values():
            for operation in operations:
                if operation.kind is Kind.COMPUTE and operation.phase is not Phase.RECOMPUTE:
                    own = CATEGORY_OF_PART.get(operation.part)
                    assert own in (None, operation.label.category)


def test_full_recomputation_repeats_every_operation_of_a_layer(small) -> None:
    blocks = blocks_of(small({"workload.recompute": "full"}))
    again = [operation for operation in blocks["backward"] if operation.phase is Phase.RECOMPUTE]
    assert len(again) == len([operation for operation in blocks["forward"] if operation.label.layer >= 0])


@pytest.mark.parametrize("seconds", [(8e-6, 8e-6), (6e-6, 9e-6), (0.0, 0.0)])
def test_what_is_repeated_costs_the_host_what_it_did(
    small, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float]
) -> None:
    """By the host of the software, which need not be the one that kernels were measured with."""
    host = HostModel(forward_launch=seconds[0], backward_launch=seconds[1], readback=0.0)
    monkeypatch.setattr(SwitchedKernels, "host_model", lambda *_: host)
    blocks = blocks_of(small({"workload.recompute": "full"}))
    first = sum(each.launches for each in blocks["forward"] if each.label.layer >= 0)
    again = sum(each.launches for each in blocks["backward"] if each.phase is Phase.RECOMPUTE)
    assert first > 0 and again * host.backward_launch == pytest.approx(first * host.forward_launch)


def test_only_gradients_of_weights_are_put_off(small) -> None:
    scenario = small({"model.experts": 0, "model.top_k": 0, "model.shared_experts": 0, "model.expert_intermediate": 0,
                      "model.dense_layers": 4, "routing": {"kind": "uniform"}, "parallelism": {"data": 4}})  # fmt: skip
    plan = StagePlan(layers=range(2), moe_layers=(), first=False, last=True)
    blocks = stage_blocks(scenario, kernel_model("h200", "roofline"), plan, None)
    assert {operation.phase for operation in blocks[Pass.WEIGHT].operations} == {Phase.WEIGHT_GRADIENT}
    kept = {operation.part for operation in blocks[Pass.INPUT].operations if operation.phase is Phase.WEIGHT_GRADIENT}
    assert kept == {Part.HEAD}
