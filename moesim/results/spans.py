"""What the simulation emits: one row per operation of a rank group, in issue order. Everything else is derived.

First derived is where the time of every rank goes. Every instant of a rank in [0, step] is in one state, by priority:
compute; a transfer (own part, or waiting for peers); a reduction; a p2p send between stages; standing still for the
host; nothing (bubble). Spans of one stream never overlap each other on one rank, so the time that compute covers inside
[u, v] is C(v) - C(u) with C the compute done until then; the next stream adds what it covers outside of that, and so
on. Reductions in the background, with passes still to come, hold nobody up and are no state.

Legend: N operations issued, S routing samples simulated in lockstep, R ranks of the group, C categories, Q = S*R
columns, M instants per column.
"""

from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

CATEGORIES = (
    "attention",
    "router",
    "permute",
    "dispatch_exposed",
    "experts",
    "shared_experts",
    "combine_exposed",
    "dense_ffn",
    "embedding_head",
    "imbalance_wait",
    "data_parallel",
    "tensor",
    "pipeline",
    "bubble",
    "recompute",
    "optimizer",
    "host",
    "other",
)


class Stream(IntEnum):
    """Where a span runs on its GPU, by priority of the attribution.

    COMMUNICATION carries dispatch, combine and what else sits in a token's way; REDUCTION collectives on gradients and
    parameters; PIPELINE p2p sends between stages; HOST times at which the device stood still for the host; BACKGROUND
    the part of a collective on gradients beside later passes, which nothing waits for: no time is attributed to it.
    """

    COMPUTE = 0
    COMMUNICATION = 1
    REDUCTION = 2
    PIPELINE = 3
    HOST = 4
    BACKGROUND = 5


class Phase(StrEnum):
    """What of a step an operation belongs to. NONE: reductions of gradients, and what only orders other operations."""

    FORWARD = "forward"
    INPUT_GRADIENT = "input gradient"
    WEIGHT_GRADIENT = "weight gradient"  # nobody waits for it but the optimizer: schedules may put it off
    RECOMPUTE = "recompute"
    OPTIMIZER = "optimizer"
    NONE = "none"


class Part(StrEnum):
    """Which part of the model, or of what trains it, an operation works for."""

    NORM = "norm"
    ATTENTION = "attention"
    RESIDUAL = "residual"
    DENSE_FFN = "dense FFN"
    ROUTER = "router"
    PERMUTE = "permute"
    ROW_COUNTS = "row counts"  # that software exchanges before the rows
    DISPATCH = "dispatch"
    EXPERTS = "experts"
    COMBINE = "combine"
    SHARED_EXPERTS = "shared experts"
    EMBEDDING = "embedding"
    PREDICTION_JOIN = "prediction join"
    HEAD = "head"
    LOSS = "loss"
    GRADIENTS = "gradients"
    PARAMETERS = "parameters"
    OPTIMIZER = "optimizer"
    PIPELINE = "pipeline"
    STALL = "stall"  # the device stands still for the host
    NONE = "none"


# The category of the attribution that the time of a part counts to; parts without one lie within another part.
CATEGORY_OF_PART = {
    Part.ATTENTION: "attention",
    Part.DENSE_FFN: "dense_ffn",
    Part.ROUTER: "router",
    Part.PERMUTE: "permute",
    Part.EXPERTS: "experts",
    Part.SHARED_EXPERTS: "shared_experts",
    Part.EMBEDDING: "embedding_head",
    Part.PREDICTION_JOIN: "embedding_head",
    Part.HEAD: "embedding_head",
    Part.LOSS: "embedding_head",
    Part.GRADIENTS: "data_parallel",
    Part.PARAMETERS: "data_parallel",
    Part.OPTIMIZER: "optimizer",
}


class Collective(StrEnum):
    """How ranks exchange in a transfer."""

    ALL_TO_ALL = "all_to_all"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    SEND_RECEIVE = "send_receive"
    NONE = "none"


