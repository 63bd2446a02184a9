"""One optimizer step as SimPy processes: a process per expert group and pipeline rank, events where they wait.

A process yields only where the order is not known beforehand: p2p sends between stages, and collectives that ranks of
other groups attend. An event's value is a vector of times, so vectors run ahead of the clock and nothing needs a
timeout; each p2p send has one writer and one reader, so results do not depend on the order of events.

Where speeds or links change (`moesim.engine.conditions`) an action ends only when the clock has come to its end.
Where groups can fill links together (`moesim.program.contention`), processes also wait for the windows of transfers
over these links to open and to close, and those that are open at once slow each other. Routing samples are then
simulated one after the other.

Legend: S routing samples, R ranks of a group, W ranks of the world, L overloaded links.
"""

from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.engine.conditions import Conditions, Wait
from moesim.engine.executor import GroupExecutor
from moesim.engine.executor_steps import Labels
from moesim.engine.lateness import Among
from moesim.engine.meetings import Early, Meeting, beside_kernels
from moesim.engine.shared_links import Carried, SharedLinks
from moesim.engine.step_ports import StepPorts
from moesim.kernels.jitter import NO_JITTER
from moesim.network.contention import LinkUse
from moesim.program.contention import samples_of
from moesim.program.operations import Run
from moesim.program.step_program import (
    GroupProgram,
    Sent,
    SharedPart,
    StepProgram,
    collective_label,
    p2p_label,
)
from moesim.results.span_sums import GroupSums, LabelBook, SpanSums, SummingRecorder
from moesim.results.spans import SpanRecorder, SpanTable, Stream
from moesim.schedules import P2P

FloatArray = NDArray[np.float64]

KEPT_SPANS = 30e6  # of sample 0 that are kept whole, 20 bytes each


@dataclass(frozen=True)
class StepOutcome:
    """The spans of every group and the duration of the step in every sample.

    `late_gSR`: of every group the seconds [S, R] by which meetings began later for jitter; empty where ranks are alike.
    """

    tables: tuple[SpanTable, ...]
    step_S: FloatArray
    late_gSR: tuple[FloatArray, ...] = ()


class SummedStep(NamedTuple):
    """What the spans of every group come to, and the duration of the step in every sample; `late_gSR` as there.

    `tables`: the spans of sample 0, where they were asked for, in some groups those since the last action began;
    `whole(which)` then gives all, of that group of every pipeline rank.
    """

    step_S: FloatArray
    sums: tuple[GroupSums, ...]
    late_gSR: tuple[FloatArray, ...]
    tables: tuple[SpanTable, ...]
    whole: Callable[[int], Sequence[SpanTable]] | None = None


