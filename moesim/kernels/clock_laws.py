"""The clock under load of GPUs whose kernels come from short runs: one law, with one number of each kind.

Power is spent on FLOPs and on bytes; where a kernel, or a step, would need more than the limit leaves, the clock falls:
    log clock = -STEEPNESS * max(load / threshold - 1, 0),    load = FLOP/s + TRAFFIC * bytes/s at the free clock
Steepness and traffic are those of the two GPUs whose sustained kernels were measured: 0.27 and 30 of H200, 0.37 and 75
of H100. The threshold of a kind is where its large GEMMs fall from their short to their sustained rate. Per watt of the
limit it is alike: 0.59 and 0.55 TFLOP/s of H200 and H100, 0.49 of B200, 0.48 of RTX PRO 6000. So a kind without a
sustained rate gets that of the nearest one per watt, and the clock's error is what a threshold that far off would do.

Of a GB300 held to 500 W the law says 650 TFLOP/s; about 617 were measured (github:facebookexperimental/triton pull
request 2023), which is in no choice.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.kernels.power import LEAST_EXPONENT, PowerCap

STEEPNESS = 0.32
TRAFFIC = 50.0  # FLOPs that cost as much power as a byte
PER_WATT_ERROR = 0.2  # log of the threshold per watt of one kind over that of another, at most


@dataclass(frozen=True)
class KindPower:
    """Watts of the limit, and FLOP/s of large bf16 GEMMs in short runs and sustained, each with its source; the nearest
    kind where nothing sustained is known.
    """

    watts: float
    watts_source: str
    short: float | None = None
    sustained: float | None = None
    sustained_source: str | None = None
    nearest: str | None = None


_SHEETS = "accelerator table of github:stas00/ml-engineering, 2026"
_PACKAGE = "system file of aiconfigurator-core 0.12.0"
KIND_POWER = {
    "h200": KindPower(700, "NVIDIA H200 SXM datasheet", 8.2e14, 7.0e14, "own sustained rows, large GEMMs"),
    "b200": KindPower(
        1000, f"{_SHEETS}; power_limit column of {_PACKAGE[15:]}", 1.55e15, 1.1e15,
        "requirements of this project: a loaded B200 reaches about 1,100 TFLOP/s, short runs 1,550",
    ),
    "h100": KindPower(700, "NVIDIA H100 SXM5 datasheet", 7.6e14, 6.5e14, "own sustained rows, large GEMMs"),
    "a100": KindPower(
        400, _SHEETS, 2.707e14, 2.712e14,
        "271 TFLOP/s, mean of 100 GEMMs behind 50 of their kind, 60 ms in all (maximum achievable matmul FLOPS of "
        "github:stas00/ml-engineering); large GEMMs of the tables, which are short, have 270.7",
    ),
    "gb200": KindPower(1200, _SHEETS, nearest="b200"),
    "b300": KindPower(1100, _PACKAGE, nearest="b200"),
    "gb300": KindPower(1400, _SHEETS, nearest="b200"),
    "l40s": KindPower(350, _PACKAGE, nearest="rtx-pro-6000"),
    "rtx-pro-6000": KindPower(
        600, _PACKAGE, 4.155e14, 3.87e14,
        "387 TFLOP/s, mean of 36 torch GEMMs of 10,240 sides, the last of 0.5 s of GEMMs (Server Edition, "
        "github:zzc0721/torch-performance-test-data issue 162); large GEMMs of the tables, which are short, have 415",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class ClockLaw:
    """The law's constants, and `error`: log of the factor by which the threshold may be off."""

    cap: PowerCap
    error: float
    source: str

    @property
    def known(self) -> bool:
        """Whether a sustained rate stands behind it."""
        return self.error == 0.0

    def error_at(self, load: float) -> float:
        """Log seconds by which kernels under a load may be off because of the clock."""
        threshold = self.cap.threshold
        lower = threshold * np.exp(-self.error)
        falls = [self.cap.slope * threshold * max(load / each - 1.0, 0.0) for each in (threshold, lower)]
        return float(LEAST_EXPONENT * (falls[1] - falls[0]))

    def as_json(self) -> dict[str, Any]:
        """For the profile."""
        return {"cap": self.cap.as_json(), "error": self.error, "source": self.source}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "ClockLaw":
        """The inverse of `as_json`."""
        return ClockLaw(PowerCap(**content["cap"]), float(content["error"]), str(content["source"]))


def threshold_of(kind: KindPower) -> float:
    """The load from which the clock falls, FLOP/s: infinite where the sustained rate is that of short runs."""
    assert kind.short is not None and kind.sustained is not None
    fall = np.log(kind.short / kind.sustained) / LEAST_EXPONENT
    return float(kind.short / (1.0 + fall / STEEPNESS)) if fall > 0.0 else float("inf")


def clock_law(name: str, *, short: float) -> ClockLaw:
    """That of a kind whose large GEMMs run at `short` FLOP/s in short runs of the tables."""
    kind = KIND_POWER[name]
    if kind.short is not None:
        threshold, error, source = threshold_of(kind) * short / kind.short, 0.0, str(kind.sustained_source)
    else:
        assert kind.nearest is not None
        nearest = KIND_POWER[kind.nearest]
        threshold, error = threshold_of(nearest) * kind.watts / nearest.watts, PER_WATT_ERROR
        source = f"no sustained rate known: the threshold of {kind.nearest} per watt of the limit"
    if np.isinf(threshold):
        return ClockLaw(PowerCap(0.0, short, 0.0, TRAFFIC), error, source)
    return ClockLaw(PowerCap(0.0, threshold, STEEPNESS / threshold, TRAFFIC), error, source)
