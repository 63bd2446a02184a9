"""What sets the pace of a step: its critical path, walked back from the rank that finished last, and its slowest stage.

At each instant the walk stands on one rank and asks what ended there just then:

    compute, host stall   its time counts as its category, and the walk goes on at its start
    dispatch, combine     when the rank waited for its peers, the walk moves to the peer that joined last before the
                          rank's own part began; what lies behind that moment counts as the transfer
    collective            the same over all members; where buckets overlap the last backward pass, the walk goes to the
                          rank whose gradients came last
    p2p send              the walk moves to the sender, at the moment when it sent
    nothing               counts as bubble, back to what ended last on this rank

The pieces tile [0, step], so that their sum is the step time. Waiting does not appear: the walk is always where the
work was. `stage_facts` says how long each pipeline rank works on a micro-batch: the slowest one sets the pace, the
others wait for it. Legend: N spans with a duration, R ranks of a group, S routing samples, P pipeline ranks.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InternalError
from moesim.results.spans import CATEGORIES, ActionRows, SpanTable, Stream
from moesim.scenario import Scenario
from moesim.scenario.stages import stages_of_ranks

TOLERANCE = 1e-9  # seconds; spans that follow each other share the bits of that instant
ROUND_OFF = 1e-14  # the same as a share of the step, for steps of days


Whole = Callable[[int], Sequence[SpanTable]]


class PathSegment(NamedTuple):
    """One stretch of the path, seconds from the start of the step, on global rank `rank` of group `table`."""

    category: str
    start: float
    finish: float
    table: int
    rank: int


class _Position(NamedTuple):
    table: int
    place: int
    time: float


class _GroupSpans:
    """The rows of one group by stream. Spans of one stream follow each other on every rank, so its ends can be bisected
    where they lie: no copy per rank."""

    def __init__(self, table: SpanTable, tolerance: float) -> None:
        self.tolerance = tolerance
        self.start_NR, self.finish_NR = table.start_NSR[:, 0], table.finish_NSR[:, 0]
        self.since_R = np.zeros(self.start_NR.shape[1]) if table.since_R is None else table.since_R
        waited_for = [stream for stream in Stream if stream is not Stream.BACKGROUND]  # computation first
        self.streams: list[list[int]] = [table.rows(stream).tolist() for stream in waited_for]

    def _until(self, rows: list[int], place: int, time: float) -> int:
        """How many spans of a stream end by `time` on a rank."""
        ends_N = self.finish_NR[:, place]
        return bisect_right(rows, time + self.tolerance, key=ends_N.__getitem__)

    def computed_until(self, place: int, time: float) -> float:
        """End of the last computation that ended by `time`; without one when the rows begin."""
        rows = self.streams[Stream.COMPUTE]
        count = self._until(rows, place, time)
        return float(self.finish_NR[rows[count - 1], place] if count else self.since_R[place])

    def ending_at(self, place: int, time: float) -> int | None:
        """The row that ends at `time`; a computation, where several do."""
        for rows in self.streams:
            index = self._until(rows, place, time) - 1
            while index >= 0 and self.finish_NR[rows[index], place] >= time - self.tolerance:
                if self.start_NR[rows[index], place] < time - self.tolerance:
                    return rows[index]
                index -= 1  # without a duration
        return None

    def running_at(self, place: int, time: float) -> int | None:
        """The row that runs at `time` and longer; a computation, where several do."""
        for rows in self.streams:
            index = self._until(rows, place, time)
            if index < len(rows) and self.start_NR[rows[index], place] < time - self.tolerance:
                return rows[index]
        return None

    def ended_before(self, place: int, time: float) -> float:
        """When the last span before `time` ended; without one when the rows begin."""
        ends = [float(self.since_R[place])]
        for rows in self.streams:
            index = self._until(rows, place, time - 2 * self.tolerance) - 1
            if index >= 0:
                ends.append(float(self.finish_NR[rows[index], place]))
        return max(ends)


class _PathSearch:
    """The spans of all groups in sample 0, and the steps of the walk."""

    def __init__(self, tables: Sequence[SpanTable], pipeline_ranks: Sequence[int], whole: Whole | None) -> None:
        self.tables, self.pipeline_ranks, self._whole = list(tables), pipeline_ranks, whole
        self.tolerance = max(TOLERANCE, ROUND_OFF * float(tables[0].step_S[0]))
        self.spans = [_GroupSpans(table, self.tolerance) for table in tables]
        seen: defaultdict[int, int] = defaultdict(int)
        self.number = []  # of a group among those of its pipeline rank
        for pipeline_rank in pipeline_ranks:
            self.number.append(seen[pipeline_rank])
            seen[pipeline_rank] += 1
        self.group = {key: index for index, key in enumerate(zip(pipeline_ranks, self.number, strict=True))}

    def last(self) -> _Position:
        """The rank that finishes last."""
        ends = [table.finish_NSR[:, 0].max(axis=0) for table in self.tables]
        table = int(np.argmax([end_R.max() for end_R in ends]))
        place = int(ends[table].argmax())
        return _Position(table, place, float(ends[table][place]))

    def _most_steps(self) -> int:
        """Every step goes back over a span or a bubble before one, or to another rank at the same time."""
        return 4 * sum(table.start_NSR[:, 0].size for table in self.tables) + 4

    def segments(self) -> Iterator[PathSegment]:
        """The path from its end to 0."""
        position, steps, most_steps = self.last(), 0, self._most_steps()
        while steps < most_steps:
            steps += 1
            if position.time <= self.tolerance:
                return
            if self._complete(position):
                most_steps = self._most_steps()
            category, following = self._back(position)
            assert following.time < position.time or following[:2] != position[:2], "the walk goes back"
            if following.time < position.time:
                rank = int(self.tables[position.table].ranks_R[position.place])
                yield PathSegment(category, following.time, position.time, position.table, rank)
            position = following
        raise InternalError("the critical path does not come to its beginning")

    def _complete(self, position: _Position) -> bool:
        """Get the rows before a spot, where they are left out, for all groups with its number: from there the path
        stays among them, because others are met behind the last action alone. Returns whether any came.
        """
        table = self.tables[position.table]
        if table.since_R is None or position.time > table.since_R[position.place] + self.tolerance:
            return False
        assert self._whole is not None, "somebody has the rows that are left out"
        number = self.number[position.table]
        chosen = [index for index, other in enumerate(self.number) if other == number]
        for index, whole in zip(chosen, self._whole(number), strict=True):
            self.tables[index] = whole
            self.spans[index] = _GroupSpans(whole, self.tolerance)
        return True

    def _back(self, position: _Position) -> tuple[str, _Position]:
        spans, table = self.spans[position.table], self.tables[position.table]
        row = spans.ending_at(position.place, position.time)
        whole = row is not None
        if row is None:
            row = spans.running_at(position.place, position.time)
            if row is None:
                return "bubble", position._replace(time=spans.ended_before(position.place, position.time))
        label, start = table.labels[table.label_N[row]], float(spans.start_NR[row, position.place])
        if whole and label.stream is Stream.COMMUNICATION:
            return label.category, self._joined_last(position, row, start)
        if whole and label.stream is Stream.REDUCTION:
            return label.category, self._gradients_last(position, row, start)
        if whole and label.stream is Stream.PIPELINE:
            sender = self.group[label.sender, self.number[position.table]]
            return label.category, _Position(sender, position.place, start)
        return label.category, position._replace(time=start)

    def _joined_last(self, position: _Position, row: int, start: float) -> _Position:
        """The peer of an all-to-all that joined last before the rank's own part began; the rank itself if none did."""
        table = self.tables[position.table]
        joined_R = table.start_NSR[row, 0]
        peers = table.labels[table.label_N[row]].peers
        if peers:
            joined_R = np.where(np.array(peers) == peers[position.place], joined_R, -np.inf)
        began = position.time - float(table.own_NSR[row, 0, position.place])
        needed_R = np.where(joined_R <= began + self.tolerance + 1e-6 * (position.time - start), joined_R, -np.inf)
        place = int(needed_R.argmax())
        if needed_R[place] <= start + self.tolerance:
            return position._replace(time=start)
        return position._replace(place=place, time=float(needed_R[place]))

    def _gradients_last(self, position: _Position, row: int, start: float) -> _Position:
        """The member of a collective that joined last, or, where it overlaps, the one that computed last."""
        label = self.tables[position.table].labels[self.tables[position.table].label_N[row]]
        own = float(self.tables[position.table].own_NSR[row, 0, position.place])
        joined, computed = position._replace(time=start), position._replace(time=0.0)
        for index, table in enumerate(self.tables):
            numbers = [number for number, other in enumerate(table.labels) if other == label]
            for other_row in np.flatnonzero(np.isin(table.label_N, numbers)).tolist():
                same_R = np.abs(table.finish_NSR[other_row, 0] - position.time) <= self.tolerance
                for place in np.flatnonzero(same_R).tolist():
                    at = float(table.start_NSR[other_row, 0, place])
                    joined = max(joined, _Position(index, place, at), key=lambda member: member.time)
                    until = self.spans[index].computed_until(place, position.time)
                    computed = max(computed, _Position(index, place, until), key=lambda member: member.time)
        held_by_first = position.time - own <= joined.time + 1e-6 * own + self.tolerance
        return computed if computed.time > joined.time + self.tolerance and not held_by_first else joined