class _Step:
    """The processes of one step and what they share."""

    def __init__(self, program: StepProgram) -> None:
        self.program = program
        self.env = simpy.Environment()
        shapes = [group.all_ranks_TR.shape for group in program.groups]  # equal groups of every one, and its ranks
        self.among = Among(sum(num * ranks for num, ranks in shapes), sum(num for num, _ in shapes))
        self.p2ps: defaultdict[tuple[P2P, int], simpy.Event] = defaultdict(self.env.event)
        self.contention = contention = program.contention
        self.shared_links = SharedLinks(self.env, contention.capacity_L) if contention else None
        collectives = (*program.reductions, *program.gathers)
        uses = contention.collectives if contention else (None,) * len(collectives)
        changes = program.changes
        self.conditions = Conditions(self.env, changes) if changes else None
        self.ports = StepPorts(self.env, program.ports, compiled=program.compiled) if program.ports else None
        seconds = changes.collective_seconds if changes else ((),) * len(collectives)
        meetings = [
            Meeting(
                self.env,
                collective,
                program.groups,
                shared_links=self.shared_links,
                use=use,
                beside=beside_kernels(program, collective),
                conditions=self.conditions,
                seconds=by_state,
                among=self.among,
                ports=self.ports,
                number=number,
            )
            for number, (collective, use, by_state) in enumerate(zip(collectives, uses, seconds, strict=True))
        ]
        self.reductions, self.gathers = meetings[: len(program.reductions)], meetings[len(program.reductions) :]

    def group(self, group: GroupProgram, executor: GroupExecutor) -> Wait:
        """The life of one expert group on one pipeline rank."""
        due: defaultdict[int, list[Meeting]] = defaultdict(list)
        for meeting in self.reductions:
            if id(group) in meeting.arrived:
                due[group.begins_behind(meeting.reduction)].append(meeting)
        reducing: simpy.Event | None = None
        for number, task in enumerate(group.tasks):
            arrived = []
            for p2p in task.receives:
                sent_SR, arrival_SR = yield self.p2ps[p2p, group.number]
                if self.ports is not None:
                    arrival_SR = yield from self.ports.receive(group, p2p, sent_SR, arrival_SR)
                arrived.append((p2p_label(p2p), sent_SR, arrival_SR))
            is_last = number == len(group.tasks) - 1
            if is_last:
                executor.recorder.stay()
            executor.begin(arrived)
            if self.ports is not None:
                self.ports.before(group)
            yield from self._execute(group, executor, task.runs)
            executor.recorder.end_action(task.passes, task.micro_batches)
            if self.ports is not None:
                self.ports.ended(group, reduces=number in due)
            for sent in task.sends:
                finish_SR = executor.finished(sent.which)
                if self.ports is not None:
                    self.ports.sent(group, sent.p2p, finish_SR)
                self._send(group, sent, finish_SR)
            if number in due and not is_last:
                times = executor.last_begin_SR, executor.done_SR
                reducing = self.env.process(self._reduce_early(group, executor, due[number], times, reducing))
            if not is_last:
                executor.pass_on()
        executor.settle_collectives()
        if self.ports is not None:
            self.ports.end(group)
        yield from self._reduce(group, executor, due[len(group.tasks) - 1], reducing)
        if not due[len(group.tasks) - 1]:
            executor.meet_others(self.among)
        executor.wait_for_reductions()
        yield from self._execute(group, executor, [Run(group.optimizer, -1, False)])
        for meeting in self.gathers:
            if id(group) in meeting.arrived:
                yield from meeting.attend(group, executor)

    def _reduce_early(
        self,
        group: GroupProgram,
        executor: GroupExecutor,
        meetings: Sequence[Meeting],
        times: tuple[FloatArray, FloatArray],
        before: simpy.Event | None,
    ) -> Generator[simpy.Event, Any, list[Early]]:
        """Collectives beside later tasks, behind those of `before`; gives all of them."""
        done: list[Early] = [] if before is None else (yield before)
        for meeting in meetings:
            early = yield from meeting.attend_early(group, executor, *times)
            done = [*done, early]
        return done

    def _reduce(
        self,
        group: GroupProgram,
        executor: GroupExecutor,
        meetings: Sequence[Meeting],
        before: simpy.Event | None,
    ) -> Wait:
        """Collectives with no task left, behind those that began early, which are recorded only now.

        So the rows are in the same order whenever the others come.
        """
        done: list[Early] = [] if before is None else (yield before)
        for reduction, start_SR, finish_SR, own in done:
            labels = collective_label(reduction, Stream.BACKGROUND), collective_label(reduction)
            executor.early_collective(labels, start_SR=start_SR, finish_SR=finish_SR, own=own)
        for meeting in meetings:
            yield from meeting.attend(group, executor)

    def _execute(self, group: GroupProgram, executor: GroupExecutor, runs: Sequence[Run]) -> Wait:
        """Do one action; its transfers over overloaded links take as long as the shared links let them."""
        if self.conditions is not None:
            restore = executor.saved()

            def walk() -> FloatArray:
                executor.execute(runs)
                return executor.done_SR

            yield from self.conditions.settle(walk, restore)
            return
        uses = self.contention.transfers.get(group.place) if self.contention else None
        if uses is None or self.shared_links is None:
            executor.execute(runs)
            return
        for chain, transfer, start_SR, finish_SR in executor.execute_in_parts(runs):
            if transfer in uses:
                carried = self.env.process(self._carry(uses[transfer], start_SR, finish_SR))
                if self.ports is not None:
                    self.ports.moving[group.place] = carried
                late_SR = yield carried
                if (late_SR > finish_SR).any():
                    executor.delay(chain, late_SR)

    def _carry(self, parts: Sequence[SharedPart], start_SR: FloatArray, finish_SR: FloatArray) -> Carried:
        """Put a transfer, or several side by side, through the shared links; returns when the ranks are done."""
        assert self.shared_links is not None
        carried = [
            self.env.process(
                self.shared_links.carry(part.transfer.window(start_SR[:, at_R]), part.use, finish_SR[:, at_R])
            )
            for part in parts
            for at_R in (part.places_R,)
        ]
        yield self.env.all_of(carried)
        late_SR = finish_SR.copy()
        for part, process in zip(parts, carried, strict=True):
            late_SR[:, part.places_R] = process.value
        return late_SR

    def _send(self, group: GroupProgram, sent: Sent, finish_SR: FloatArray) -> None:
        """Hand over what was ready at `finish_SR`."""
        handed = self.p2ps[sent.p2p, group.number]
        if self.conditions is not None:
            self.env.process(_deliver_on_clock(self.conditions, handed, finish_SR, sent))
            return
        arrival_SR = finish_SR + sent.seconds
        use = self.contention.p2ps.get((group.place, sent.p2p.target)) if self.contention else None
        if use is None or self.shared_links is None:
            handed.succeed((finish_SR, arrival_SR))
        else:
            self.env.process(_deliver(self.shared_links, handed, finish_SR, arrival_SR, sent.seconds, use))


