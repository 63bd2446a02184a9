"""What passes the ports of ranks beside transfers on a token's way, in the order of the clock.

A p2p send and a collective on gradients are let through when the clock has come to their end: all that is in their way
until then is known. Legend: S routing samples, R ranks of a group, W ranks of the world, K ports of a rank.
"""

from collections import defaultdict
from collections.abc import Generator, Sequence
from typing import NamedTuple

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.engine.executor import GroupExecutor
from moesim.engine.ports_in_use import NextKernel, PortsInUse
from moesim.engine.shared_links import TIE, Carried
from moesim.program.collectives import Reduction, last_arrivals
from moesim.program.step_program import GroupProgram, Place, SharedPorts
from moesim.schedules import P2P

FloatArray = NDArray[np.float64]


class _OnItsWay(NamedTuple):
    """A p2p send that is yet to pass: since when at least, and the kernel beside it."""

    since: float
    kernel: NextKernel


class StepPorts:
    """The ports of all groups of a step."""

    def __init__(self, env: simpy.Environment, shared: SharedPorts, *, compiled: bool) -> None:
        self._env, self._shared, self._compiled = env, shared, compiled
        self._in_use: dict[Place, PortsInUse] = {}
        self._executors: dict[Place, GroupExecutor] = {}
        self._over: dict[Place, simpy.Event] = {}  # its tasks are
        self.moving: dict[Place, simpy.Process] = {}  # of each group the latest transfer over shared links
        # Of each group the sends from and to it that are yet to pass, the groups that send to it and itself, and the
        # longest of these sends.
        self._on_way: defaultdict[Place, dict[tuple[P2P, int], _OnItsWay]] = defaultdict(dict)
        self._senders: defaultdict[Place, list[Place]] = defaultdict(list)
        self._longest: defaultdict[Place, float] = defaultdict(float)
        self._reduces_since: dict[Place, float] = {}  # its first collective on gradients that begins early
        for (source, target_rank), crossing in shared.crossings.items():
            target, longest = (target_rank, source[1]), float(crossing.work_R.max())
            self._senders[target].append(source)
            for place in (source, target):
                self._longest[place] = max(self._longest[place], longest)

    def add(self, group: GroupProgram, executor: GroupExecutor) -> None:
        """A group that takes part."""
        in_use = PortsInUse(
            self._shared.of_group[group.place], group, executor.recorder, executor.labels, compiled=self._compiled
        )
        self._in_use[group.place] = executor.ports = in_use
        self._executors[group.place] = executor
        self._over[group.place] = self._env.event()

    def before(self, group: GroupProgram) -> None:
        """The next action's transfers wait for sends that have the port for certain."""
        in_use, executor = self._in_use[group.place], self._executors[group.place]
        if in_use.moves_bytes:
            np.maximum(executor.communication_SR, in_use.held_SR, out=executor.communication_SR)

    def ended(self, group: GroupProgram, *, reduces: bool) -> None:
        """An action of the group has ended; `reduces`: collectives on gradients begin with its gradients."""
        place, in_use = group.place, self._in_use[group.place]
        in_use.ended()
        if reduces:
            self._reduces_since.setdefault(place, self._executors[place].last_begin)
        in_use.forget(self._since(place))

    def _since(self, place: Place) -> float:
        """No sooner than then anything begins that is yet to pass a group's ports.

        A send that is not made yet is made when an action is done that has begun.
        """
        times = [self._reduces_since.get(place, np.inf), self._executors[place].queued_since]
        times += [send.since for send in self._on_way[place].values()]
        times += [self._executors[sender].last_begin for sender in (place, *self._senders[place])]
        return min(times) - self._longest[place]

    def sent(self, group: GroupProgram, p2p: P2P, sent_SR: FloatArray) -> None:
        """A p2p send begins; the spans from now on are those beside it."""
        source, target = group.place, (p2p.target, group.number)
        if (source, p2p.target) in self._shared.crossings:
            send = _OnItsWay(float(sent_SR.min()), self._in_use[source].next_kernel)
            self._on_way[source][p2p, group.number] = self._on_way[target][p2p, group.number] = send

    def receive(self, group: GroupProgram, p2p: P2P, sent_SR: FloatArray, arrival_SR: FloatArray) -> Carried:
        """When a p2p send is there that would arrive at `arrival_SR` alone.

        All that is in its way until then is known once the clock is there.
        """
        source = p2p.source, group.number
        crossing = self._shared.crossings.get((source, group.pipeline_rank))
        if crossing is None:
            return arrival_SR
        ends = (self._in_use[source], crossing.sends_KR), (self._in_use[group.place], crossing.receives_KR)
        until = float(arrival_SR.max())
        if until > self._env.now * (1 + TIE):
            yield self._env.timeout(until - self._env.now)
        kernel, alone_SR = self._on_way[source][p2p, group.number].kernel, arrival_SR - sent_SR
        waits_SR = self._in_use[source].late_for_kernel(kernel, sent_SR, alone_SR, self._shared.sends)
        if waits_SR is not None:
            arrival_SR = arrival_SR + waits_SR
        begin_SR = arrival_SR - crossing.work_R
        late_SR, until = arrival_SR, float(arrival_SR.max())
        known = False
        while not known:
            if until > self._env.now * (1 + TIE):
                yield self._env.timeout(until - self._env.now)
            for moving in (self.moving.get(source), self.moving.get(group.place)):
                if moving is not None and moving.is_alive:
                    yield moving  # until then its end is not known
            for ports, shares_KR in ends:
                through_SR = ports.through(begin_SR, crossing.work_R, shares_KR)
                late_SR = late_SR if through_SR is None else np.maximum(late_SR, through_SR)
            until = float(late_SR.max())
            known = until <= self._env.now * (1 + TIE)
        for ports, shares_KR in ends:
            ports.let_through(begin_SR, late_SR, shares_KR)
        for place in (source, group.place):
            del self._on_way[place][p2p, group.number]
        self._in_use[source].hold(late_SR)
        return late_SR

    def end(self, group: GroupProgram) -> None:
        """The group has no tasks left."""
        self._over[group.place].succeed()

    def reduce(
        self, number: int, reduction: Reduction, groups: Sequence[GroupProgram], first_SW: FloatArray
    ) -> Generator[simpy.Event, None, FloatArray | None]:
        """How much later collective `number` is done, [S, W], that begins at `first_SW`; None: no later.

        Its groups have ended their tasks then, so that all that is in its way is known.
        """
        if not reduction.buckets or not reduction.seconds:
            return None
        yield self._env.all_of([self._over[group.place] for group in groups])
        passing = []
        for group in groups:
            first_SR = first_SW[:, group.ranks_R]
            member_R = np.isfinite(first_SR[0])
            shares_KR = self._in_use[group.place].ports.of_links(self._shared.shares_CX[number]) * member_R
            begin_SR = np.where(member_R, first_SR, first_SR[:, member_R].min())
            passing.append((group, begin_SR, reduction.seconds * member_R, shares_KR))
        late_SW, until = np.zeros_like(first_SW), float(first_SW.max()) + reduction.seconds
        known = False
        while not known:
            if until > self._env.now * (1 + TIE):  # p2p sends before then come first
                yield self._env.timeout(until - self._env.now)
            for group, begin_SR, work_R, shares_KR in passing:
                through_SR = self._in_use[group.place].through(begin_SR, work_R, shares_KR)
                if through_SR is not None:
                    late_SW[:, group.all_ranks_TR] = (through_SR - begin_SR - work_R)[:, None]
            late_SW = last_arrivals(reduction.members, late_SW)
            until = float((first_SW + late_SW).max()) + reduction.seconds
            known = until <= self._env.now * (1 + TIE)
        for group, begin_SR, work_R, shares_KR in passing:
            end_SR = begin_SR + work_R + late_SW[:, group.ranks_R]
            self._in_use[group.place].let_through(begin_SR, end_SR, shares_KR)
        return late_SW if late_SW.any() else None
