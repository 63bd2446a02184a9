"""transformers' own plans of tensor and expert parallelism: what a rank computes, and what is sent."""

from collections import Counter

import pytest
from small_moe import DENSE, HIDDEN, TOP_K, VOCAB, small_step

from moesim.errors import UserError
from moesim.importing.recording import record_step
from moesim.kernels import KernelModel, kernel_model
from moesim.program.scenario_fabric import node_fabric
from moesim.recorded.estimate import StepEstimate, step_estimate
from moesim.recorded.plans import expert_plan, tensor_plan
from moesim.recorded.pricing import OPTIMIZER
from moesim.recorded.spread import EP, TP, Ranks
from moesim.recorded.step_file import RecordedOp

TOKENS = 2 * 4096
BF16 = 2


@pytest.fixture(scope="module")
def ops() -> list[RecordedOp]:
    return record_step(*small_step(layers=3))


@pytest.fixture(scope="module")
def kernels() -> KernelModel:
    return kernel_model("h100")


def estimate(ops: list[RecordedOp], kernels: KernelModel, wrapper: str | None, ranks: int = 2) -> StepEstimate:
    fabric = node_fabric(kernels, gpu="h100", ranks=ranks)
    spread = None if wrapper is None else Ranks(wrapper=wrapper, fabric=fabric, ranks=tuple(range(ranks)))
    return step_estimate(ops, kernels, ranks=spread)


def test_a_tensor_plan_sums_every_gemm_of_a_share_and_gathers_the_logits(
    ops: list[RecordedOp], kernels: KernelModel
) -> None:
    """One dense and two MoE layers whose queries, keys and values, and gate and up, are one GEMM each."""
    sent = estimate(ops, kernels, TP).timeline.sent
    tokens = float(TOKENS * HIDDEN * BF16)
    gates = float(TOKENS * TOP_K * 4)
    assert Counter((each.name, each.phase, each.num_bytes) for each in sent) == {
        ("all_reduce", "forward", tokens): 3 + 1 + 2,  # attention, the dense network, experts
        ("all_gather", "forward", float(TOKENS * VOCAB * BF16)): 1,
        ("all_reduce", "backward", tokens): 1 + 3 + 1 + 2,  # the head's input, then the same in reverse
        ("all_reduce", "backward", gates): 2,
    }


def test_an_expert_plan_sums_the_experts_results_alone(ops: list[RecordedOp], kernels: KernelModel) -> None:
    sent = estimate(ops, kernels, EP).timeline.sent
    assert Counter((each.phase, each.num_bytes) for each in sent) == {
        ("forward", float(TOKENS * HIDDEN * BF16)): 2,
        ("backward", float(TOKENS * HIDDEN * BF16)): 2,
        ("backward", float(TOKENS * TOP_K * 4)): 4,  # the router's scores, and the experts' inputs
    }


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_shares_of_weights_and_gemms_but_all_tokens(
    ops: list[RecordedOp], kernels: KernelModel, ranks: int
) -> None:
    """Rows of other ranks' experts are moved as one's own; no GEMM computes them."""

    def parameters(found: tuple[RecordedOp, ...]) -> float:
        return next(op.facts["parameters"] for op in found if op.name == OPTIMIZER)

    def seconds(wrapper: str | None, name: str) -> float:
        return sum(
            each.count * each.seconds for each in estimate(ops, kernels, wrapper, ranks).ops if each.name == name
        )

    whole = parameters(tuple(ops))
    norms_and_router = 6 * HIDDEN + 2 * 16 * HIDDEN
    table = VOCAB * HIDDEN
    assert (
        parameters(tensor_plan(ops, ranks).ops) == (whole - table - norms_and_router) / ranks + table + norms_and_router
    )
    experts = 2 * 16 * 3 * 512 * HIDDEN
    assert parameters(expert_plan(ops, ranks).ops) == whole - experts + experts / ranks
    assert seconds(EP, "mm") == pytest.approx(seconds(None, "mm"))
    assert seconds(TP, "mm") < 0.75 * seconds(None, "mm")
    for wrapper in (TP, EP):
        assert seconds(wrapper, "_grouped_mm") < 0.75 * seconds(None, "_grouped_mm")
        assert seconds(wrapper, "index_put") == pytest.approx(seconds(None, "index_put"))


def test_a_number_of_ranks_that_divides_nothing_is_refused(ops: list[RecordedOp]) -> None:
    with pytest.raises(UserError, match="--ranks 3 does not divide the recorded step's"):
        tensor_plan(ops, 3)
    with pytest.raises(UserError, match="--ranks 3 does not divide the recorded step's experts, 16"):
        expert_plan(ops, 3)
    assert DENSE % 3
    with pytest.raises(UserError, match="has no experts in grouped GEMMs that ranks could share"):
        expert_plan(record_step(*small_step(layers=1)), 2)