def critical_path(
    tables: Sequence[SpanTable], *, pipeline_ranks: Sequence[int], whole: Whole | None = None
) -> tuple[PathSegment, ...]:
    """The critical path of sample 0, last piece first. `whole`: gives the tables of group number so and so of every
    pipeline rank, where those at hand begin at `since_R`.

    `tables` hold every expert group; `pipeline_ranks` says on which pipeline rank each of them is, and groups of one
    pipeline rank come in the order of their numbers.
    """
    return tuple(_PathSearch(tables, pipeline_ranks, whole).segments())


def path_seconds(segments: Sequence[PathSegment]) -> dict[str, float]:
    """Seconds of the path by category, in the order of CATEGORIES."""
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    for segment in segments:
        seconds[segment.category] += segment.finish - segment.start
    return seconds


def path_facts(
    tables: Sequence[SpanTable], *, pipeline_ranks: Sequence[int], whole: Whole | None = None
) -> dict[str, Any]:
    """The critical path of sample 0 as plain values: seconds by category and by rank."""
    segments = critical_path(tables, pipeline_ranks=pipeline_ranks, whole=whole)
    by_rank: defaultdict[int, float] = defaultdict(float)
    for segment in segments:
        by_rank[segment.rank] += segment.finish - segment.start
    return {
        "step_time_s": float(tables[0].step_S[0]),
        "seconds": path_seconds(segments),
        "seconds_by_rank": {str(rank): seconds for rank, seconds in sorted(by_rank.items())},
        "last_rank": segments[0].rank,
    }


