"""The clock that a kernel settles at when it runs without pause: the power limit lowers it where much is computed.

Short benchmarks end before the limit acts, and their clocks are those of the mixture of kernels that ran around them.
Rows of the family `sustained` (FLOP/s reached and SM clock, over 0.15 s after 0.15 s of the same kernel) show
    clock = free - slope * max(rate - threshold, 0)
A kernel whose sustained clock lies below the clock expected of its benchmark is slowed by
(expected / sustained) ** alpha, with alpha as fitted per cell. Nothing is made faster: in a step, light kernels share
the clock that heavy ones leave.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MIN_ROWS = 20
_THRESHOLDS = np.linspace(0.1, 0.8, 36)  # as shares of the highest rate; the best one is taken


@dataclass(frozen=True)
class PowerCap:
    """MHz at low rates, the rate (FLOP/s) from which the clock falls, and MHz lost per FLOP/s beyond it."""

    free_mhz: float
    threshold: float
    slope: float

    def log_clock(self, rate: Any) -> Any:
        """Log MHz of a kernel that sustains `rate` FLOP/s (a float or an array)."""
        if isinstance(rate, float):
            return math.log(self.free_mhz - self.slope * max(rate - self.threshold, 0.0))
        return np.log(self.free_mhz - self.slope * np.maximum(rate - self.threshold, 0.0))


def fit_power_cap(rows: Sequence[dict[str, Any]]) -> PowerCap | None:
    """Least squares over `sustained` rows; None with too few of them, or when the clock does not fall."""
    if len(rows) < _MIN_ROWS:
        return None
    rate_P = np.array([float(row["flops_per_second"]) for row in rows])
    clock_P = np.array([float(row["clock_mhz"]) for row in rows])
    fits = [_line(rate_P, clock_P, float(share * rate_P.max())) for share in _THRESHOLDS]
    cap, _ = min(fits, key=lambda fit: fit[1])
    return cap if cap.slope > 0 else None


def _line(rate_P: NDArray[np.float64], clock_P: NDArray[np.float64], threshold: float) -> tuple[PowerCap, float]:
    design = np.stack([np.ones_like(rate_P), -np.maximum(rate_P - threshold, 0.0) / threshold], axis=1)
    (free, slope), *_ = np.linalg.lstsq(design, clock_P, rcond=None)
    error = float(np.square(design @ np.array([free, slope]) - clock_P).sum())
    return PowerCap(float(free), threshold, float(slope) / threshold), error
