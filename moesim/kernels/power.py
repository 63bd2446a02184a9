"""The clock that a kernel settles at when it runs without pause: the power limit lowers it where much is done.

Short benchmarks end before the limit acts, and their clocks are those of the mixture of kernels that ran around them.
Rows of the family `sustained` (0.15 s of one kernel behind 0.15 s of the same) give
    log clock = log free - slope * max(load - threshold, 0),    load = (FLOPs + traffic * bytes) / seconds
with the seconds that the class predicts; a kernel then takes (expected / clock) ** exponent times as long, where
expected is the clock of its benchmarks. FLOPs of FP8 operands count a share, half where
nothing tells: 10 dense GEMMs that an H200 ran without pause ask for that, 17 on an H100 for 0.6.

Legend: P sustained rows.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moesim.kernels.families import FloatArray, chip_format

MIN_ROWS = 20
FP8_SHARE = 0.5  # of the power of a bf16 FLOP where nothing was measured: half as many bits; nvfp4 half of that
# Exponents fitted within a class are too small: its benchmarks' clocks differ little, and are read with errors. This is
# what sustained rows show, whose clocks differ by a third.
LEAST_EXPONENT = 0.5
_THRESHOLDS = np.linspace(1.5e14, 4.7e14, 17)
_TRAFFICS = np.linspace(0.0, 120.0, 9)  # FLOPs that cost as much power as a byte
_HUBER = 0.08


@dataclass(frozen=True)
class PowerCap:
    """log MHz at low loads, the load (FLOP/s) from which the clock falls, its fall per FLOP/s, FLOPs worth a byte, and
    the share of a bf16 FLOP's power that one in FP8 takes.
    """

    free: float
    threshold: float
    slope: float
    traffic: float
    fp8_share: float = FP8_SHARE

    def share_of(self, dtype: str) -> float:
        """Of a bf16 FLOP's power, one of this dtype's."""
        return {"fp8": self.fp8_share, "fp4": 0.5 * self.fp8_share}.get(chip_format(dtype), 1.0)

    def load_of_step(self, flops_per_second: float, *, bandwidth: float) -> float:
        """The load of a step that does so much in the mean, half of its time at the memory's bandwidth."""
        return float(flops_per_second) + self.traffic * 0.5 * bandwidth

    def log_clock(self, load: Any) -> Any:
        """Log MHz of a kernel of this load (a float or an array)."""
        if isinstance(load, float):
            return self.free - self.slope * max(load - self.threshold, 0.0)
        return self.free - self.slope * np.maximum(load - self.threshold, 0.0)

    @staticmethod
    def from_json(stored: dict[str, Any]) -> "PowerCap":
        """The inverse of `as_json`; `rows`, the checksum of the rows that it belongs to, is the profile's."""
        return PowerCap(**{name: value for name, value in stored.items() if name != "rows"})

    def as_json(self) -> dict[str, float]:
        """Plain numbers for the profile."""
        return asdict(self)


@dataclass(frozen=True)
class SustainedRows:
    """What the cap is fitted to, per sustained row: log seconds measured and as its class predicts them, FLOPs (those
    of FP8 by their share), bytes, the log clock and the clock's exponent of its class.
    """

    measured_P: FloatArray
    predicted_P: FloatArray
    flops_P: FloatArray
    bytes_P: FloatArray
    clock_P: FloatArray
    exponent_P: FloatArray


def fit_power_cap(rows: SustainedRows) -> PowerCap | None:
    """Robust least squares on log seconds; None with too few rows, or when the clock does not fall."""
    if len(rows.measured_P) < MIN_ROWS:
        return None
    fits = [_line(rows, float(threshold), float(traffic)) for threshold in _THRESHOLDS for traffic in _TRAFFICS]
    cap, _ = min(fits, key=lambda fit: fit[1])
    return cap if cap.slope > 0 else None


def _line(rows: SustainedRows, threshold: float, traffic: float) -> tuple[PowerCap, float]:
    """Free clock and slope for a threshold and a weight of bytes, and the Huber loss that remains."""
    beyond_P = np.maximum((rows.flops_P + traffic * rows.bytes_P) / np.exp(rows.predicted_P) - threshold, 0.0)
    target_P = rows.measured_P - rows.predicted_P - rows.exponent_P * rows.clock_P
    design = rows.exponent_P[:, None] * np.stack([-np.ones_like(beyond_P), beyond_P / threshold], axis=1)
    weight_P = np.ones_like(target_P)
    for _ in range(6):
        root_P = np.sqrt(weight_P)
        (free, slope), *_ = np.linalg.lstsq(design * root_P[:, None], target_P * root_P, rcond=None)
        error_P = np.abs(target_P - design @ np.array([free, slope]))
        weight_P = np.minimum(1.0, _HUBER / np.maximum(error_P, 1e-9))
    loss = np.where(error_P < _HUBER, error_P**2, 2.0 * _HUBER * error_P - _HUBER**2).sum()
    return PowerCap(float(free), threshold, float(slope) / threshold, traffic), float(loss) / math.sqrt(len(error_P))