def _deliver(
    shared_links: SharedLinks,
    handed: simpy.Event,
    finish_SR: FloatArray,
    arrival_SR: FloatArray,
    seconds: float,
    use: LinkUse,
) -> Wait:
    """A p2p send over overloaded links."""
    late_SR = yield from shared_links.carry_equal(arrival_SR, seconds, use)
    handed.succeed((finish_SR, late_SR))


def _deliver_on_clock(conditions: Conditions, handed: simpy.Event, finish_SR: FloatArray, sent: Sent) -> Wait:
    """A p2p send over links that may change."""
    arrival_SR = finish_SR.copy()

    def walk() -> FloatArray:
        arrival_SR[:] = conditions.seconds(finish_SR, sent.by_state or (sent.seconds,))
        return arrival_SR

    yield from conditions.settle(walk, lambda: None)
    handed.succeed((finish_SR, arrival_SR))


def simulate_step(program: StepProgram) -> StepOutcome:
    """Run one optimizer step; all samples advance in lockstep, or one after the other where groups slow each other."""
    labels = Labels()
    if program.contention is None:
        return _simulate_whole(program, labels)
    outcomes = [_simulate_whole(sample, labels) for sample in samples_of(program)]
    step_S = np.concatenate([outcome.step_S for outcome in outcomes])
    tables = (_side_by_side(tables, step_S) for tables in zip(*(outcome.tables for outcome in outcomes), strict=True))
    late_gSR = tuple(np.concatenate(late) for late in zip(*(outcome.late_gSR for outcome in outcomes), strict=True))
    return StepOutcome(tuple(tables), step_S, late_gSR)


def sum_step(program: StepProgram, *, first: bool) -> SummedStep:
    """Run one optimizer step for the sums of its spans; `first`: also for the spans of sample 0 and who waited in it.

    Large steps never hold all of their spans (`StepProgram.passes_spans_on`): those of sample 0 are kept, where these
    are too many (KEPT_SPANS) of groups with number 0, and others are simulated again when they are asked for.
    """
    if not program.passes_spans_on:
        step = simulate_step(program)
        sums = [GroupSums.of(table, compiled=program.compiled, with_waits=first) for table in step.tables]
        return SummedStep(step.step_S, tuple(sums), step.late_gSR, step.tables)
    labels = Labels()
    numbers = {group.number for group in program.groups}
    spans = sum(program.rows(group) * len(group.ranks_R) for group in program.groups)
    kept = (numbers if spans <= KEPT_SPANS else {0}) if first else set()
    recorders = _passing_recorders(program, labels, kept=kept, with_waits=first)
    step_S, late_gSR = _simulate(program, labels, recorders)
    sums = [recorder.last(step_S) for recorder in recorders]
    tables = _tables(program, labels, recorders, step_S) if first else ()
    return SummedStep(step_S, tuple(sums), late_gSR, tables, lambda which: _again(program, which))


