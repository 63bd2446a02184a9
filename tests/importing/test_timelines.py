"""Laws of a step's timeline, and of what wrappers put between its operations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_moe import small_step

from moesim.importing.recording import record_step
from moesim.kernels import KernelModel, kernel_model
from moesim.kernels.estimate import Beside, Contention
from moesim.program.scenario_fabric import node_fabric
from moesim.recorded.estimate import step_estimate
from moesim.recorded.host import HOST
from moesim.recorded.layers import in_order
from moesim.recorded.pricing import OPTIMIZER
from moesim.recorded.spread import DDP, FSDP2, Ranks
from moesim.recorded.step_file import RecordedOp
from moesim.recorded.timeline import Sent, Work, timeline

FREE = Contention(by_family={}, other=Beside(1.0), source="")
SLOWED = Contention(by_family={}, other=Beside(1.5, 2.0, 0.01), source="")
SIZE = {"sequences": 2, "length": 1024, "layers": 3, "experts": 16}


def sent(seconds: float) -> Sent:
    return Sent(name="all_reduce", seconds=seconds, num_bytes=1, ranks=2, wire_bytes=1)


@pytest.fixture(scope="module")
def ops() -> list[RecordedOp]:
    return record_step(*small_step(**SIZE))


@pytest.fixture(scope="module")
def kernels() -> KernelModel:
    return kernel_model("h100")


def spread(kernels: KernelModel, wrapper: str, ranks: int) -> Ranks:
    fabric = node_fabric(kernels, gpu="h100", ranks=ranks)
    return Ranks(wrapper=wrapper, fabric=fabric, ranks=tuple(range(ranks)))


@given(st.lists(st.tuples(st.floats(0.001, 1), st.floats(0, 1), st.floats(0.001, 2)), min_size=1, max_size=12))
def test_a_step_is_no_shorter_than_each_stream_and_no_longer_than_all(parts: list) -> None:
    """Every work sends one collective, for which the last one waits."""
    works = [Work(seconds=seconds, host_s=host, sends=(sent(sends),)) for seconds, host, sends in parts]
    works.append(Work(seconds=0.1, host_s=0.0, waits_for=tuple(range(len(parts)))))
    compute, host, wire = (sum(values) for values in zip(*parts, strict=True))
    for contention in (FREE, SLOWED):
        found = timeline(works, contention)
        assert found.step_s >= max(compute + 0.1, host, wire + 0.1) - 1e-9
        longest = 1.5 * compute + 2.0 * wire + host + 0.1 + 0.01 * len(parts)
        assert found.step_s <= longest + 1e-9
        assert all(0 <= exposed <= took + 1e-9 for exposed, took in zip(found.exposed_s, found.sent_s, strict=True))
    free = timeline(works, FREE)
    assert sum(free.sent_s) == pytest.approx(wire)
    assert free.step_s == pytest.approx(compute + 0.1 + free.host_late_s + _waiting(works, free), abs=1e-6)


def _waiting(works: list[Work], found) -> float:
    """Of the exposed seconds those in which no launch is awaited either."""
    return found.step_s - sum(work.seconds for work in works) - found.host_late_s


def test_a_host_that_reads_back_is_no_longer_ahead() -> None:
    ahead = [Work(seconds=0.1, host_s=0.01) for _ in range(10)]
    read = [Work(seconds=0.1, host_s=0.01, reads_back=number == 4) for number in range(10)]
    slow = [Work(seconds=0.1, host_s=0.2) for _ in range(10)]
    assert timeline(ahead, FREE).step_s == pytest.approx(1.0)
    assert 1.01 < timeline(read, FREE).step_s < 1.02
    assert timeline(slow, FREE).step_s == pytest.approx(2.0)


def test_every_operation_and_every_gradient_has_one_place_in_the_order(ops: list[RecordedOp]) -> None:
    blocks = in_order(ops)
    times = np.zeros(len(ops))
    for block in blocks:
        for place, count in block.runs:
            times[place] += count
    assert times == pytest.approx([op.count for op in ops])
    layers = [block.layer for block in blocks if block.layer >= 0]
    assert layers == [0, 1, 2, 2, 1, 0]
    whole = sum(op.count * np.prod(shape) for op in ops for shape in op.facts.get("gradients", ()))
    assert whole == next(op for op in ops if op.name == OPTIMIZER).facts["parameters"]


@pytest.mark.parametrize("ranks", [2, 4])
def test_wrappers_send_every_parameter(ops: list[RecordedOp], kernels: KernelModel, ranks: int) -> None:
    """DDP sums each gradient once; fully_shard gathers root once and layers twice, and scatters all once."""
    one = step_estimate(ops, kernels, host=HOST.times(0.0))
    optimizer = next(op for op in ops if op.name == OPTIMIZER)
    size = optimizer.reads[0][2]
    ddp, fsdp = (
        step_estimate(ops, kernels, host=HOST.times(0.0), ranks=spread(kernels, wrapper, ranks))
        for wrapper in (DDP, FSDP2)
    )
    assert sum(each.num_bytes for each in ddp.timeline.sent) == pytest.approx(size)
    bytes_of = {
        name: sum(each.num_bytes for each in fsdp.timeline.sent if each.name == name)
        for name in ("all_gather", "reduce_scatter")
    }
    assert bytes_of["reduce_scatter"] == pytest.approx(size)
    assert size < bytes_of["all_gather"] < 2 * size
    assert ddp.step_s > one.step_s
    assert max(fsdp.timeline.exposed_s) > 0, "the root is gathered before anything can hide it"
