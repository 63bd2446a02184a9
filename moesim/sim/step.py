"""One optimizer step as SimPy processes: a process per expert group and pipeline rank, events where they wait.

A process yields only where the order is not known beforehand: hand-offs between stages, and collectives that ranks of
other groups attend. An event's value is a vector of times, so vectors run ahead of the clock and nothing needs a
timeout; each hand-off has one writer and one reader, so results do not depend on the order of events.

Legend: S routing samples, R ranks of a group, W ranks of the world.
"""

from collections import defaultdict
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.parallel.schedules import Handoff
from moesim.results.spans import SpanRecorder, SpanTable
from moesim.sim.executor import GroupExecutor
from moesim.sim.operations import Run
from moesim.sim.program import GroupProgram, StepProgram, collective_label, handoff_label
from moesim.sim.reductions import Reduction, last_arrivals
from moesim.sim.walk import Labels

FloatArray = NDArray[np.float64]
Wait = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class StepOutcome:
    """The spans of every group and the duration of the step in every sample."""

    tables: tuple[SpanTable, ...]
    step_S: FloatArray


class _Meeting:
    """One collective: each group that takes part brings its times, all get everyone's."""

    def __init__(self, env: simpy.Environment, reduction: Reduction, groups: tuple[GroupProgram, ...]) -> None:
        self.reduction = reduction
        self.groups = [group for group in groups if reduction.ranks & set(group.ranks_R.tolist())]
        self.arrived = {id(group): env.event() for group in self.groups}
        self.everyone = env.all_of(list(self.arrived.values()))

    def attend(self, group: GroupProgram, executor: GroupExecutor) -> Wait:
        """Bring this group's times, wait for all, and go on when the collective is done."""
        reduction = self.reduction
        done_SR = executor.done_SR
        first_SR = done_SR
        if reduction.buckets:
            first_SR = executor.last_begin_SR + (done_SR - executor.last_begin_SR) / reduction.buckets
        first_SR = np.maximum(first_SR, executor.reduced_SR)  # one collective after the other
        self.arrived[id(group)].succeed((first_SR, np.maximum(done_SR, executor.reduced_SR)))
        yield self.everyone
        finish_SR = self._last(0)[:, group.ranks_R] + reduction.seconds
        if reduction.buckets:
            # The last bucket cannot begin before the last gradient is there.
            last_bucket = reduction.seconds / reduction.buckets
            finish_SR = np.maximum(finish_SR, self._last(1)[:, group.ranks_R] + last_bucket)
        executor.collective(collective_label(reduction), start_SR=first_SR, finish_SR=finish_SR, own=reduction.seconds)

    def _last(self, which: int) -> FloatArray:
        """[S, W]: the latest of the members' times, `which` = 0: first gradient there, 1: all of them."""
        values: list[Any] = [self.arrived[id(group)].value for group in self.groups]
        times_gSR = [value[which] for value in values]
        world = 1 + max(int(group.ranks_R.max()) for group in self.groups)
        ready_SW = np.full((len(times_gSR[0]), world), -np.inf)
        for group, times_SR in zip(self.groups, times_gSR, strict=True):
            ready_SW[:, group.ranks_R] = times_SR
        return last_arrivals(self.reduction.members, ready_SW)


class _Step:
    """The processes of one step and what they share."""

    def __init__(self, program: StepProgram) -> None:
        self.program = program
        self.env = simpy.Environment()
        self.handoffs: defaultdict[tuple[Handoff, int], simpy.Event] = defaultdict(self.env.event)
        self.reductions = [_Meeting(self.env, reduction, program.groups) for reduction in program.reductions]
        self.gathers = [_Meeting(self.env, gather, program.groups) for gather in program.gathers]

    def group(self, group: GroupProgram, executor: GroupExecutor) -> Wait:
        """The life of one expert group on one pipeline rank."""
        for task in group.tasks:
            arrived = []
            for handoff in task.receives:
                sent_SR, arrival_SR = yield self.handoffs[handoff, group.number]
                arrived.append((handoff_label(handoff), sent_SR, arrival_SR))
            executor.begin(arrived)
            executor.execute(task.runs)
            executor.recorder.end_action(task.passes, task.micro_batches)
            for sent in task.sends:
                finish_SR = executor.finished(sent.which)
                self.handoffs[sent.handoff, group.number].succeed((finish_SR, finish_SR + sent.seconds))
        for meeting in self.reductions:
            if id(group) in meeting.arrived:
                yield from meeting.attend(group, executor)
        executor.wait_for_reductions()
        executor.execute([Run(group.optimizer, -1, False)])
        for meeting in self.gathers:
            if id(group) in meeting.arrived:
                yield from meeting.attend(group, executor)


def simulate_step(program: StepProgram) -> StepOutcome:
    """Run one optimizer step; all samples advance in lockstep."""
    labels = Labels()
    step = _Step(program)
    executors, processes = [], []
    for group in program.groups:
        recorder = SpanRecorder(rows=program.rows(group), samples=program.samples, ranks=len(group.ranks_R))
        executor = GroupExecutor(
            samples=program.samples,
            ranks=len(group.ranks_R),
            host=program.host,
            slowdown=program.slowdown,
            recorder=recorder,
            labels=labels,
            compiled=program.compiled,
        )
        executors.append(executor)
        processes.append(step.env.process(step.group(group, executor)))
    step.env.run()
    assert all(process.processed for process in processes), "groups wait for each other"
    ends = [np.maximum(executor.done_SR, executor.reduced_SR).max(axis=1) for executor in executors]
    step_S = np.max(ends, axis=0)
    tables = tuple(
        executor.recorder.table(labels=labels.all(), ranks_R=group.ranks_R, step_S=step_S)
        for executor, group in zip(executors, program.groups, strict=True)
    )
    return StepOutcome(tables, step_S)
