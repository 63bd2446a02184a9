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

from moesim.engine.conditions import Conditions
from moesim.engine.executor import GroupExecutor
from moesim.engine.executor_steps import Labels
from moesim.engine.lateness import ALONE, Among
from moesim.engine.shared_links import Carried, SharedLinks
from moesim.engine.step_ports import StepPorts
from moesim.kernels import Beside, slowed_at, wait_of
from moesim.kernels.jitter import NO_JITTER
from moesim.network.contention import LinkUse
from moesim.program.collectives import Reduction, last_arrivals
from moesim.program.contention import TINY, samples_of
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
Wait = Generator[simpy.Event, Any, None]

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


class Early(NamedTuple):
    """A collective that a group attended while it had tasks left: when it began and was done, [S, R]."""

    reduction: Reduction
    start_SR: FloatArray
    finish_SR: FloatArray
    own: FloatArray | float


class _Meeting:
    """One collective: each group that takes part brings its times, all get everyone's.

    `shared_links` and `use`: the overloaded links that it uses, if any.
    """

    def __init__(
        self,
        env: simpy.Environment,
        reduction: Reduction,
        groups: tuple[GroupProgram, ...],
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
            _Meeting(
                self.env,
                collective,
                program.groups,
                self.shared_links,
                use,
                _beside(program, collective),
                self.conditions,
                by_state,
                self.among,
                self.ports,
                number,
            )
            for number, (collective, use, by_state) in enumerate(zip(collectives, uses, seconds, strict=True))
        ]
        self.reductions, self.gathers = meetings[: len(program.reductions)], meetings[len(program.reductions) :]

    def group(self, group: GroupProgram, executor: GroupExecutor) -> Wait:
        """The life of one expert group on one pipeline rank."""
        due: defaultdict[int, list[_Meeting]] = defaultdict(list)
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
        meetings: Sequence[_Meeting],
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
        meetings: Sequence[_Meeting],
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


def _beside(program: StepProgram, collective: Reduction) -> Beside:
    """What kernels and this collective on gradients cost each other."""
    facts, rate = program.beside_reductions, collective.sent_bytes / max(collective.seconds, TINY)
    return facts._replace(
        transfer=slowed_at(facts.transfer, rate=rate, measured_rate=program.collective_rate),
        wait=float(wait_of(facts.wait, alone=collective.seconds)),
    )


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
