"""The executor against steps worked out by hand."""

import numpy as np
import pytest

from moesim.engine.executor import FREE_BESIDE, GroupExecutor
from moesim.engine.executor_steps import Labels
from moesim.kernels import Beside
from moesim.kernels.families import FAMILIES
from moesim.program.collectives import PeerCollective, Peers
from moesim.program.host import HostModel
from moesim.program.operations import (
    SIDE,
    Block,
    Operation,
    Run,
    collective,
    compute,
    fork,
    join,
    readback,
    transfer,
    wait,
)
from moesim.results import CATEGORIES, Label, SpanRecorder, Stream, attribute

FREE = HostModel(forward_launch=0.0, backward_launch=0.0, readback=0.0)


class Barrier:
    """All ranks are done `seconds` after the last has come."""

    def __init__(self, seconds: float, samples: int, ranks: int) -> None:
        self.alone_R = np.full((samples, ranks), seconds)

    def finish(self, start_R: np.ndarray) -> np.ndarray:
        return start_R.max(axis=1, keepdims=True) + self.alone_R


def executor(ranks: int, *, samples: int = 1, host: HostModel = FREE, beside: Beside = FREE_BESIDE) -> GroupExecutor:
    recorder = SpanRecorder(rows=100, samples=samples, ranks=ranks)
    return GroupExecutor(
        samples=samples,
        ranks=ranks,
        host=host,
        beside_R=(dict.fromkeys(FAMILIES, beside),),
        recorder=recorder,
        labels=Labels(),
    )


def run(group: GroupExecutor, *operations: Operation) -> dict[str, np.ndarray]:
    """Execute one block and attribute it: seconds per category and rank of sample 0."""
    group.execute([Run(Block("test", operations), 0, False)])
    step_S = group.done_SR.max(axis=1)
    ranks_R = np.arange(group.compute_SR.shape[1])
    table = group.recorder.table(labels=group.labels.all(), ranks_R=ranks_R, step_S=step_S)
    seconds_CSR = attribute(table)
    np.testing.assert_allclose(
        seconds_CSR.sum(axis=0), np.broadcast_to(step_S[:, None], group.compute_SR.shape), atol=1e-12
    )
    return {name: seconds_CSR[c, 0] for c, name in enumerate(CATEGORIES)}


def op(name: str, category: str, seconds: object, **kwargs: object) -> Operation:
    return compute(Label(name, category, Stream.COMPUTE, 0), np.asarray(seconds, float), source="roofline", **kwargs)  # type: ignore[arg-type]


def test_a_slow_rank_is_waited_for_inside_the_transfer() -> None:
    group = executor(2)
    parts = run(
        group,
        op("experts", "experts", [[[1.0, 3.0]]]),
        transfer("combine", "combine_exposed", (Barrier(0.5, 1, 2),), layer=0),
    )
    assert group.done_SR.tolist() == [[3.5, 3.5]]
    assert parts["experts"].tolist() == [1.0, 3.0]
    assert parts["imbalance_wait"] == pytest.approx([2.0, 0.0])
    assert parts["combine_exposed"] == pytest.approx([0.5, 0.5])
    assert parts["bubble"] == pytest.approx([0.0, 0.0])


def test_side_chain_hides_the_transfer_and_is_joined() -> None:
    group = executor(1)
    parts = run(
        group,
        fork(layer=0),
        transfer("dispatch", "dispatch_exposed", (Barrier(2.0, 1, 1),), layer=0),
        op("shared", "shared_experts", 1.5, chain=SIDE),
        op("experts", "experts", 1.0),
        join(layer=0),
        op("unpermute", "permute", 0.25),
    )
    assert group.done_SR[0, 0] == pytest.approx(3.25)
    assert parts["dispatch_exposed"][0] == pytest.approx(0.5)  # 2.0 less the 1.5 behind the shared experts


def test_compute_beside_a_transfer_is_slowed_only_while_it_is_open() -> None:
    group = executor(1, beside=Beside(compute=2.0))
    run(
        group,
        fork(layer=0),
        transfer("dispatch", "dispatch_exposed", (Barrier(1.0, 1, 1),), layer=0),
        op("shared", "shared_experts", 1.5, chain=SIDE),
    )
    # Half of the work of the first second is done, the remaining 1.0 runs at full speed.
    assert group.compute_SR[0, 0] == pytest.approx(2.0)


def beside_a_transfer(beside: Beside, *seconds: float, compiled: bool = False) -> tuple[GroupExecutor, float]:
    """Kernels of a side chain beside a transfer of 1 s; the executor and when the main chain may go on."""
    group = executor(1, beside=beside)
    group._compiled = compiled
    shared = (op("shared", "shared_experts", each, chain=SIDE) for each in seconds)
    run(group, fork(layer=0), transfer("dispatch", "dispatch_exposed", (Barrier(1.0, 1, 1),), layer=0), *shared)
    return group, float(group.chains_CSR[0, 0, 0])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_transfer_beside_compute_is_slowed_only_while_both_run(compiled: bool) -> None:
    both = Beside(compute=2.0, transfer=4.0)
    # One second of work takes two beside the transfer, of which half a second is then done.
    group, arrived = beside_a_transfer(both, 1.0, compiled=compiled)
    assert group.compute_SR[0, 0] == pytest.approx(2.0)
    assert arrived == group.communication_SR[0, 0] == pytest.approx(2.0 + 0.5)
    # As three kernels the same; and work that outlasts the transfer goes on at full speed.
    assert beside_a_transfer(both, 0.25, 0.5, 0.25, compiled=compiled)[1] == pytest.approx(2.5)
    group, arrived = beside_a_transfer(both, 3.0, compiled=compiled)
    assert arrived == pytest.approx(4.0) and group.compute_SR[0, 0] == pytest.approx(4.0 + 1.0)


