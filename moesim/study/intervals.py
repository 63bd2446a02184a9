"""The mean of repeated values and its 90 % interval: one rule for the tables of sweeps and for plots."""

import math
import statistics
from collections.abc import Sequence

# 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; any table of statistics has them
T_95 = (
    6.3138, 2.9200, 2.3534, 2.1318, 2.0150, 1.9432, 1.8946, 1.8595, 1.8331, 1.8125, 1.7959, 1.7823, 1.7709, 1.7613,
    1.7531, 1.7459, 1.7396, 1.7341, 1.7291, 1.7247, 1.7207, 1.7171, 1.7139, 1.7109, 1.7081, 1.7056, 1.7033, 1.7011,
    1.6991, 1.6973,
)  # fmt: skip
NORMAL_95 = 1.644854


def student_t_95(freedom: int) -> float:
    """95 % quantile of Student's t, hence half the width of a 90 % interval in standard errors.

    Beyond the table the expansion in 1 / freedom around the normal quantile z (Abramowitz and Stegun, 26.7.5).
    """
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = NORMAL_95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def half_width_90(values: Sequence[float]) -> float:
    """Half the 90 % interval of the mean of at least two independent values, t s / sqrt(n); in their unit."""
    assert len(values) >= 2, "a single value has no interval"
    return student_t_95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
