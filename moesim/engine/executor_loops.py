"""Segments as loops for numba: the sums of `executor` in the same order, without an array for each of them.

Legend: K clocks, N steps of a segment, C columns of one, F families of kernels, G spans, S routing samples, R ranks, Q
packed durations.
Clocks and columns of steps are numbered in `segments`. (numba's cache looks at this file alone: when those numbers
change, change this file.)
"""

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
    LENGTH,
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
    WHICH,
)
from moesim.program.operations import SIDE, Kind

FloatArray = NDArray[np.float64]
Own = NDArray[np.float32]

COMPUTE_FACTOR, TRANSFER_FACTOR, WAIT = range(3)  # fields of moesim.kernels.Beside
_KERNEL, _FORK = int(Kind.COMPUTE), int(Kind.FORK)


@numba.njit(cache=True)
def _part_or_join(main_SR: FloatArray, side_SR: FloatArray, part: bool) -> None:
    for sample in range(len(main_SR)):
        for rank in range(main_SR.shape[1]):
            if part:
                side_SR[sample, rank] = main_SR[sample, rank]
            else:
                main_SR[sample, rank] = max(main_SR[sample, rank], side_SR[sample, rank])


@numba.njit(cache=True)
def _begin_run(clocks_KSR: FloatArray, chain: int) -> None:
    for sample in range(clocks_KSR.shape[1]):
        for rank in range(clocks_KSR.shape[2]):
            start = max(clocks_KSR[chain, sample, rank], clocks_KSR[COMPUTE, sample, rank])
            clocks_KSR[RUN_START, sample, rank] = clocks_KSR[COMPUTE, sample, rank] = start
            clocks_KSR[RUN_WORK, sample, rank] = clocks_KSR[RUN_LOST, sample, rank] = 0.0


@numba.njit(cache=True)
def _lose(clocks_KSR: FloatArray, beside_3: FloatArray, work: float, sample: int, rank: int) -> float:
    """Seconds by which the open transfer ends later for `work` seconds of a kernel beside it; what these lose is added
    up in RUN_LOST. See `GroupExecutor._beside`."""
    last, opened = clocks_KSR[COMPUTE, sample, rank], clocks_KSR[OPEN_FROM, sample, rank]
    left = clocks_KSR[OPEN_UNTIL, sample, rank] - max(last, opened)
    free = min(max(opened - last, 0.0), work)
    if left <= 0.0 or free >= work:
        return 0.0
    longer = min(beside_3[WAIT], work - free) if last <= opened else 0.0
    free += longer
    beside = min(work - free, left * beside_3[TRANSFER_FACTOR] / beside_3[COMPUTE_FACTOR])
    clocks_KSR[RUN_LOST, sample, rank] += beside * (beside_3[COMPUTE_FACTOR] - 1.0)
    longer += beside * (beside_3[COMPUTE_FACTOR] * (1.0 - 1.0 / beside_3[TRANSFER_FACTOR]))
    return float(longer)


@numba.njit(cache=True)
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


@numba.njit(cache=True)
def advance(
    clocks_KSR: FloatArray,
    steps_NC: NDArray[np.int64],
    first_Q: FloatArray,
    second_Q: FloatArray,
    first_micro_batch: int,
    second_micro_batch: int,
    beside_F3R: FloatArray,
    open_span: int,
    chain: int,
    span: int,
    start_GSR: FloatArray,
    finish_GSR: FloatArray,
    own_GSR: Own,
) -> None:
    """Take the steps of a segment, writing spans from `span` on, and write when its transfer (on `chain`) may start.

    `first_Q`, `first_micro_batch`: durations and micro-batch of the first pass of the action; `second_...` likewise.
    `open_span`: the row of the latest transfer, which kernels beside it make longer.
    """
    samples, ranks = clocks_KSR.shape[1:]
    compute_SR, start_SR, work_SR = clocks_KSR[COMPUTE], clocks_KSR[RUN_START], clocks_KSR[RUN_WORK]
    lost_SR, until_SR = clocks_KSR[RUN_LOST], clocks_KSR[OPEN_UNTIL]
    before_SR = np.empty((samples, ranks))
    row = span
    for step in range(len(steps_NC)):
        step_C = steps_NC[step]
        chain_SR = clocks_KSR[step_C[CHAIN]]
        if step_C[KIND] != _KERNEL:
            _part_or_join(chain_SR, clocks_KSR[step_C[CHAIN] + SIDE], step_C[KIND] == _FORK)
            continue
        if step_C[FIRST]:
            _begin_run(clocks_KSR, step_C[CHAIN])
        seconds_Q, micro_batch = first_Q, first_micro_batch
        if step_C[WHICH] == 1:
            seconds_Q, micro_batch = second_Q, second_micro_batch
        for sample in range(samples):
            for rank in range(ranks):
                before_SR[sample, rank] = work_SR[sample, rank]
            place = step_C[OFFSET] + micro_batch % step_C[LENGTH] * step_C[STRIDE_M] + sample * step_C[STRIDE_S]
            if step_C[STRIDE_R] == 0:
                for rank in range(ranks):
                    work_SR[sample, rank] += seconds_Q[place]
            else:
                for rank in range(ranks):
                    work_SR[sample, rank] += seconds_Q[place + rank]
            for rank in range(ranks):
                last, work = compute_SR[sample, rank], work_SR[sample, rank]
                if last < until_SR[sample, rank]:
                    more = work - before_SR[sample, rank]
                    beside_3 = beside_F3R[step_C[FAMILY], :, min(rank, beside_F3R.shape[2] - 1)]
                    longer = _lose(clocks_KSR, beside_3, more, sample, rank)
                    if longer > 0.0:
                        _lengthen(clocks_KSR, open_span, longer, sample, rank, finish_GSR, own_GSR)
                finish = work + start_SR[sample, rank] + lost_SR[sample, rank]
                start_GSR[row, sample, rank] = last
                finish_GSR[row, sample, rank] = finish
                own_GSR[row, sample, rank] = finish - last
                chain_SR[sample, rank] = compute_SR[sample, rank] = finish
        row += 1
    if chain != NO_TRANSFER:
        for sample in range(samples):
            for rank in range(ranks):
                ready, free = clocks_KSR[chain, sample, rank], clocks_KSR[COMMUNICATION, sample, rank]
                start_GSR[row, sample, rank] = max(ready, free)


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
