"""Segments as loops for numba: the sums of `executor` in the same order, without an array for each of them.

Legend: K clocks, N steps of a segment, G spans, S routing samples, R ranks, Q packed durations.
Clocks and columns of steps are numbered in `segments`. (numba's cache looks at this file alone: when those numbers
change, change this file.)
"""

import numba
import numpy as np
from numpy.typing import NDArray

from moesim.sim.operations import SIDE, Kind
from moesim.sim.segments import (
    CHAIN,
    COMMUNICATION,
    COMPUTE,
    FIRST,
    KIND,
    LENGTH,
    NO_TRANSFER,
    OFFSET,
    OPEN_FROM,
    OPEN_UNTIL,
    STRIDE_M,
    STRIDE_R,
    STRIDE_S,
    WHICH,
)

FloatArray = NDArray[np.float64]
Own = NDArray[np.float32]

_KERNEL, _FORK = int(Kind.COMPUTE), int(Kind.FORK)


@numba.njit(cache=True)
def advance(
    clocks_KSR: FloatArray,
    steps_N9: NDArray[np.int64],
    first_Q: FloatArray,
    second_Q: FloatArray,
    first_micro_batch: int,
    second_micro_batch: int,
    slowdown: float,
    chain: int,
    span: int,
    start_GSR: FloatArray,
    finish_GSR: FloatArray,
    own_GSR: Own,
) -> None:
    """Take the steps of a segment, writing spans from `span` on, and write when its transfer (on `chain`) may start.

    `first_Q`, `first_micro_batch`: durations and micro-batch of the first pass of the action; `second_...` likewise.
    """
    for sample in range(clocks_KSR.shape[1]):
        for rank in range(clocks_KSR.shape[2]):
            clocks_K = clocks_KSR[:, sample, rank]
            row = span
            start = before = beside = work = last = 0.0
            for step_9 in steps_N9:
                at = step_9[CHAIN]
                if step_9[KIND] != _KERNEL:
                    if step_9[KIND] == _FORK:
                        clocks_K[at + SIDE] = clocks_K[at]
                    else:
                        clocks_K[at] = max(clocks_K[at], clocks_K[at + SIDE])
                    continue
                if step_9[FIRST]:
                    start = last = max(clocks_K[at], clocks_K[COMPUTE])
                    before = max(clocks_K[OPEN_FROM] - start, 0.0)
                    beside = max(clocks_K[OPEN_UNTIL] - start - before, 0.0) / slowdown
                    work = 0.0
                place = step_9[OFFSET] + sample * step_9[STRIDE_S] + rank * step_9[STRIDE_R]
                if step_9[WHICH] == 0:
                    work += first_Q[place + first_micro_batch % step_9[LENGTH] * step_9[STRIDE_M]]
                else:
                    work += second_Q[place + second_micro_batch % step_9[LENGTH] * step_9[STRIDE_M]]
                finish = work + start
                if slowdown > 1.0:
                    finish += min(max(work - before, 0.0), beside) * (slowdown - 1.0)
                start_GSR[row, sample, rank] = last
                finish_GSR[row, sample, rank] = finish
                own_GSR[row, sample, rank] = finish - last
                clocks_K[at] = clocks_K[COMPUTE] = last = finish
                row += 1
            if chain != NO_TRANSFER:
                start_GSR[row, sample, rank] = max(clocks_K[chain], clocks_K[COMMUNICATION])


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
