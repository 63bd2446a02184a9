"""Segments as loops for numba: the sums of `executor` in the same order, without an array for each of them.

Legend: K clocks, N steps of a segment, C columns of one, F families of kernels, G spans, S routing samples, R ranks, Q
packed durations.
Clocks and columns of steps are numbered in `segments`. (numba's cache looks at this file alone: when those numbers
change, change this file.)
"""

import math

import numba
import numpy as np
from numpy.typing import NDArray

from moesim.engine.segments import (
    CHAIN,
    COMMUNICATION,
    COMPUTE,
    FAMILY,
    FIRST,
    KIND,
    LATE,
    LENGTH,
    MET,
    NO_TRANSFER,
    NUM_CHAIN_CLOCKS,
    OFFSET,
    OPEN_FROM,
    OPEN_UNTIL,
    RUN_LOST,
    RUN_START,
    RUN_WORK,
    STRIDE_M,
    STRIDE_R,
    STRIDE_S,
    UNMET,
    WAITED,
    WHICH,
)
from moesim.program.operations import SIDE, Kind

FloatArray = NDArray[np.float64]
Own = NDArray[np.float32]

COMPUTE_FACTOR, TRANSFER_FACTOR, WAIT = range(3)  # fields of moesim.kernels.Beside
_KERNEL, _TRANSFER, _FORK, _JOIN = int(Kind.COMPUTE), int(Kind.TRANSFER), int(Kind.FORK), int(Kind.JOIN)


@numba.njit()
def _is_same(values_R: NDArray[np.floating]) -> bool:
    for rank in range(1, len(values_R)):  # noqa: SIM110 (numba knows no generators)
        if values_R[rank] != values_R[0]:
            return False
    return True


@numba.njit()
def _are_alike(clocks_KSR: FloatArray, sample: int) -> bool:
    """Whether every clock of a sample shows the same on all ranks."""
    for clock in range(len(clocks_KSR)):  # noqa: SIM110
        if not _is_same(clocks_KSR[clock, sample]):
            return False
    return True


@numba.njit()
def _spread(values_R: NDArray[np.floating]) -> None:
    """All ranks are where the first one is."""
    for rank in range(1, len(values_R)):
        values_R[rank] = values_R[0]


@numba.njit(error_model="numpy")
def _lose(beside_3: FloatArray, last: float, opened: float, until: float, work: float) -> tuple[float, float]:
    """Seconds by which the open transfer ends later for `work` seconds of a kernel beside it, and those that it loses.

    `last`: when the kernel begins; the transfer runs from `opened` to `until`. See `executor._beside`.
    """
    left = until - max(last, opened)
    free = min(max(opened - last, 0.0), work)
    if left <= 0.0 or free >= work:
        return 0.0, 0.0
    longer = min(beside_3[WAIT], work - free) if last <= opened else 0.0
    free += longer
    beside = min(work - free, left * beside_3[TRANSFER_FACTOR] / beside_3[COMPUTE_FACTOR])
    lost = beside * (beside_3[COMPUTE_FACTOR] - 1.0)
    longer += beside * (beside_3[COMPUTE_FACTOR] * (1.0 - 1.0 / beside_3[TRANSFER_FACTOR]))
    return longer, lost


@numba.njit()
def _lengthen(
    clocks_KSR: FloatArray, span: int, longer: float, sample: int, rank: int, finish_GSR: FloatArray, own_GSR: Own
) -> None:
    """The latest transfer, of row `span`, ends later, and with it what waits for it."""
    until = clocks_KSR[OPEN_UNTIL, sample, rank]
    for chain in range(NUM_CHAIN_CLOCKS):
        if clocks_KSR[chain, sample, rank] == until:
            clocks_KSR[chain, sample, rank] = until + longer
    clocks_KSR[COMMUNICATION, sample, rank] = clocks_KSR[OPEN_UNTIL, sample, rank] = until + longer
    finish_GSR[span, sample, rank] = until + longer
    own_GSR[span, sample, rank] += longer


@numba.njit()
def _add_seconds(work_R: FloatArray, seconds_R: FloatArray) -> None:
    """Adds the seconds of every rank, or (one entry) of all."""
    if len(seconds_R) == 1:
        for rank in range(len(work_R)):
            work_R[rank] += seconds_R[0]
    else:
        for rank in range(len(work_R)):
            work_R[rank] += seconds_R[rank]


