"""Attribution and waits as loops for numba: rank by rank through rows that lie in the cache, without copies of them.

Legend: G spans, K streams, L labels, S samples, R ranks, P pipeline ranks, C categories.
(numba's cache looks at this file alone: when CATEGORIES or Stream change, change this file.)
"""

import numba
import numpy as np
from numpy.typing import NDArray

from moesim.results.spans import CATEGORIES, Stream

FloatArray = NDArray[np.float64]
Own = NDArray[np.float32]
IntArray = NDArray[np.int64]

_COMPUTE, _BACKGROUND, _STREAMS = int(Stream.COMPUTE), int(Stream.BACKGROUND), len(Stream)
_COMMUNICATION, _REDUCTION, _PIPELINE = int(Stream.COMMUNICATION), int(Stream.REDUCTION), int(Stream.PIPELINE)
_WAIT, _BUBBLE = CATEGORIES.index("imbalance_wait"), CATEGORIES.index("bubble")


@numba.njit()
def _by_stream(label_G: NDArray[np.int32], stream_L: IntArray, order_G: IntArray, first_K: IntArray) -> None:
    """Rows stream by stream in issue order; those of stream k begin at `first_K[k]`."""
    place = 0
    for stream in range(_STREAMS):
        first_K[stream] = place
        for row in range(len(label_G)):
            if stream_L[label_G[row]] == stream:
                order_G[place] = row
                place += 1
    first_K[_STREAMS] = place


@numba.njit()
def _are_equal(times_GSR: NDArray[np.floating], sample: int) -> bool:
    """Whether all ranks have the same times in all rows; most differ in the last one already."""
    for row in range(len(times_GSR) - 1, -1, -1):
        for rank in range(1, times_GSR.shape[2]):
            if times_GSR[row, sample, rank] != times_GSR[row, sample, 0]:
                return False
    return True


@numba.njit()
def _join(begin_G: FloatArray, end_G: FloatArray, count: int, begin: float, end: float) -> int:
    """Adds an interval that begins no sooner than the last one; gives how many there are then."""
    if count > 0 and begin <= end_G[count - 1]:
        end_G[count - 1] = max(end_G[count - 1], end)
        return count
    begin_G[count], end_G[count] = begin, end
    return count + 1


@numba.njit()
def _covered(begin_G: FloatArray, end_G: FloatArray, count: int, place: int, start: float, finish: float) -> float:
    """Seconds of [start, finish] in the intervals from `place` on."""
    inside = 0.0
    while place < count and begin_G[place] < finish:
        inside += max(min(end_G[place], finish) - max(begin_G[place], start), 0.0)
        place += 1
    return inside


@numba.njit()
def _united(
    begin_G: FloatArray, end_G: FloatArray, count: int, start_G: FloatArray, finish_G: FloatArray, spans: int,
    into_begin_G: FloatArray, into_end_G: FloatArray,
) -> int:  # fmt: skip
    """The union of intervals and `spans` spans, both sorted; gives how many intervals it has."""
    here, there, united = count - count, 0, count - count  # 0, as in `add_attribution`
    while here < count or there < spans:
        if there == spans or (here < count and begin_G[here] <= start_G[there]):
            united = _join(into_begin_G, into_end_G, united, begin_G[here], end_G[here])
            here += 1
        else:
            united = _join(into_begin_G, into_end_G, united, start_G[there], finish_G[there])
            there += 1
    return united


