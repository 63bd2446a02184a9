"""The look-up of `attribution` as a loop for numba: the same sums as its numpy, without a search per column.

Legend: N spans of one stream, Q columns (samples * ranks), M instants per column.
"""

import numba
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


@numba.njit(cache=True)
def add_covered(
    covered_MQ: FloatArray,
    time_MQ: FloatArray,
    start_NQ: FloatArray,
    finish_NQ: FloatArray,
    before_NQ: FloatArray,
    exposed_NQ: FloatArray,
    higher_NQ: FloatArray,
    shared: bool,
) -> None:
    """Adds what a stream covers in (-inf, time]; see `_Coverage.until`.

    `covered_MQ` holds what higher streams cover until then. Instants of a column mostly ascend: the span that the last
    one fell into is where the search for the next begins.
    """
    num_spans = len(start_NQ)
    next_Q = np.zeros(time_MQ.shape[1], dtype=np.int64)  # the first span that starts later
    for row in range(len(time_MQ)):
        for column in range(time_MQ.shape[1]):
            time, span = time_MQ[row, column], next_Q[column]
            while span < num_spans and start_NQ[span, column] <= time:
                span += 1
            while span > 0 and start_NQ[span - 1, column] > time:
                span -= 1
            next_Q[column] = span
            if span == 0:
                continue
            span -= 1
            if shared and time >= finish_NQ[span, column]:
                inside = exposed_NQ[span, column]
            else:
                inside = min(time, finish_NQ[span, column]) - start_NQ[span, column]
                if shared:
                    inside -= covered_MQ[row, column] - higher_NQ[span, column]
            covered_MQ[row, column] += before_NQ[span, column] + inside