FloatArray = NDArray[np.float64]

UNEVEN = 0.05  # above which a run warns: slowest over mean


def action_seconds(table: SpanTable) -> FloatArray:
    """Seconds [S, R] from the first to the last span of each action, summed: waiting for p2p sends is not in it."""
    total_SR = np.zeros(table.start_NSR.shape[1:])
    for action in table.actions:
        total_SR += seconds_of_action(action, table.micro_batch_N, table.start_NSR, table.finish_NSR)
    return total_SR


def seconds_of_action(
    action: ActionRows, micro_batch_N: NDArray[np.int32], start_NSR: FloatArray, finish_NSR: FloatArray
) -> FloatArray:
    """The same of one action, whose numbers of rows are those of the arrays."""
    own_N = np.flatnonzero(micro_batch_N[action.first : action.last] >= 0)
    if not len(own_N):
        return np.zeros(start_NSR.shape[1:])
    rows = slice(action.first + own_N[0], action.last)
    return np.asarray(finish_NSR[rows].max(axis=0) - start_NSR[rows].min(axis=0))


def stage_facts(scenario: Scenario, busy_P: FloatArray) -> dict[str, Any]:
    """The section `stages` of a result; `busy_P`: mean seconds of all passes of the step on each pipeline rank.

    By pipeline rank: its stages, their numbers of layers (without those of multi-token prediction) and seconds per
    micro-batch, forward and backward, through all of them (under dualpipe each rank sees half of the micro-batches in
    each of its two). slowest_over_mean: 1 is perfectly even.
    """
    lengths = [len(layers) for layers in scenario.stage_layers]
    work, mesh = scenario.workload, scenario.parallelism
    seconds_P = busy_P / (work.global_batch / (mesh.data * work.micro_batch))  # of the mean of all ranks
    return {
        "slowest_over_mean": float(seconds_P.max() / seconds_P.mean()),
        "pipeline_ranks": [
            {
                "stages": list(stages),
                "layers": [lengths[stage] for stage in stages],
                "seconds_per_micro_batch": float(seconds),
            }
            for stages, seconds in zip(stages_of_ranks(scenario.parallelism), seconds_P, strict=True)
        ],
    }


def stage_warnings(found: Mapping[str, Any], *, listed: bool) -> list[str]:
    """Whether a rank holds up the others; `listed`: the scenario says which stage has how many layers."""
    excess = found["slowest_over_mean"] - 1.0
    if excess <= UNEVEN:
        return []
    seconds = [rank["seconds_per_micro_batch"] for rank in found["pipeline_ranks"]]
    slowest = int(np.argmax(seconds))
    remedy = (
        "leave parallelism.stages out to have them split by estimated time"
        if listed
        else "whole layers were split by estimated time; parallelism.stages takes another split"
    )
    return [
        f"pipeline rank {slowest} takes {max(seconds) * 1e3:.4g} ms for a micro-batch, {excess:.1%} more than the "
        f"mean, and the others wait for it; {remedy}"
    ]