@numba.njit(cache=True)
def add_attribution(
    start_GSR: FloatArray,
    finish_GSR: FloatArray,
    own_GSR: Own,
    label_G: NDArray[np.int32],
    stream_L: IntArray,
    category_L: IntArray,
    since_SR: FloatArray,
    until_S: FloatArray,
    seconds_CSR: FloatArray,
    compute_SR: FloatArray,
) -> None:
    """Adds the seconds of each category from `since_SR`, before which no row starts, to the end of the last row, or to
    `until_S` where that is later; `since_SR` is then moved there. `compute_SR`: of the compute stream alone.
    """
    rows, samples, ranks = start_GSR.shape
    order_G, first_K = np.empty(rows, dtype=np.int64), np.empty(_STREAMS + 1, dtype=np.int64)
    _by_stream(label_G, stream_L, order_G, first_K)
    begin_G, end_G, other_begin_G, other_end_G = np.empty(rows), np.empty(rows), np.empty(rows), np.empty(rows)
    start_G, finish_G, added_CR = np.empty(rows), np.empty(rows), np.empty((len(seconds_CSR), ranks))
    last_R, computed_R = np.empty(ranks), np.empty(ranks)
    for sample in range(samples):
        alike = _are_equal(finish_GSR, sample) and _are_equal(start_GSR, sample) and _are_equal(own_GSR, sample)
        for rank in range(1, ranks):
            alike = alike and since_SR[sample, rank] == since_SR[sample, 0]
        width = 1 if alike else ranks
        added_CR[:], computed_R[:] = 0.0, 0.0
        for rank in range(width):
            last_R[rank] = max(since_SR[sample, rank], until_S[sample])
        for row in range(rows):
            for rank in range(width):
                last_R[rank] = max(last_R[rank], finish_GSR[row, sample, rank])
        for place in range(first_K[_COMPUTE], first_K[_COMPUTE + 1]):
            row = order_G[place]
            added_R = added_CR[category_L[label_G[row]]]
            for rank in range(width):
                seconds = finish_GSR[row, sample, rank] - start_GSR[row, sample, rank]
                added_R[rank] += seconds
                computed_R[rank] += seconds
        for rank in range(width):
            count, last = first_K[0], last_R[rank]  # 0: for a literal what takes it would be compiled once more
            for place in range(first_K[_COMPUTE], first_K[_COMPUTE + 1]):
                row = order_G[place]
                count = _join(begin_G, end_G, count, start_GSR[row, sample, rank], finish_GSR[row, sample, rank])
            for stream in range(_COMPUTE + 1, _BACKGROUND):
                spans, at = first_K[stream + 1] - first_K[stream], first_K[0]
                if spans == 0:
                    continue
                for span in range(spans):
                    row = order_G[first_K[stream] + span]
                    start, finish = start_GSR[row, sample, rank], finish_GSR[row, sample, rank]
                    start_G[span], finish_G[span] = start, finish
                    while at < count and end_G[at] <= start:
                        at += 1
                    own = min(float(own_GSR[row, sample, rank]), finish - start)
                    exposed = finish - start - _covered(begin_G, end_G, count, at, start, finish)
                    exposed_own = own - _covered(begin_G, end_G, count, at, finish - own, finish)
                    added_CR[category_L[label_G[row]], rank] += exposed_own
                    added_CR[_WAIT, rank] += exposed - exposed_own
                count = _united(begin_G, end_G, count, start_G, finish_G, spans, other_begin_G, other_end_G)
                begin_G, other_begin_G = other_begin_G, begin_G
                end_G, other_end_G = other_end_G, end_G
            idle = last - since_SR[sample, rank]
            for place in range(count):
                idle -= end_G[place] - begin_G[place]
            added_CR[_BUBBLE, rank] += idle
            for one in range(rank, ranks if alike else rank + 1):
                compute_SR[sample, one] += computed_R[rank]
                since_SR[sample, one] = last
                for category in range(len(added_CR)):
                    seconds_CSR[category, sample, one] += added_CR[category, rank]


@numba.njit(cache=True)
def add_waits(
    start_GSR: FloatArray,
    finish_GSR: FloatArray,
    own_GSR: Own,
    label_G: NDArray[np.int32],
    stream_L: IntArray,
    set_LR: IntArray,
    sender_L: IntArray,
    since_R: FloatArray,
    transfers_RR: FloatArray,
    p2p_PR: FloatArray,
    round_off: float,
) -> tuple[bool, bool]:
    """Adds the seconds of sample 0 that ranks waited: in transfers for the last of their set (of `set_LR`) to come,
    `transfers_RR` [for whom, who]; and at p2p sends for each sender. `since_R`: the end of all rows before. Returns
    whether there are collectives among groups, and whether anyone waited at a p2p send.
    """
    ranks, among_groups, waited = start_GSR.shape[2], False, False
    latest_R, last_R, done_R = np.empty(ranks), np.empty(ranks, dtype=np.int64), since_R.copy()
    for row in range(len(start_GSR)):
        start_R, finish_R, own_R = start_GSR[row, 0], finish_GSR[row, 0], own_GSR[row, 0]
        stream = stream_L[label_G[row]]
        among_groups |= stream == _REDUCTION
        if stream == _COMMUNICATION:
            set_R = set_LR[label_G[row]]
            latest_R[:] = -np.inf
            for rank in range(ranks):
                if start_R[rank] > latest_R[set_R[rank]]:
                    latest_R[set_R[rank]], last_R[set_R[rank]] = start_R[rank], rank
            for rank in range(ranks):
                if start_R[rank] < latest_R[set_R[rank]]:  # others wait for chance alone
                    wait = finish_R[rank] - start_R[rank] - own_R[rank]
                    transfers_RR[last_R[set_R[rank]], rank] += max(wait, 0.0)
        elif stream == _PIPELINE:
            for rank in range(ranks):
                wait = finish_R[rank] - done_R[rank]
                if wait > round_off:
                    p2p_PR[sender_L[label_G[row]], rank] += wait
                    waited = True
        for rank in range(ranks):
            done_R[rank] = max(done_R[rank], finish_R[rank])
    return among_groups, waited


@numba.njit(cache=True)
def add_busy(
    micro_batch_G: NDArray[np.int32],
    first: int,
    last: int,
    start_GSR: FloatArray,
    finish_GSR: FloatArray,
    busy_SR: FloatArray,
) -> None:
    """Adds the seconds of an action of rows `first` to `last` - 1: see `critical_path.seconds_of_action`."""
    while first < last and micro_batch_G[first] < 0:
        first += 1
    start_R, finish_R = np.empty(busy_SR.shape[1]), np.empty(busy_SR.shape[1])
    for sample in range(busy_SR.shape[0] if first < last else 0):
        start_R[:], finish_R[:] = np.inf, -np.inf
        for row in range(first, last):
            for rank in range(len(start_R)):
                start_R[rank] = min(start_R[rank], start_GSR[row, sample, rank])
                finish_R[rank] = max(finish_R[rank], finish_GSR[row, sample, rank])
        for rank in range(len(start_R)):
            busy_SR[sample, rank] += finish_R[rank] - start_R[rank]
