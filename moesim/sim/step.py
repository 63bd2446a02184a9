"""One optimizer step as SimPy processes: a process per expert group, events where groups wait for each other.

Legend: S routing samples, R ranks of a group, W ranks of the world.
"""

from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.results.spans import Label, SpanRecorder, SpanTable, Stream
from moesim.sim.executor import GroupExecutor, Labels
from moesim.sim.program import GroupProgram, StepProgram
from moesim.sim.reductions import Reduction, last_arrivals

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class StepOutcome:
    """The spans of every expert group and the duration of the step in every sample."""

    tables: tuple[SpanTable, ...]
    step_S: FloatArray


class _Meeting:
    """The hand-off of one collective: each group brings its arrival times, all get everyone's."""

    def __init__(self, env: simpy.Environment, num_groups: int) -> None:
        self.arrived = [env.event() for _ in range(num_groups)]
        self.everyone = env.all_of(self.arrived)


def _attend(
    meeting: _Meeting, reduction: Reduction, program: StepProgram, number: int, executor: GroupExecutor
) -> Generator[Any, Any, None]:
    ready_SR = executor.done_SR
    meeting.arrived[number].succeed(ready_SR)
    yield meeting.everyone
    ready_SW = np.concatenate([event.value for event in meeting.arrived], axis=1)
    order_W = np.concatenate([group.ranks_R for group in program.groups])
    by_rank_SW = np.empty_like(ready_SW)
    by_rank_SW[:, order_W] = ready_SW
    last_SR = last_arrivals(reduction, by_rank_SW)[:, program.groups[number].ranks_R]
    label = Label(reduction.name, "data_parallel", Stream.COMMUNICATION, -1)
    executor.collective(label, start_SR=ready_SR, last_SR=last_SR, seconds=reduction.seconds)


def _group_process(
    program: StepProgram, number: int, executor: GroupExecutor, meetings: Sequence[_Meeting]
) -> Generator[Any, Any, None]:
    group: GroupProgram = program.groups[number]
    for block, micro_batch, backward in group.schedule:
        executor.execute(block, micro_batch, backward=backward)
    meeting = iter(meetings)
    for reduction in program.reductions:
        yield from _attend(next(meeting), reduction, program, number, executor)
    executor.execute(program.optimizer, -1, backward=False)
    for gather in program.gathers:
        yield from _attend(next(meeting), gather, program, number, executor)


def simulate_step(program: StepProgram) -> StepOutcome:
    """Run one optimizer step; all samples advance in lockstep."""
    env = simpy.Environment()
    labels = Labels()
    executors = [
        GroupExecutor(
            samples=program.samples,
            ranks=len(group.ranks_R),
            host=program.host,
            slowdown=program.slowdown,
            recorder=SpanRecorder(rows=program.rows(group), samples=program.samples, ranks=len(group.ranks_R)),
            labels=labels,
        )
        for group in program.groups
    ]
    collectives = len(program.reductions) + len(program.gathers)
    meetings = [_Meeting(env, len(executors)) for _ in range(collectives)]
    for number, executor in enumerate(executors):
        env.process(_group_process(program, number, executor, meetings))
    env.run()
    step_S = np.max([executor.done_SR.max(axis=1) for executor in executors], axis=0)
    tables = tuple(
        executor.recorder.table(labels=labels.all(), ranks_R=group.ranks_R, step_S=step_S)
        for executor, group in zip(executors, program.groups, strict=True)
    )
    return StepOutcome(tables, step_S)


def seconds_by_source(program: StepProgram) -> dict[str, float]:
    """Operation seconds of the step by what they rest on, summed over groups and averaged over samples and ranks."""
    total: defaultdict[str, float] = defaultdict(float)
    for group in program.groups:
        runs = Counter(block for block, _, _ in group.schedule)
        for block, times in [*runs.items(), (program.optimizer, 1)]:
            for operation in block.operations:
                if operation.seconds_MSR is not None:
                    total[operation.source] += times * float(operation.seconds_MSR.mean())
                elif operation.transfers_M:
                    alone = [float(prepared.alone_R.mean()) for prepared in operation.transfers_M]
                    total[operation.source] += times * float(np.mean(alone))
        for collective in (*program.reductions, *program.gathers):
            total[collective.source] += collective.seconds
    return dict(total)