@numba.njit()
def _kernel(
    clocks_KSR: FloatArray, step_C: NDArray[np.int64], seconds_Q: FloatArray, place: int, beside_F3R: FloatArray,
    open_span: int, row: int, sample: int, ranks: int, start_GSR: FloatArray, finish_GSR: FloatArray, own_GSR: Own,
) -> None:  # fmt: skip
    """One kernel on the first `ranks` ranks, its durations from `place` on."""
    chain_R, compute_R = clocks_KSR[step_C[CHAIN], sample], clocks_KSR[COMPUTE, sample]
    begun_R, work_R, lost_R = clocks_KSR[RUN_START, sample], clocks_KSR[RUN_WORK, sample], clocks_KSR[RUN_LOST, sample]
    opened_R, until_R = clocks_KSR[OPEN_FROM, sample], clocks_KSR[OPEN_UNTIL, sample]
    start_R, finish_R, own_R = start_GSR[row, sample], finish_GSR[row, sample], own_GSR[row, sample]
    if step_C[FIRST]:
        for rank in range(ranks):
            begun_R[rank] = max(chain_R[rank], compute_R[rank])
        for rank in range(ranks):
            compute_R[rank] = begun_R[rank]
            work_R[rank] = lost_R[rank] = 0.0
    stride, kinds, family = step_C[STRIDE_R], beside_F3R.shape[2], step_C[FAMILY]
    is_open = False
    for rank in range(ranks):
        is_open |= compute_R[rank] < until_R[rank]
    if is_open:
        for rank in range(ranks):
            last, seconds = compute_R[rank], seconds_Q[place + rank * stride]
            if last < until_R[rank]:
                beside_3 = beside_F3R[family, :, min(rank, kinds - 1)]
                work = work_R[rank] + seconds - work_R[rank]
                longer, lost = _lose(beside_3, last, opened_R[rank], until_R[rank], work)
                lost_R[rank] += lost
                if longer > 0.0:
                    _lengthen(clocks_KSR, open_span, longer, sample, rank, finish_GSR, own_GSR)
    # Short loops, each over a few arrays: these are what a compiler makes vector instructions of.
    _add_seconds(work_R[:ranks], seconds_Q[place : place + 1 + (ranks - 1) * stride])
    for rank in range(ranks):
        start_R[rank] = compute_R[rank]
    for rank in range(ranks):
        compute_R[rank] = work_R[rank] + begun_R[rank] + lost_R[rank]
    for rank in range(ranks):
        finish_R[rank] = chain_R[rank] = compute_R[rank]
    for rank in range(ranks):
        own_R[rank] = compute_R[rank] - start_R[rank]


@numba.njit()
def _late(clocks_KSR: FloatArray, jitter_3: FloatArray, last: float, sample: int, ranks: int) -> float:
    """Seconds by which a meeting begins later than `last`, when the last of the first `ranks` ranks comes by its own
    work: `moesim.engine.lateness`, of ranks that all meet and whose host never limits.
    """
    constant, white, factor = jitter_3
    met_R, opened_R = clocks_KSR[MET, sample], clocks_KSR[OPEN_FROM, sample]
    most, num_ranks = 0.0, len(met_R)
    for rank in range(ranks):
        work = max(opened_R[rank] - met_R[rank], 0.0)
        most = max(most, work)
        clocks_KSR[UNMET, sample, rank] += work
        clocks_KSR[WAITED, sample, rank] += factor * math.log(num_ranks) * (constant * work)
    scale = math.sqrt((constant * most) ** 2 + white * most) * factor
    late = 0.0
    if scale > 0.0:
        total = 0.0
        for rank in range(ranks):
            total += math.exp((opened_R[rank] - last) / scale)
        late = scale * math.log(total * (num_ranks / ranks))
    for rank in range(ranks):
        clocks_KSR[LATE, sample, rank] += late
    return late


@numba.njit()
def _meeting(
    clocks_KSR: FloatArray, step_C: NDArray[np.int64], seconds_Q: FloatArray, place: int, jitter_3: FloatArray,
    row: int, sample: int, ranks: int, start_GSR: FloatArray, finish_GSR: FloatArray, own_GSR: Own,
) -> None:  # fmt: skip
    """One transfer in which nobody begins before the last of the first `ranks` ranks has come."""
    chain_R, free_R = clocks_KSR[step_C[CHAIN], sample], clocks_KSR[COMMUNICATION, sample]
    opened_R, until_R = clocks_KSR[OPEN_FROM, sample], clocks_KSR[OPEN_UNTIL, sample]
    last = -np.inf
    for rank in range(ranks):
        opened_R[rank] = max(chain_R[rank], free_R[rank])
        last = max(last, opened_R[rank])
    late = 0.0
    if jitter_3[2] > 0.0:
        late = _late(clocks_KSR, jitter_3, last, sample, ranks)
    for rank in range(ranks):
        alone = seconds_Q[place + rank * step_C[STRIDE_R]]
        start, done = opened_R[rank], last + alone
        if late > 0.0:
            done += late
        clocks_KSR[MET, sample, rank] = done
        chain_R[rank] = free_R[rank] = until_R[rank] = done
        start_GSR[row, sample, rank], finish_GSR[row, sample, rank] = start, done
        own_GSR[row, sample, rank] = min(alone, done - start)


@numba.njit()
def _part_or_join(main_R: FloatArray, side_R: FloatArray, part: bool) -> None:
    for rank in range(len(main_R)):
        if part:
            side_R[rank] = main_R[rank]
        else:
            main_R[rank] = max(main_R[rank], side_R[rank])