class Label(NamedTuple):
    """What a span is: its name, its category of the attribution, its stream and its layer (-1 outside the layers).

    The name is for people: what a program asks stands in `phase`, `part` and `collective`.
    `sender` is the pipeline rank that a p2p send comes from, -1 for everything else. `peers` is the number of the set
    in which each rank of the group takes part in a transfer; empty where all of them meet.
    """

    name: str
    category: str
    stream: Stream
    layer: int
    sender: int = -1
    peers: tuple[int, ...] = ()
    phase: Phase = Phase.NONE
    part: Part = Part.NONE
    collective: Collective = Collective.NONE

    def of_layer(self, layer: int) -> "Label":
        """The same in another layer; `_replace` takes three times as long."""
        return Label(
            self.name,
            self.category,
            self.stream,
            layer,
            sender=self.sender,
            peers=self.peers,
            phase=self.phase,
            part=self.part,
            collective=self.collective,
        )


class ActionRows(NamedTuple):
    """One action of a pipeline schedule: its passes (two when they overlap), and its rows `first` to `last` - 1."""

    passes: tuple[str, ...]
    micro_batches: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class SpanTable:
    """Spans of one rank group.

    `label_N` indexes `labels`; `own_NSR` is the part of a transfer after its last needed peer arrived, and the whole
    duration of a compute span. Times are seconds from the start of the step. `actions` cut the rows into what the
    pipeline schedule did one after the other; behind the last come collectives and the optimizer.
    `since_R`: where rows that ended by then are left out.
    """

    labels: tuple[Label, ...]
    ranks_R: NDArray[np.int64]
    label_N: NDArray[np.int32]
    micro_batch_N: NDArray[np.int32]
    start_NSR: FloatArray
    finish_NSR: FloatArray
    own_NSR: NDArray[np.float32]
    step_S: FloatArray
    actions: tuple[ActionRows, ...] = ()
    since_R: FloatArray | None = None

    def first_sample(self) -> "SpanTable":
        """The spans of sample 0 alone, in memory of their own."""
        if len(self.step_S) == 1:
            return self
        return replace(
            self,
            start_NSR=self.start_NSR[:, :1].copy(),
            finish_NSR=self.finish_NSR[:, :1].copy(),
            own_NSR=self.own_NSR[:, :1].copy(),
            step_S=self.step_S[:1],
        )

    def rows(self, stream: Stream) -> NDArray[np.intp]:
        """Row numbers of one stream, in issue order."""
        streams = np.array([label.stream for label in self.labels])
        return np.flatnonzero(streams[self.label_N] == stream)


class SpanRecorder:
    """Preallocated arrays that the executor fills, one row per operation."""

    def __init__(self, *, rows: int, samples: int, ranks: int) -> None:
        self.label_N = np.zeros(rows, np.int32)
        self.micro_batch_N = np.full(rows, -1, np.int32)
        # Not `zeros`: numpy asks for large pages here, and half a gigabyte of small ones takes as long as to fill them.
        self.start_NSR = np.empty((rows, samples, ranks))
        self.finish_NSR = np.empty((rows, samples, ranks))
        self.own_NSR = np.empty((rows, samples, ranks), np.float32)
        self.count = 0
        self.actions: list[ActionRows] = []

    def pass_on(self) -> bool:
        """Called when an action has ended and is not the last: whether the rows so far are gone."""
        return False

    def stay(self) -> None:
        """Called before the last action: its rows are asked for later."""

    def end_action(self, passes: tuple[str, ...], micro_batches: tuple[int, ...]) -> None:
        """The rows since the last action ended belong to this one."""
        first = self.actions[-1].last if self.actions else 0
        self.actions.append(ActionRows(passes, micro_batches, first, self.count))

    def add(
        self, label: int, micro_batch: int, start_SR: FloatArray, finish_SR: FloatArray, own_SR: FloatArray
    ) -> None:
        """Append one span."""
        row = self.count
        self.label_N[row] = label
        self.micro_batch_N[row] = micro_batch
        self.start_NSR[row] = start_SR
        self.finish_NSR[row] = finish_SR
        self.own_NSR[row] = own_SR
        self.count = row + 1

    def run(self, labels_N: NDArray[np.int32], micro_batch: int | NDArray[np.integer]) -> slice:
        """Rows for spans that follow each other, of one micro-batch or of one each; the caller writes their times."""
        rows = slice(self.count, self.count + len(labels_N))
        self.label_N[rows] = labels_N
        self.micro_batch_N[rows] = micro_batch
        self.count = rows.stop
        return rows

    def append(self, other: "SpanRecorder") -> None:
        """The rows of another recorder behind these, its sample 0 alone."""
        rows, n = slice(self.count, self.count + other.count), other.count
        for name in ("label_N", "micro_batch_N"):
            getattr(self, name)[rows] = getattr(other, name)[:n]
        for name in ("start_NSR", "finish_NSR", "own_NSR"):
            getattr(self, name)[rows] = getattr(other, name)[:n, :1]
        self.actions += [
            action._replace(first=self.count + action.first, last=self.count + action.last) for action in other.actions
        ]
        self.count = rows.stop

    def table(self, *, labels: tuple[Label, ...], ranks_R: NDArray[np.int64], step_S: FloatArray) -> SpanTable:
        """The finished table (views of the rows that were filled)."""
        n = self.count
        return SpanTable(
            labels=labels,
            ranks_R=ranks_R,
            label_N=self.label_N[:n],
            micro_batch_N=self.micro_batch_N[:n],
            start_NSR=self.start_NSR[:n],
            finish_NSR=self.finish_NSR[:n],
            own_NSR=self.own_NSR[:n],
            step_S=step_S,
            actions=tuple(self.actions),
        )


