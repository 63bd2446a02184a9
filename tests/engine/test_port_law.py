"""A rank's ports have one capacity: whatever is open at once on them, in every schedule, algorithm and fabric."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.engine import simulate_step
from moesim.engine.ports_in_use import PortsInUse
from moesim.engine.step_ports import StepPorts
from moesim.kernels import BesideSend, kernel_model
from moesim.kernels.families import FAMILIES
from moesim.network import RankPorts, build_fabric
from moesim.network.rank_ports import Busy, Windows, passed, through
from moesim.parallel import TrafficSampler
from moesim.program import StepProgram, build_program
from moesim.program.contention import port_seconds
from moesim.program.operations import Kind
from moesim.run import obtain_trace
from moesim.scenario import Scenario
from moesim.scenario.cluster import Cluster, Pool
from moesim.seeding import stream

pytestmark = pytest.mark.usefixtures("few_tokens")

SLOW_NICS = {"cluster.nodes": 4}
STAGES = {"parallelism": {"data": 8, "expert": 8, "pipeline": 2}, "workload.global_batch": 64}
PER_NODE = {"dispatch.algorithm": "hierarchical", "dispatch.deduplicate": "per_node"}
LOW_LATENCY = {"dispatch.algorithm": "low_latency", "dispatch.deduplicate": "per_expert"}
BESIDE = {"overlap": {"gradient_reduction": True}}


def schedule(kind: str, **keys: object) -> dict[str, Any]:
    return {"parallelism.schedule": {"kind": kind, **keys}}


CASES: dict[str, dict[str, Any]] = {
    "1F1B": {**STAGES, **schedule("1f1b")},
    "interleaved": {**STAGES, **schedule("interleaved", virtual=2), **BESIDE, "model.layers": 4},
    "DualPipe": {**STAGES, **schedule("dualpipe"), **PER_NODE, "overlap.micro_batches": True},
    "gradients beside": {"parallelism": {"data": 16, "expert": 8}, "workload.global_batch": 64, **BESIDE},
    "ZeRO 3": {
        "parallelism": {"data": 16, "expert": 8, "zero": {"dense": 3, "expert": 0}},
        "workload.global_batch": 64,
    },
    "ZeRO 2, stages": {
        "parallelism": {"data": 8, "expert": 8, "pipeline": 2, "zero": {"dense": 2, "expert": 0}},
        "workload.global_batch": 64,
    },
    "one sided": {
        **STAGES,
        **schedule("1f1b"),
        "dispatch.algorithm": "low_latency",
        "dispatch.deduplicate": "per_expert",
    },
    "core at 4:1": {
        **STAGES,
        **schedule("1f1b"),
        "cluster.fabric": {"preset": "rail_optimised", "oversubscription": 4.0},
    },
    "tensor ranks": {
        "parallelism": {"data": 4, "expert": 8, "tensor": 2, "pipeline": 2},
        "workload.global_batch": 64,
        **schedule("1f1b"),
    },
}


def program_of(scenario: Scenario, *, samples: int = 2) -> StepProgram:
    sampler = TrafficSampler(scenario, obtain_trace(scenario))
    drawn = [sampler.draw(stream(0, "test", number)) for number in range(samples)]
    kernels, fabric = kernel_model("h200", "roofline"), build_fabric(scenario.cluster)
    return build_program(scenario, fabric=fabric, kernels=kernels, samples=drawn)


def simulated(
    program: StepProgram, monkeypatch: pytest.MonkeyPatch, *, forgets: bool = False
) -> tuple[Any, list[PortsInUse]]:
    """The step, and what was in use on the ports of every group; `forgets`: but for what was over.

    What came second is in `came_second` of each: begin, end and work alone [S, R], and its shares of the ports [K, R].
    """
    seen: list[PortsInUse] = []
    add, through = StepPorts.add, PortsInUse.through
    let_through, collective = PortsInUse.let_through, PortsInUse.collective

    def and_see(self, group, executor) -> None:
        add(self, group, executor)
        seen.append(executor.ports)
        executor.ports.came_second = []

    def through_and_see(self, begin_SR, work_SR, shares_KR):
        self.asked_SR = np.broadcast_to(work_SR, begin_SR.shape)
        return through(self, begin_SR, work_SR, shares_KR)

    def let_through_and_see(self, begin_SR, end_SR, shares_KR) -> None:
        let_through(self, begin_SR, end_SR, shares_KR)
        self.came_second.append((begin_SR, end_SR, self.asked_SR, shares_KR))

    def collective_and_see(self, prepared, begin_SR, own_SR):
        end_SR = collective(self, prepared, begin_SR, own_SR)
        self.came_second.append((begin_SR, end_SR, own_SR, self._shares[prepared]))
        return end_SR

    with monkeypatch.context() as patched:
        patched.setattr(StepPorts, "add", and_see)
        patched.setattr(PortsInUse, "through", through_and_see)
        patched.setattr(PortsInUse, "let_through", let_through_and_see)
        patched.setattr(PortsInUse, "collective", collective_and_see)
        if not forgets:
            patched.setattr(PortsInUse, "forget", lambda *_: None)
        return simulate_step(program), seen


def excess(program: StepProgram, outcome, in_use: list[PortsInUse]) -> tuple[float, int]:
    """The largest share by which what has to pass a port within an interval is longer than it; and what came second.

    A transfer on a token's way moves at a steady pace; what came second has passed between its begin and its end.
    """
    worst, second = 0.0, 0
    for group, table, used in zip(program.groups, outcome.tables, in_use, strict=True):
        blocks = dict.fromkeys(run.block for task in group.tasks for run in task.runs)
        transfers = {o.label: o.transfers_M for b in blocks for o in b.operations if o.kind is Kind.TRANSFER}
        steady, apart = [], used.came_second
        for row, number in enumerate(table.label_N):
            of_label = transfers.get(table.labels[number])
            if of_label:
                busy_SKR = port_seconds(of_label[table.micro_batch_N[row] % len(of_label)], used.ports)
                length_SR = np.maximum(table.own_NSR[row], busy_SKR.max(axis=1))
                steady.append((table.finish_NSR[row] - length_SR, table.finish_NSR[row], busy_SKR))
        second += len(apart)
        for sample in range(table.start_NSR.shape[1]):
            for rank in (0, len(group.ranks_R) - 1):
                for port in range(len(used.ports.link_KR)):
                    one = [
                        (o[sample, rank], c[sample, rank], b[min(sample, len(b) - 1), port, rank]) for o, c, b in steady
                    ]
                    two = [
                        (o[sample, rank], c[sample, rank], w[sample, rank] * s[port, rank])
                        for o, c, w, s in apart
                        if s[port, rank] > 0
                    ]
                    worst = max(worst, _excess(np.array(one).reshape(-1, 3), np.array(two).reshape(-1, 3)))
    return worst, second


def _excess(steady_N3: np.ndarray, apart_N3: np.ndarray) -> float:
    steady_N3 = steady_N3[steady_N3[:, 2] > 0]
    begins = np.unique(np.concatenate([steady_N3[:, 0], apart_N3[:, 0]]))
    worst = 0.0
    for begin in begins.tolist():
        ends = np.unique(np.concatenate([steady_N3[:, 1], apart_N3[:, 1]]))
        ends = ends[(ends > begin)][:40]
        if not len(ends) or not len(apart_N3):
            continue
        part = np.minimum(steady_N3[:, 1], ends[:, None]) - np.maximum(steady_N3[:, 0], begin)
        moved = (np.clip(part, 0, None) / (steady_N3[:, 1] - steady_N3[:, 0]) * steady_N3[:, 2]).sum(axis=1)
        inside = (apart_N3[:, 0] >= begin) & (apart_N3[:, 1] <= ends[:, None])
        total = moved + (inside * apart_N3[:, 2]).sum(axis=1)
        worst = max(worst, float(((total - (ends - begin)) / total.clip(1e-5)).max()))
    return worst


@pytest.mark.parametrize("name", CASES)
def test_no_port_passes_more_than_it_can_in_any_interval(name, small, monkeypatch):
    program = program_of(small({**SLOW_NICS, **CASES[name]}))
    assert program.ports is not None
    outcome, in_use = simulated(program, monkeypatch)
    if len(in_use) > len(program.groups):  # samples one after the other
        outcome = simulate_step(program)
        in_use = in_use[: len(program.groups)]
        outcome = type(outcome)(
            tuple(table.first_sample() for table in outcome.tables), outcome.step_S[:1], outcome.late_gSR
        )
    worst, second = excess(program, outcome, in_use)
    assert second > 0
    # Spans keep how long a transfer takes in single precision. Where core links are shared, too, kernels may yet make
    # the latest transfer a little longer when a message beside it has gone through.
    assert worst < (2e-3 if program.contention else 1e-5)


@pytest.mark.parametrize("name", CASES)
def test_what_is_forgotten_is_over(name, small, monkeypatch):
    """All that comes later begins behind it, so that the step is the same to the bit."""
    program = program_of(small({**SLOW_NICS, **CASES[name]}), samples=1)
    (whole, kept), (step, left) = (simulated(program, monkeypatch, forgets=forgets) for forgets in (False, True))
    for table, other in zip(whole.tables, step.tables, strict=True):
        np.testing.assert_array_equal(table.finish_NSR, other.finish_NSR)
    windows, fewer = (
        [len(each._moved) + len(each.passages) + len(each.collectives) for each in some] for some in (kept, left)
    )
    assert sum(fewer) < sum(windows)


def test_the_rest_of_a_port_by_hand():
    """2 s of work: 1 s alone, half of the port for 1 s, nothing for 1 s, and 0.5 s alone."""
    at = np.array([[0.0]])
    opens_WSR, closes_WSR = np.array([[[1.0]], [[2.0]]]), np.array([[[2.0]], [[3.0]]])
    uses_WSR = np.array([[[0.5]], [[1.0]]])

    def end(share: float, *, compiled: bool) -> float:
        windows = {"opens_WSR": opens_WSR, "closes_WSR": closes_WSR, "uses_WSR": uses_WSR}
        return float(passed(at, at + 2.0, np.array([share]), **windows, compiled=compiled)[0, 0])

    for compiled in (False, True):
        assert end(1.0, compiled=compiled) == 3.5
        assert end(0.5, compiled=compiled) == 2.0  # beside half of the port there is room for its half
        assert end(0.0, compiled=compiled) == 2.0


def test_loops_and_arrays_give_the_same_end():
    rng = np.random.default_rng(0)
    for _ in range(50):
        windows = int(rng.integers(1, 7))
        opens_WSR = 3 * rng.random((windows, 2, 5))
        uses_WSR = rng.random((windows, 2, 5)) * (rng.random((windows, 2, 5)) > 0.2)
        what = rng.random((2, 5)), rng.random((2, 5)), np.where(rng.random(5) > 0.2, rng.random(5), 0.0)
        beside = {"opens_WSR": opens_WSR, "closes_WSR": opens_WSR + rng.random((windows, 2, 5)), "uses_WSR": uses_WSR}
        np.testing.assert_array_equal(passed(*what, **beside, compiled=True), passed(*what, **beside))


def test_loops_and_arrays_let_through_and_forget_the_same():
    """Windows of transfers, none, and those of what came second; what is over by then changes nothing."""
    shape, forgotten = (2, 3, 5), 0
    for seed in range(30):
        ends = []
        for compiled in (False, True):
            rng = np.random.default_rng(seed)
            busy, moved, apart = Busy(shape), Windows(shape, backwards=True), Windows(shape)
            for _ in range(4):
                busy.add(rng.random(shape) * (rng.random(shape) > 0.4))
            start_NSR = np.sort(4 * rng.random((20, 2, 5)), axis=0)
            spans = start_NSR, start_NSR + rng.random((20, 2, 5)), rng.random((20, 2, 5)).astype(np.float32)
            moved.add_transfers(np.arange(20), rng.integers(0, 4, 20), spans, busy, compiled=compiled)
            for begin_SR in 4 * rng.random((20, 2, 5)):
                shares_KR = rng.random((3, 5)) * (rng.random((3, 1)) > 0.5)
                apart.add(begin_SR, begin_SR + rng.random((2, 5)), shares_KR, compiled=compiled)
            begin_SR, work_R, shares_KR = 2 + rng.random((2, 5)), rng.random(5), rng.random((3, 5)) * [[1], [0], [1]]
            sets = moved, Windows(shape), apart
            ends.append(through(begin_SR, work_R, shares_KR, sets, compiled=compiled))
            for windows in sets:
                windows.forget(float(begin_SR.min()))
            forgotten += 40 - len(moved) - len(apart)
            np.testing.assert_array_equal(through(begin_SR, work_R, shares_KR, sets, compiled=compiled), ends[-1])
        assert ends[0] is not None
        np.testing.assert_array_equal(*ends)
    assert forgotten > 0


def test_every_port_has_one_owner_and_both_directions():
    fabric = build_fabric(Cluster(pools=(Pool(gpu="h200", nodes=2, gpus_per_node=8),)))
    links_KW = fabric.port_links_KW
    assert links_KW.shape[0] == 4
    assert len(np.unique(links_KW)) == links_KW.size
    assert not set(links_KW.ravel().tolist()) & set(fabric.common_links_X.tolist())


@pytest.mark.parametrize("avoids", [False, True])
def test_seconds_of_ports_are_those_of_the_bytes(avoids):
    """One message inside a node and one across: NVLink, or NICs."""
    fabric = build_fabric(Cluster(pools=(Pool(gpu="h200", nodes=2, gpus_per_node=8),)))
    ports, rate = RankPorts(fabric, np.arange(16)), dict(zip(fabric.tier_X, fabric.capacity_X, strict=True))
    busy_KR = ports.seconds(np.array([0, 0]), np.array([1, 8]), np.array([[6e9, 3e9]]), avoid_nvlink=avoids)[0]
    near, far = (0.0, 9e9) if avoids else (6e9, 3e9)
    np.testing.assert_allclose(sorted(busy_KR[:, 0])[-2:], sorted([near / rate["nvlink"], far / rate["nic"]]))
    assert busy_KR.sum() == pytest.approx(2 * (near / rate["nvlink"] + far / rate["nic"]))


def test_what_is_alone_on_its_ports_is_there_to_the_bit(small, monkeypatch):
    """Experts inside nodes, stages on different ones: NVLink and NICs do not meet."""
    program = program_of(small({**SLOW_NICS, "parallelism": {"data": 4, "expert": 4, "pipeline": 2}}))
    outcome, in_use = simulated(program, monkeypatch)
    assert any(used.passages for used in in_use)
    np.testing.assert_array_equal(outcome.step_S, simulate_step(_alone(program)).step_S)


def _alone(program: StepProgram) -> StepProgram:
    return replace(program, ports=None)


def test_messages_beside_dispatch_make_steps_longer(small):
    slow = {"cluster.fabric": {"preset": "rail_optimised", "nic": "40 Gbps"}}
    many = {"model.layers": 4, "workload.global_batch": 128}
    program = program_of(small({**SLOW_NICS, **CASES["1F1B"], **slow, **many}))
    assert (simulate_step(program).step_S > simulate_step(_alone(program)).step_S).all()


def test_messages_wait_for_the_kernel_beside_them(small):
    """By its family's facts, where they were measured; a sender that stands still has no kernel."""
    program = program_of(small({**SLOW_NICS, "parallelism": {"data": 4, "expert": 4, "pipeline": 2}}))
    facts = {family: BesideSend(1.0, 0.7, 2.1) for family in FAMILIES}
    assert program.ports is not None
    measured = replace(program, ports=replace(program.ports, sends=facts))
    without, with_them = simulate_step(program), simulate_step(measured)
    assert (with_them.step_S > without.step_S).all()
    alone = max(sent.seconds for group in program.groups for task in group.tasks for sent in task.sends)
    sends = sum(len(task.sends) for group in program.groups for task in group.tasks)
    assert (with_them.step_S < without.step_S + sends * 2.1 * alone).all()
