"""Where the time of every rank goes.

Every instant of a rank in [0, step] is in one state, by priority:
compute; a transfer (own part, or waiting for peers); a reduction; a p2p send between stages; standing still for the
host; nothing (bubble). Spans of one stream never overlap each other on one rank, so the time that compute covers inside
[u, v] is C(v) - C(u) with C the compute done until then; the next stream adds what it covers outside of that, and so
on. Reductions in the background, with passes still to come, hold nobody up and are no state.

Legend: N operations issued, S routing samples simulated in lockstep, R ranks of the group, C categories, Q = S*R
columns, M instants per column.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.results.spans import CATEGORIES, SpanTable, Stream

FloatArray = NDArray[np.float64]

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