TIMES = ("start_NSR", "finish_NSR", "own_NSR")
ROUND_OFF = 1e-9  # share of the step: differences of sums that are less below zero are zero


class _Coverage:
    """Time covered by a stream or by one of higher priority (`higher`; None for the first)."""

    def __init__(
        self,
        start_NQ: FloatArray,
        finish_NQ: FloatArray,
        higher: "_Coverage | None" = None,
        *,
        higher_2NQ: FloatArray | None = None,
    ) -> None:
        """`higher_2NQ`: what `higher` has covered until each start and each finish."""
        self.higher, self.exposed_NQ = higher, finish_NQ - start_NQ
        higher_NQ: FloatArray | None = None
        if higher_2NQ is not None:
            higher_NQ = higher_2NQ[0]
            self.exposed_NQ = self.exposed_NQ - (higher_2NQ[1] - higher_NQ)
        before_NQ = np.cumsum(self.exposed_NQ, axis=0) - self.exposed_NQ
        # Column by column in memory, as the look-up goes.
        self._start_QN, self._finish_QN, self._before_QN = _columns(start_NQ), _columns(finish_NQ), _columns(before_NQ)
        self._higher_QN = None if higher_NQ is None else _columns(higher_NQ)
        self._exposed_QN = _columns(self.exposed_NQ)

    def until(self, *times_MQ: FloatArray) -> FloatArray:
        """Covered seconds in (-inf, time], per column, of each array of times."""
        return self._until(_columns(np.concatenate(times_MQ))).T.reshape(len(times_MQ), *times_MQ[0].shape)

    def with_next(
        self, start_NQ: FloatArray, finish_NQ: FloatArray, own_NQ: FloatArray
    ) -> "tuple[_Coverage, FloatArray]":
        """With the next stream below, and what of the last `own` seconds of its spans no higher one covers."""
        start, middle, finish = self.until(start_NQ, finish_NQ - own_NQ, finish_NQ)
        exposed_own_NQ = own_NQ - (finish - middle)
        return _Coverage(start_NQ, finish_NQ, self, higher_2NQ=np.stack([start, finish])), exposed_own_NQ

    def _until(self, time_QM: FloatArray) -> FloatArray:
        higher_QM = self.higher._until(time_QM) if self.higher is not None else np.zeros_like(time_QM)
        columns, spans = self._start_QN.shape
        if not spans:
            return higher_QM
        at_QM = np.empty(time_QM.shape, dtype=np.intp)
        for q, time_M in enumerate(time_QM):
            at_QM[q] = np.searchsorted(self._start_QN[q], time_M, side="right")
        at_QM -= 1
        known_QM = np.maximum(at_QM, 0) + spans * np.arange(columns)[:, None]  # in all columns one after the other
        end_QM = self._finish_QN.take(known_QM)
        inside_QM = np.minimum(time_QM, end_QM) - self._start_QN.take(known_QM)
        if self._higher_QN is not None:
            # Within the span only what no higher stream covers counts; a finished span counts its exposed part.
            inside_QM = inside_QM - (higher_QM - self._higher_QN.take(known_QM))
            inside_QM = np.where(time_QM >= end_QM, self._exposed_QN.take(known_QM), inside_QM)
        return higher_QM + np.where(at_QM >= 0, self._before_QN.take(known_QM) + inside_QM, 0.0)


