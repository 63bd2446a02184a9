"""Collectives on gradients and parameters as SimPy processes: each group that takes part brings its times.

Legend: S routing samples, R ranks of a group, W ranks of the world.
"""

from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.engine.conditions import Conditions, Wait
from moesim.engine.executor import GroupExecutor
from moesim.engine.lateness import ALONE, Among
from moesim.engine.shared_links import Carried, SharedLinks
from moesim.engine.step_ports import StepPorts
from moesim.kernels import Beside, slowed_at, wait_of
from moesim.network.contention import LinkUse
from moesim.program.collectives import Reduction, last_arrivals
from moesim.program.contention import TINY
from moesim.program.step_program import GroupProgram, StepProgram, collective_label

FloatArray = NDArray[np.float64]


class Early(NamedTuple):
    """A collective that a group attended while it had tasks left: when it began and was done, [S, R]."""

    reduction: Reduction
    start_SR: FloatArray
    finish_SR: FloatArray
    own: FloatArray | float


class Meeting:
    """One collective: each group that takes part brings its times, all get everyone's.

    `shared_links` and `use`: the overloaded links that it uses, if any.
    """

    def __init__(
        self,
        env: simpy.Environment,
        reduction: Reduction,
        groups: tuple[GroupProgram, ...],
        *,
        shared_links: SharedLinks | None,
        use: LinkUse | None,
        beside: Beside,
        conditions: Conditions | None = None,
        seconds: tuple[float, ...] = (),
        among: Among = ALONE,
        ports: StepPorts | None = None,
        number: int = 0,
    ) -> None:
        self.reduction, self.beside = reduction, beside
        self.ports, self.number = ports, number
        self.conditions, self.seconds = conditions, seconds or (reduction.seconds,)
        self.among = among
        self.longer: FloatArray | float = 0.0  # [S, W]: than on links as they are before the step
        self.groups = [group for group in groups if reduction.ranks & set(group.ranks_R.tolist())]
        self.arrived = {id(group): env.event() for group in self.groups}
        self.everyone: simpy.Event = env.all_of(list(self.arrived.values()))
        self.over: simpy.Event = env.process(self._hold(shared_links, use))

    def attend(self, group: GroupProgram, executor: GroupExecutor) -> Wait:
        """Bring this group's times, wait for all, and go on when the collective is done."""
        reduction = self.reduction
        done_SR, lateness = executor.done_SR, executor.lateness
        late_SR = 0.0 if lateness is None else lateness.among_groups(done_SR, self.among)
        start_SR, finish_SR = yield from self._meet(group, executor, executor.last_begin_SR, done_SR, late_SR)
        own = self.own_seconds(group)
        executor.collective(collective_label(reduction), start_SR=start_SR, finish_SR=finish_SR, own=own)

    def attend_early(
        self, group: GroupProgram, executor: GroupExecutor, begin_SR: FloatArray, done_SR: FloatArray
    ) -> Generator[simpy.Event, Any, Early]:
        """Meet while the group goes on: its gradients were made from `begin_SR` to `done_SR`."""
        start_SR, executor.reduced_SR = yield from self._meet(group, executor, begin_SR, done_SR)
        return Early(self.reduction, start_SR, executor.reduced_SR, self.own_seconds(group))

    def own_seconds(self, group: GroupProgram) -> FloatArray | float:
        """What it takes once all are there."""
        longer = self.longer
        return self.reduction.seconds + (longer[:, group.ranks_R] if isinstance(longer, np.ndarray) else longer)

    def _meet(
        self,
        group: GroupProgram,
        executor: GroupExecutor,
        begin_SR: FloatArray,
        done_SR: FloatArray,
        late_SR: FloatArray | float = 0.0,
    ) -> Generator[simpy.Event, Any, tuple[FloatArray, FloatArray]]:
        """When the collective begins for each rank of the group, and when it is done.

        `late_SR`: how much later than by its own work the slowest rank of all is done.
        """
        reduction = self.reduction
        first_SR = done_SR
        if reduction.buckets:
            first_SR = begin_SR + (done_SR - begin_SR) / reduction.buckets
        first_SR = np.maximum(first_SR, executor.reduced_SR)  # one collective after the other
        first = first_SR if reduction.buckets else first_SR + late_SR
        self.arrived[id(group)].succeed((first, np.maximum(done_SR + late_SR, executor.reduced_SR)))
        finish_SW = yield self.over
        return first_SR, finish_SW[:, group.ranks_R]

    def _hold(self, shared_links: SharedLinks | None, use: LinkUse | None) -> Carried:
        """Wait for all; gives when each rank is done, [S, W]."""
        yield self.everyone
        finish_SW = yield from self._held(shared_links, use)
        if self.ports is not None:
            late_SW = yield from self.ports.reduce(self.number, self.reduction, self.groups, self._last(0))
            if late_SW is not None:
                self.longer = self.longer + late_SW
                finish_SW = finish_SW + late_SW
        return finish_SW

    def _held(self, shared_links: SharedLinks | None, use: LinkUse | None) -> Carried:
        """All are there: the same but for what their ports are busy with."""
        reduction = self.reduction
        if self.conditions is not None:
            return (yield from self._hold_on_clock(self.conditions))
        finish_SW = self._last(0) + reduction.seconds
        if reduction.buckets:
            finish_SW = self._beside_kernels(self._last(0), self._last(1))
        if shared_links is not None and use is not None:
            member_W = np.isfinite(finish_SW[0])
            finish_SW[:, member_W] = yield from shared_links.carry_equal(finish_SW[:, member_W], reduction.seconds, use)
        return finish_SW

    def _beside_kernels(self, first_SW: FloatArray, done_SW: FloatArray) -> FloatArray:
        """When a collective in buckets is done that may begin at `first_SW`, while kernels run to `done_SW`.

        While both run, each does a part of its work: for `both_SW` seconds. What the kernels lose is in the end of the
        last bucket, which cannot begin before the last gradient is there. Members that take no part have -inf.
        """
        seconds, (compute, transfer, _) = self.reduction.seconds, self.beside
        with np.errstate(invalid="ignore"):
            kernels_SW = np.maximum(np.nan_to_num(done_SW - first_SW), 0.0)
        both_SW = np.minimum(seconds * transfer, kernels_SW * compute)
        finish_SW = first_SW + seconds + both_SW * (1.0 - 1.0 / transfer)
        last_SW = done_SW + both_SW * (1.0 - 1.0 / compute) + seconds / self.reduction.buckets
        return np.asarray(np.maximum(finish_SW, last_SW))

    def _hold_on_clock(self, conditions: Conditions) -> Carried:
        """The same while links may change."""
        reduction, first_SW, last_SW = self.reduction, self._last(0), self._last(1)
        member_W = np.isfinite(first_SW[0])
        finish_SW = first_SW.copy()

        def walk() -> FloatArray:
            ends_SW = conditions.seconds(first_SW[:, member_W], self.seconds)
            plain_SW = first_SW[:, member_W] + reduction.seconds
            if reduction.buckets:
                share = 1.0 / reduction.buckets
                plain_SW = self._beside_kernels(first_SW[:, member_W], last_SW[:, member_W])
                ends_SW = np.maximum(ends_SW, conditions.seconds(last_SW[:, member_W], self.seconds, share=share))
                ends_SW = np.maximum(ends_SW, plain_SW)
            finish_SW[:, member_W] = ends_SW
            self.longer = np.zeros_like(finish_SW)
            self.longer[:, member_W] = ends_SW - plain_SW
            return ends_SW

        yield from conditions.settle(walk, lambda: None)
        return finish_SW

    def _last(self, which: int) -> FloatArray:
        """[S, W]: the latest of the members' times, `which` = 0: first gradient there, 1: all of them."""
        values: list[Any] = [self.arrived[id(group)].value for group in self.groups]
        times_gSR = [value[which] for value in values]
        world = 1 + max(int(group.all_ranks_TR.max()) for group in self.groups)
        ready_SW = np.full((len(times_gSR[0]), world), -np.inf)
        for group, times_SR in zip(self.groups, times_gSR, strict=True):
            ready_SW[:, group.all_ranks_TR] = times_SR[:, None]
        return last_arrivals(self.reduction.members, ready_SW)


def beside_kernels(program: StepProgram, collective: Reduction) -> Beside:
    """What kernels and this collective on gradients cost each other."""
    facts, rate = program.beside_reductions, collective.sent_bytes / max(collective.seconds, TINY)
    return facts._replace(
        transfer=slowed_at(facts.transfer, rate=rate, measured_rate=program.collective_rate),
        wait=float(wait_of(facts.wait, alone=collective.seconds)),
    )
