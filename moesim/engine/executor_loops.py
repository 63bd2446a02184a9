"""Segments as loops for numba: the sums of `executor` in the same order, without an array for each of them.

Legend: K clocks, N steps of a segment, G spans, S routing samples, R ranks, Q packed durations.
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
    FIRST,
    KIND,
    LENGTH,
    NO_TRANSFER,
    OFFSET,
    OPEN_FROM,
    OPEN_UNTIL,
    RUN_BEFORE,
    RUN_BESIDE,
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
def _begin_run(clocks_KSR: FloatArray, chain: int, slowdown: float) -> None:
    for sample in range(clocks_KSR.shape[1]):
        for rank in range(clocks_KSR.shape[2]):
            start = max(clocks_KSR[chain, sample, rank], clocks_KSR[COMPUTE, sample, rank])
            before = max(clocks_KSR[OPEN_FROM, sample, rank] - start, 0.0)
            beside = max(clocks_KSR[OPEN_UNTIL, sample, rank] - start - before, 0.0) / slowdown
            clocks_KSR[RUN_START, sample, rank] = clocks_KSR[COMPUTE, sample, rank] = start
            clocks_KSR[RUN_BEFORE, sample, rank], clocks_KSR[RUN_BESIDE, sample, rank] = before, beside
            clocks_KSR[RUN_WORK, sample, rank] = 0.0


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
    samples, ranks = clocks_KSR.shape[1:]
    compute_SR, start_SR, work_SR = clocks_KSR[COMPUTE], clocks_KSR[RUN_START], clocks_KSR[RUN_WORK]
    before_SR, beside_SR = clocks_KSR[RUN_BEFORE], clocks_KSR[RUN_BESIDE]
    row = span
    for step in range(len(steps_N9)):
        step_9 = steps_N9[step]
        chain_SR = clocks_KSR[step_9[CHAIN]]
        if step_9[KIND] != _KERNEL:
            _part_or_join(chain_SR, clocks_KSR[step_9[CHAIN] + SIDE], step_9[KIND] == _FORK)
            continue
        if step_9[FIRST]:
            _begin_run(clocks_KSR, step_9[CHAIN], slowdown)
        seconds_Q, micro_batch = first_Q, first_micro_batch
        if step_9[WHICH] == 1:
            seconds_Q, micro_batch = second_Q, second_micro_batch
        for sample in range(samples):
            place = step_9[OFFSET] + micro_batch % step_9[LENGTH] * step_9[STRIDE_M] + sample * step_9[STRIDE_S]
            if step_9[STRIDE_R] == 0:
                for rank in range(ranks):
                    work_SR[sample, rank] += seconds_Q[place]
            else:
                for rank in range(ranks):
                    work_SR[sample, rank] += seconds_Q[place + rank]
            for rank in range(ranks):
                last, work = compute_SR[sample, rank], work_SR[sample, rank]
                beside = min(max(work - before_SR[sample, rank], 0.0), beside_SR[sample, rank])
                finish = work + start_SR[sample, rank] + beside * (slowdown - 1.0)
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