def beside_a_gather(facts: Beside, *seconds: float) -> tuple[GroupExecutor, float]:
    """Kernels beside the gather of a layer's weights, 1 s; the executor and when what waits for it may go on."""
    group = executor(1)
    group.collectives_F3R[:] = np.array(facts)[:, None]
    group._is_free_of_contention = facts == FREE_BESIDE
    label = Label("all_gather", "data_parallel", Stream.REDUCTION, 0)
    kernels = [op("work", "attention", each) for each in seconds]
    gather = PeerCollective(Peers(1), np.ones(1), sent_bytes=1e9)
    run(group, collective(label, gather), *kernels, wait(layer=0))
    return group, float(group.chains_CSR[0, 0, 0])


def test_a_collective_that_a_slower_link_holds_up_is_slowed_less() -> None:
    for measured, factor in ((1e9, 4.0), (2e9, 2.0), (1e10, 1.0)):
        group = executor(1)
        group.collectives_F3R[:] = np.array(Beside(compute=2.0, transfer=4.0))[:, None]
        group._collective_rate = measured
        facts_F3R = group._facts_beside(PeerCollective(Peers(1), np.ones(1), sent_bytes=1e9))
        assert (facts_F3R[:, 1] == factor).all() and (facts_F3R[:, 0] == 2.0).all()


def test_kernels_and_the_collectives_of_layers_slow_each_other_while_both_run() -> None:
    both = Beside(compute=2.0, transfer=4.0)
    assert beside_a_gather(FREE_BESIDE, 0.25, 0.5)[1] == pytest.approx(1.0)
    group, arrived = beside_a_gather(both, 0.25, 0.75)
    assert group.compute_SR[0, 0] == pytest.approx(2.0) and arrived == pytest.approx(2.0 + 0.5)
    rows = group.recorder.table(labels=group.labels.all(), ranks_R=np.arange(1), step_S=np.array([2.5]))
    assert rows.finish_NSR[rows.rows(Stream.REDUCTION), 0, 0].tolist() == pytest.approx([2.5])
    group, arrived = beside_a_gather(both, 3.0)
    assert arrived == pytest.approx(5.0), "of the kernel 2 s are done beside 4 s of the gather, and 1 s is left"
    assert group.reduced_SR[0, 0] == pytest.approx(4.0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_kernel_that_was_there_first_keeps_its_blocks_for_the_wait(compiled: bool) -> None:
    # 0.3 s in which the transfer has no SM and the kernel runs as if alone; a shorter kernel is soon gone.
    group, arrived = beside_a_transfer(Beside(compute=2.0, transfer=4.0, wait=0.3), 1.3, compiled=compiled)
    assert group.compute_SR[0, 0] == pytest.approx(0.3 + 2.0) and arrived == pytest.approx(0.3 + 2.5)
    group, arrived = beside_a_transfer(Beside(compute=2.0, transfer=4.0, wait=0.3), 0.1, compiled=compiled)
    assert group.compute_SR[0, 0] == pytest.approx(0.1) and arrived == pytest.approx(1.1)


def test_a_transfer_slowed_by_compute_has_a_longer_span_and_the_parts_still_add_up() -> None:
    group = executor(1, beside=Beside(compute=1.0, transfer=2.0))
    parts = run(
        group,
        fork(layer=0),
        transfer("dispatch", "dispatch_exposed", (Barrier(1.0, 1, 1),), layer=0),
        op("shared", "shared_experts", 0.5, chain=SIDE),
        op("experts", "experts", 1.0),
    )
    # Beside half a second of compute a quarter of the transfer is done; three quarters are left behind it.
    assert parts["shared_experts"][0] == pytest.approx(0.5) and parts["dispatch_exposed"][0] == pytest.approx(0.75)
    assert group.compute_SR[0, 0] == pytest.approx(2.25)


def test_the_host_limits_small_kernels_and_a_readback_drains_the_queue() -> None:
    host = HostModel(forward_launch=1.0, backward_launch=1.0, readback=0.5)
    group = executor(1, host=host)
    parts = run(
        group,
        op("a", "attention", 0.1),
        op("b", "attention", 5.0),
        readback("counts", layer=0),
        op("c", "experts", 0.1),
    )
    # a: 1.0-1.1, b: 2.0-7.0, read back at 7.5, c issued at 8.5.
    assert group.compute_SR[0, 0] == pytest.approx(8.6)
    assert parts["host"][0] == pytest.approx(1.0 + 0.9 + 1.5)


def test_samples_do_not_touch_each_other() -> None:
    seconds_MSR = np.array([[[1.0, 2.0], [5.0, 0.5]]])
    group = executor(2, samples=2)
    run(group, op("experts", "experts", seconds_MSR), transfer("c", "combine_exposed", (Barrier(1.0, 2, 2),), layer=0))
    assert group.done_SR.tolist() == [[3.0, 3.0], [6.0, 6.0]]