@numba.njit(cache=True)
def advance(
    clocks_KSR: FloatArray,
    steps_NC: NDArray[np.int64],
    first_Q: FloatArray,
    second_Q: FloatArray,
    alike_S: NDArray[np.bool_],
    first_micro_batch: int,
    second_micro_batch: int,
    jitter_3: FloatArray,
    beside_F3R: FloatArray,
    open_F3R: FloatArray,
    open_span: int,
    chain: int,
    span: int,
    start_GSR: FloatArray,
    finish_GSR: FloatArray,
    own_GSR: Own,
) -> int:
    """Take the steps of a segment, writing spans from `span` on, and write when its transfer (on `chain`) may start.

    `first_Q`, `first_micro_batch`: durations and micro-batch of the first pass of the action; `second_...` likewise.
    `alike_S` (one entry may stand for all samples): whether all ranks have the same durations. Where they have, and
    the same clocks, one rank is walked for all.
    `jitter_3`: the two standard deviations of a rank's work and what they count times (`Lateness.loops`), 0 for none.
    `open_span`: the row of the latest transfer, which kernels beside it make longer by `open_F3R`; transfers among the
    steps have `beside_F3R`. Returns the row of the latest transfer then, or -1 where it is the same.
    """
    samples, ranks = clocks_KSR.shape[1:]
    opened = -1
    for sample in range(samples):
        alike = alike_S[min(sample, len(alike_S) - 1)] and beside_F3R.shape[2] == open_F3R.shape[2] == 1
        alike = alike and _are_alike(clocks_KSR, sample)
        if alike and open_span >= 0:
            alike = _is_same(own_GSR[open_span, sample])
        width, row, latest, facts_F3R = (1 if alike else ranks), span, open_span, open_F3R
        before = 0.0
        if alike and open_span >= 0:
            before = own_GSR[open_span, sample, 0]
        for step in range(len(steps_NC)):
            step_C = steps_NC[step]
            if step_C[KIND] == _FORK or step_C[KIND] == _JOIN:
                chain_R, side_R = clocks_KSR[step_C[CHAIN], sample], clocks_KSR[step_C[CHAIN] + SIDE, sample]
                _part_or_join(chain_R[:width], side_R[:width], step_C[KIND] == _FORK)
                continue
            seconds_Q, micro_batch = first_Q, first_micro_batch
            if step_C[WHICH] == 1:
                seconds_Q, micro_batch = second_Q, second_micro_batch
            place = step_C[OFFSET] + micro_batch % step_C[LENGTH] * step_C[STRIDE_M] + sample * step_C[STRIDE_S]
            spans = start_GSR, finish_GSR, own_GSR
            if step_C[KIND] == _KERNEL:
                _kernel(clocks_KSR, step_C, seconds_Q, place, facts_F3R, latest, row, sample, width, *spans)
            else:
                _meeting(clocks_KSR, step_C, seconds_Q, place, jitter_3, row, sample, width, *spans)
                latest = opened = row
                facts_F3R = beside_F3R
            row += 1
        if alike:
            for clock in range(len(clocks_KSR)):
                _spread(clocks_KSR[clock, sample])
            for filled in range(span, row):
                _spread(start_GSR[filled, sample])
                _spread(finish_GSR[filled, sample])
                _spread(own_GSR[filled, sample])
            if open_span >= 0 and own_GSR[open_span, sample, 0] != before:
                _spread(finish_GSR[open_span, sample])
                _spread(own_GSR[open_span, sample])
    if chain != NO_TRANSFER:
        row = span
        for step in range(len(steps_NC)):
            row += steps_NC[step, KIND] == _KERNEL or steps_NC[step, KIND] == _TRANSFER
        for sample in range(samples):
            for rank in range(ranks):
                ready, free = clocks_KSR[chain, sample, rank], clocks_KSR[COMMUNICATION, sample, rank]
                start_GSR[row, sample, rank] = max(ready, free)
    return opened


@numba.njit(cache=True)
def settle(
    clocks_KSR: FloatArray,
    chain: int,
    span: int,
    done_SR: FloatArray,
    alone_SR: FloatArray,
    start_GSR: FloatArray,
    finish_GSR: FloatArray,
    own_GSR: Own,
) -> None:
    """Write the end of the transfer of row `span`, done at `done_SR`, and move its clocks on."""
    for sample in range(done_SR.shape[0]):
        for rank in range(done_SR.shape[1]):
            start, done = start_GSR[span, sample, rank], done_SR[sample, rank]
            clocks_KSR[chain, sample, rank] = clocks_KSR[COMMUNICATION, sample, rank] = done
            clocks_KSR[OPEN_FROM, sample, rank], clocks_KSR[OPEN_UNTIL, sample, rank] = start, done
            finish_GSR[span, sample, rank] = done
            own_GSR[span, sample, rank] = min(alone_SR[sample, rank], done - start)
