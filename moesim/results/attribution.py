"""Where the time of every rank goes, derived from spans alone.

Every instant of a rank in [0, step] is in one state, by priority: compute; a transfer's own part; waiting for peers
inside a transfer; standing still for the host; nothing (bubble). Spans of one stream never overlap each other on one
rank, so the time that compute covers inside an interval [u, v] is C(v) - C(u) with C the compute done until then.

Legend: C categories, N spans of one stream, S samples, R ranks, Q = S*R columns.
"""

import numpy as np
from numpy.typing import NDArray

from moesim.results.spans import CATEGORIES, SpanTable, Stream

FloatArray = NDArray[np.float64]


class _Coverage:
    """Time covered by a set of disjoint intervals per column, sorted by start."""

    def __init__(self, start_NQ: FloatArray, finish_NQ: FloatArray) -> None:
        self.start_NQ, self.finish_NQ = start_NQ, finish_NQ
        self.before_NQ = np.cumsum(finish_NQ - start_NQ, axis=0) - (finish_NQ - start_NQ)

    def until(self, time_MQ: FloatArray) -> FloatArray:
        """Covered seconds in (-inf, time], per column."""
        covered_MQ = np.zeros_like(time_MQ)
        if not len(self.start_NQ):
            return covered_MQ
        for q in range(time_MQ.shape[1]):
            at_M = np.searchsorted(self.start_NQ[:, q], time_MQ[:, q], side="right") - 1
            known_M = np.maximum(at_M, 0)
            inside_M = np.minimum(time_MQ[:, q], self.finish_NQ[known_M, q]) - self.start_NQ[known_M, q]
            covered_MQ[:, q] = np.where(at_M >= 0, self.before_NQ[known_M, q] + inside_M, 0.0)
        return covered_MQ

    def inside(self, start_MQ: FloatArray, finish_MQ: FloatArray) -> FloatArray:
        """Covered seconds inside each interval."""
        return self.until(finish_MQ) - self.until(start_MQ)


def _stream_intervals(table: SpanTable, stream: Stream) -> tuple[NDArray[np.intp], FloatArray, FloatArray]:
    rows_N = table.rows(stream)
    columns = table.start_NSR.shape[1] * table.start_NSR.shape[2]
    return rows_N, table.start_NSR[rows_N].reshape(-1, columns), table.finish_NSR[rows_N].reshape(-1, columns)


def _add_by_category(seconds_CQ: FloatArray, category_N: NDArray[np.intp], values_NQ: FloatArray) -> None:
    for category in np.unique(category_N):
        seconds_CQ[category] += values_NQ[category_N == category].sum(axis=0)


def attribute(table: SpanTable) -> FloatArray:
    """Seconds per category, sample and rank: [C, S, R]; over C they add up to the step time of the sample.

    Compute is counted whole. Transfers count where no compute runs: their last `own` seconds as `<category>`, what lies
    before as `imbalance_wait`. Host stalls count where neither runs. What no span covers is `bubble`, measured as the
    gaps themselves, so that the sum is a check and not a definition.
    """
    _, samples, ranks = table.start_NSR.shape
    seconds_CQ = np.zeros((len(CATEGORIES), samples * ranks))
    category_L = np.array([CATEGORIES.index(label.category) for label in table.labels], dtype=np.intp)

    compute_N, begin_NQ, end_NQ = _stream_intervals(table, Stream.COMPUTE)
    _add_by_category(seconds_CQ, category_L[table.label_N[compute_N]], end_NQ - begin_NQ)
    compute = _Coverage(begin_NQ, end_NQ)

    transfer_N, start_NQ, finish_NQ = _stream_intervals(table, Stream.COMMUNICATION)
    own_NQ = np.minimum(table.own_NSR[transfer_N].reshape(start_NQ.shape).astype(np.float64), finish_NQ - start_NQ)
    middle_NQ = finish_NQ - own_NQ
    exposed_own_NQ = own_NQ - compute.inside(middle_NQ, finish_NQ)
    exposed_wait_NQ = (middle_NQ - start_NQ) - compute.inside(start_NQ, middle_NQ)
    _add_by_category(seconds_CQ, category_L[table.label_N[transfer_N]], exposed_own_NQ)
    seconds_CQ[CATEGORIES.index("imbalance_wait")] += exposed_wait_NQ.sum(axis=0)

    host_N, stall_NQ, resume_NQ = _stream_intervals(table, Stream.HOST)
    transfers = _Coverage(start_NQ, finish_NQ)
    # A stall is recorded where the compute stream stood still, so only transfers can lie inside it.
    stalled_NQ = (resume_NQ - stall_NQ) - transfers.inside(stall_NQ, resume_NQ)
    _add_by_category(seconds_CQ, category_L[table.label_N[host_N]], stalled_NQ)

    seconds_CQ[CATEGORIES.index("bubble")] += _idle(table, begin_NQ, end_NQ, transfers) - stalled_NQ.sum(axis=0)
    return seconds_CQ.reshape(len(CATEGORIES), samples, ranks)


def _idle(table: SpanTable, begin_NQ: FloatArray, end_NQ: FloatArray, transfers: _Coverage) -> FloatArray:
    """Seconds per column without compute or transfer: gaps of the compute stream less the transfers in them."""
    _, samples, ranks = table.start_NSR.shape
    step_1Q = np.repeat(table.step_S, ranks)[None]
    gap_start_NQ = np.concatenate([np.zeros((1, samples * ranks)), end_NQ])
    gap_finish_NQ = np.concatenate([begin_NQ, step_1Q])
    gap_NQ = (gap_finish_NQ - gap_start_NQ) - transfers.inside(gap_start_NQ, gap_finish_NQ)
    return np.asarray(gap_NQ.sum(axis=0))


def overlapped_transfer(table: SpanTable) -> dict[str, FloatArray]:
    """Seconds [S, R] of every transfer category that ran behind compute: total span less the exposed part."""
    _, begin_NQ, end_NQ = _stream_intervals(table, Stream.COMPUTE)
    transfer_N, start_NQ, finish_NQ = _stream_intervals(table, Stream.COMMUNICATION)
    hidden_NQ = _Coverage(begin_NQ, end_NQ).inside(start_NQ, finish_NQ)
    shape = table.start_NSR.shape[1:]
    hidden: dict[str, FloatArray] = {}
    for row, label in enumerate(table.label_N[transfer_N]):
        category = table.labels[label].category
        hidden[category] = hidden.get(category, np.zeros(shape)) + hidden_NQ[row].reshape(shape)
    return hidden