def _passing_recorders(
    program: StepProgram, labels: Labels, *, kept: set[int], with_waits: bool
) -> list[SummingRecorder]:
    """Recorders that pass spans on; `kept`: the numbers of groups whose spans of sample 0 they keep."""
    recorders, book = [], LabelBook(labels.all)
    most = max(program.rows_at_once(group) for group in program.groups)
    rooms: dict[int, SpanRecorder] = {}  # by ranks of a group
    for group in program.groups:
        ranks = len(group.ranks_R)
        if ranks not in rooms:
            rooms[ranks] = SpanRecorder(rows=most, samples=program.samples, ranks=ranks)
        whole = None
        if group.number in kept:
            whole = SpanRecorder(rows=program.rows(group), samples=1, ranks=ranks)
        sums = SpanSums(group.ranks_R, samples=program.samples, book=book, with_waits=with_waits)
        rows = program.rows_of_last(group)
        recorders.append(SummingRecorder(rows=rows, sums=sums, room=rooms[ranks], kept=whole))
    return recorders


def _tables(
    program: StepProgram, labels: Labels, recorders: Sequence[SpanRecorder], step_S: FloatArray
) -> tuple[SpanTable, ...]:
    return tuple(
        recorder.table(labels=labels.all(), ranks_R=group.ranks_R, step_S=step_S)
        for recorder, group in zip(recorders, program.groups, strict=True)
    )


def _again(program: StepProgram, which: int) -> tuple[SpanTable, ...]:
    """All spans of sample 0 in group number `which` of each pipeline rank, but for collectives between groups.

    All samples are simulated again: together they decide in which order they are let through ports.
    """
    number = list(dict.fromkeys(group.number for group in program.groups))[which]
    groups = tuple(group for group in program.groups if group.number == number)
    alone, labels = replace(program, groups=groups, reductions=(), gathers=()), Labels()
    recorders = _passing_recorders(alone, labels, kept={number}, with_waits=False)
    step_S, _ = _simulate(alone, labels, recorders)
    for recorder in recorders:
        recorder.last(step_S)
    return _tables(alone, labels, recorders, step_S)


def _simulate_whole(program: StepProgram, labels: Labels) -> StepOutcome:
    recorders = [
        SpanRecorder(rows=program.rows(group), samples=program.samples, ranks=len(group.ranks_R))
        for group in program.groups
    ]
    step_S, late_gSR = _simulate(program, labels, recorders)
    return StepOutcome(_tables(program, labels, recorders, step_S), step_S, late_gSR)


def _simulate(
    program: StepProgram, labels: Labels, recorders: Sequence[SpanRecorder]
) -> tuple[FloatArray, tuple[FloatArray, ...]]:
    """The step's duration and `StepOutcome.late_gSR`; the recorder of each group gets its spans."""
    step = _Step(program)
    executors, processes = [], []
    for group, recorder in zip(program.groups, recorders, strict=True):
        executor = GroupExecutor(
            samples=program.samples,
            ranks=len(group.ranks_R),
            host=program.host,
            beside_R=group.beside_R,
            recorder=recorder,
            labels=labels,
            compiled=program.compiled,
            beside_collectives_R=group.beside_collectives_R,
            collective_rate=program.collective_rate,
            conditions=step.conditions,
            ranks_R=group.ranks_R,
            jitter=NO_JITTER if step.among.ranks == 1 else program.jitter,
        )
        executor.records_all = program.contention is not None
        if step.ports is not None:
            step.ports.add(group, executor)
        executors.append(executor)
        processes.append(step.env.process(step.group(group, executor)))
    step.env.run()
    assert all(process.processed for process in processes), "groups wait for each other"
    ends = [np.maximum(executor.done_SR, executor.reduced_SR).max(axis=1) for executor in executors]
    late_gSR = tuple(executor.lateness.total_SR for executor in executors if executor.lateness is not None)
    return np.asarray(np.max(ends, axis=0)), late_gSR


def _side_by_side(tables: Sequence[SpanTable], step_S: FloatArray) -> SpanTable:
    """One group's spans in several samples: the same rows, each with times of its own."""
    first = tables[0]
    if len(tables) == 1:
        return first
    assert all((table.label_N == first.label_N).all() for table in tables)
    return replace(
        first,
        labels=tables[-1].labels,
        start_NSR=np.concatenate([table.start_NSR for table in tables], axis=1),
        finish_NSR=np.concatenate([table.finish_NSR for table in tables], axis=1),
        own_NSR=np.concatenate([table.own_NSR for table in tables], axis=1),
        step_S=step_S,
    )