def _columns(values_NQ: FloatArray) -> FloatArray:
    return np.ascontiguousarray(values_NQ.T)


def _stream_intervals(table: SpanTable, stream: Stream) -> tuple[NDArray[np.intp], FloatArray, FloatArray]:
    rows_N = table.rows(stream)
    columns = table.start_NSR.shape[1] * table.start_NSR.shape[2]
    return rows_N, table.start_NSR[rows_N].reshape(-1, columns), table.finish_NSR[rows_N].reshape(-1, columns)


def _joined(begin_NQ: FloatArray, end_NQ: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Spans that follow each other without a gap in every column, as one."""
    if not len(begin_NQ):
        return begin_NQ, end_NQ
    apart_N = (begin_NQ[1:] != end_NQ[:-1]).any(axis=1)
    return begin_NQ[np.append(True, apart_N)], end_NQ[np.append(apart_N, True)]


def _add_by_category(seconds_CQ: FloatArray, category_N: NDArray[np.intp], values_NQ: FloatArray) -> None:
    for category in np.unique(category_N):
        seconds_CQ[category] += values_NQ[category_N == category].sum(axis=0)


def _ranks_are_equal(table: SpanTable) -> bool:
    """Whether every span has the same times on all ranks; most tables differ in their last row already."""
    for rows in (slice(-1, None), slice(None)):
        for name in TIMES:
            times_NSR = getattr(table, name)[rows]
            if not (times_NSR == times_NSR[:, :, :1]).all():
                return False
    return True


def attribute(table: SpanTable) -> FloatArray:
    """Seconds per category, sample and rank: [C, S, R]; over C they add up to the step time of the sample.

    Compute is counted whole. Spans of other streams count where no higher stream runs: their last `own` seconds as
    their category, what lies before as `imbalance_wait`. What no span covers is `bubble`, measured as the gaps of the
    compute stream less the other streams in them, so that the sum is a check and not a definition. Where all ranks are
    at the same times in every sample, two stand for all (of a single column numpy would add up the rows in another
    order). Large steps take `moesim.results.span_sums` instead, which needs numba and no table.
    """
    _, samples, ranks = table.start_NSR.shape
    if ranks > 2 and _ranks_are_equal(table):
        two = replace(table, **{name: getattr(table, name)[:, :, :2] for name in TIMES})
        return attribute(two)[:, :, :1].repeat(ranks, axis=2)
    seconds_CQ = np.zeros((len(CATEGORIES), samples * ranks))
    category_L = np.array([CATEGORIES.index(label.category) for label in table.labels], dtype=np.intp)

    compute_N, begin_NQ, end_NQ = _stream_intervals(table, Stream.COMPUTE)
    _add_by_category(seconds_CQ, category_L[table.label_N[compute_N]], end_NQ - begin_NQ)
    begin_NQ, end_NQ = _joined(begin_NQ, end_NQ)
    covered = _Coverage(begin_NQ, end_NQ)
    for stream in (Stream.COMMUNICATION, Stream.REDUCTION, Stream.PIPELINE, Stream.HOST):
        rows_N, start_NQ, finish_NQ = _stream_intervals(table, stream)
        if not len(rows_N):
            continue
        own_NQ = np.minimum(table.own_NSR[rows_N].reshape(start_NQ.shape).astype(np.float64), finish_NQ - start_NQ)
        covered, exposed_own_NQ = covered.with_next(start_NQ, finish_NQ, own_NQ)
        _add_by_category(seconds_CQ, category_L[table.label_N[rows_N]], exposed_own_NQ)
        seconds_CQ[CATEGORIES.index("imbalance_wait")] += (covered.exposed_NQ - exposed_own_NQ).sum(axis=0)
    seconds_CQ[CATEGORIES.index("bubble")] += _idle(table, begin_NQ, end_NQ, covered)
    return without_round_off(seconds_CQ.reshape(len(CATEGORIES), samples, ranks), table.step_S)


def without_round_off(seconds_CSR: FloatArray, step_S: FloatArray) -> FloatArray:
    """With 0 for differences of sums that are that little below it."""
    seconds_CSR[(seconds_CSR < 0) & (seconds_CSR > -ROUND_OFF * step_S.max())] = 0.0
    return seconds_CSR


def waited_for(table: SpanTable) -> FloatArray:
    """Seconds of the first sample that every rank [R] stood waiting for every other one, [R, R + 1].

    In a transfer ranks wait for the last of their group to come to it. The last column is for others: for whom the last
    one itself waits, as in a collective over several groups, or in p2p sends. A row adds up to the `imbalance_wait` of
    its rank.
    """
    first = table.first_sample()
    ranks = first.start_NSR.shape[2]
    waits_RR = np.zeros((ranks, ranks + 1))
    _, begin_NR, end_NR = _stream_intervals(first, Stream.COMPUTE)
    covered = _Coverage(*_joined(begin_NR, end_NR))
    for stream in (Stream.COMMUNICATION, Stream.REDUCTION, Stream.PIPELINE, Stream.HOST):
        rows_N, start_NR, finish_NR = _stream_intervals(first, stream)
        if not len(rows_N):
            continue
        own_NR = np.minimum(first.own_NSR[rows_N].reshape(start_NR.shape).astype(np.float64), finish_NR - start_NR)
        covered, exposed_own_NR = covered.with_next(start_NR, finish_NR, own_NR)
        wait_NR = covered.exposed_NQ - exposed_own_NR
        together = stream in (Stream.COMMUNICATION, Stream.REDUCTION)
        last_N = start_NR.argmax(axis=1)
        later_NR = together & (start_NR < start_NR.max(axis=1, keepdims=True))
        for rank in range(ranks):
            peer_N = np.where(later_NR[:, rank], last_N, ranks)
            waits_RR[rank] += np.bincount(peer_N, weights=wait_NR[:, rank], minlength=ranks + 1)
    return np.where(np.abs(waits_RR) < ROUND_OFF * table.step_S.max(), 0.0, waits_RR)


def _idle(table: SpanTable, begin_NQ: FloatArray, end_NQ: FloatArray, covered: _Coverage) -> FloatArray:
    """Seconds per column without any span: gaps of the compute stream less what other streams cover in them."""
    _, samples, ranks = table.start_NSR.shape
    step_1Q = np.repeat(table.step_S, ranks)[None]
    gap_start_NQ = np.concatenate([np.zeros((1, samples * ranks)), end_NQ])
    gap_finish_NQ = np.concatenate([begin_NQ, step_1Q])
    covered_start_NQ, covered_finish_NQ = covered.until(gap_start_NQ, gap_finish_NQ)
    gap_NQ = (gap_finish_NQ - gap_start_NQ) - (covered_finish_NQ - covered_start_NQ)
    return np.asarray(gap_NQ.sum(axis=0))


def overlapped_transfer(table: SpanTable) -> dict[str, FloatArray]:
    """Seconds [S, R] of every category of transfers that ran behind compute."""
    _, begin_NQ, end_NQ = _stream_intervals(table, Stream.COMPUTE)
    shape = table.start_NSR.shape[1:]
    compute = _Coverage(begin_NQ, end_NQ)
    hidden: dict[str, FloatArray] = {}
    for stream in (Stream.COMMUNICATION, Stream.REDUCTION, Stream.BACKGROUND):
        rows_N, start_NQ, finish_NQ = _stream_intervals(table, stream)
        before_NQ, after_NQ = compute.until(start_NQ, finish_NQ)
        hidden_NQ = after_NQ - before_NQ
        for row, label in enumerate(table.label_N[rows_N]):
            category = table.labels[label].category
            hidden[category] = hidden.get(category, np.zeros(shape)) + hidden_NQ[row].reshape(shape)
    return hidden
