"""Runs of kernels as a loop for numba: the sums of `executor`, without an array for each of them.

Legend: N kernels of a run, S routing samples, R ranks.
"""

import numba
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@numba.njit(cache=True)
def run_kernels(
    chain_SR: FloatArray,
    compute_SR: FloatArray,
    open_from_SR: FloatArray,
    open_until_SR: FloatArray,
    slowdown: float,
    elapsed_NSR: FloatArray,
    start_NSR: FloatArray,
    finish_NSR: FloatArray,
    own_NSR: NDArray[np.float32],
) -> None:
    """Writes the spans of kernels that follow each other; both clocks move on. See GroupExecutor._compute.

    `elapsed_NSR` may have one sample or one rank for all.
    """
    per_sample, per_rank = elapsed_NSR.shape[1] > 1, elapsed_NSR.shape[2] > 1
    for sample in range(chain_SR.shape[0]):
        of_sample = sample if per_sample else 0
        for rank in range(chain_SR.shape[1]):
            of_rank = rank if per_rank else 0
            start = max(chain_SR[sample, rank], compute_SR[sample, rank])
            before = max(open_from_SR[sample, rank] - start, 0.0)
            beside = max(open_until_SR[sample, rank] - start - before, 0.0) / slowdown
            last = start
            for kernel in range(len(elapsed_NSR)):
                work = elapsed_NSR[kernel, of_sample, of_rank]
                finish = work + start
                if slowdown > 1.0:
                    finish += min(max(work - before, 0.0), beside) * (slowdown - 1.0)
                start_NSR[kernel, sample, rank] = last
                finish_NSR[kernel, sample, rank] = finish
                own_NSR[kernel, sample, rank] = finish - last
                last = finish
            chain_SR[sample, rank] = last
            compute_SR[sample, rank] = last
