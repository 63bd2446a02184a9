"""The clock under load of GPUs whose kernels come from short runs: a law per kind, and how far it is known.

A law (`moesim.kernels.power.PowerCap`) needs the power limit, the rate of large GEMMs in short runs and one rate that
is sustained. Its clocks are relative to the short runs', 1 at low loads. From `THRESHOLD` of the short rate on the log
of the clock falls linearly, so that the largest GEMMs reach the sustained rate; the threshold is that of the two GPUs
whose sustained kernels were measured (0.44 and 0.52 of the rate of H200 and H100).

Without a sustained rate nobody knows the fall: it lies between none and that of the nearest kind that has one. The law
then takes the half, and the clock's error is the other half.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moesim.kernels.power import LEAST_EXPONENT, PowerCap

THRESHOLD = 0.48  # of the short runs' rate


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
        "271 TFLOP/s, mean of 100 products behind 50 of their kind, 60 ms in all (maximum achievable matmul FLOPS of "
        "github:stas00/ml-engineering); large GEMMs of the tables, which are short, have 270.7",
    ),
    "gb200": KindPower(1200, _SHEETS, nearest="b200"),
    "b300": KindPower(1100, _PACKAGE, nearest="b200"),
    "gb300": KindPower(1400, _SHEETS, nearest="b200"),
    "l40s": KindPower(350, _PACKAGE, nearest="h200"),
    "rtx-pro-6000": KindPower(600, _PACKAGE, nearest="h200"),
}  # fmt: skip


def full_fall(kind: KindPower) -> float:
    """By how much the log of the clock falls at the rate of short runs, of a kind with a sustained rate."""
    assert kind.short is not None and kind.sustained is not None
    return max(0.0, float(np.log(kind.short / kind.sustained) / LEAST_EXPONENT))


@dataclass(frozen=True)
class ClockLaw:
    """The law's constants, and `error`: log seconds by which large GEMMs at full load may be off either way."""

    cap: PowerCap
    error: float
    source: str

    @property
    def known(self) -> bool:
        """Whether a sustained rate stands behind it."""
        return self.error == 0.0

    def error_at(self, flops_per_second: float) -> float:
        """Log seconds by which kernels of a step of this load may be off because of the clock."""
        if self.known:
            return 0.0
        fall = self.cap.slope * max(flops_per_second - self.cap.threshold, 0.0)
        return LEAST_EXPONENT * fall

    def as_json(self) -> dict[str, Any]:
        """For the profile."""
        return {"cap": self.cap.as_json(), "error": self.error, "source": self.source}

    @staticmethod
    def from_json(content: dict[str, Any]) -> "ClockLaw":
        """The inverse of `as_json`."""
        return ClockLaw(PowerCap(**content["cap"]), float(content["error"]), str(content["source"]))


def clock_law(name: str, *, short: float) -> ClockLaw:
    """That of a kind whose large GEMMs run at `short` FLOP/s in short runs."""
    kind = KIND_POWER[name]
    if kind.sustained is not None:
        fall, error, source = full_fall(kind), 0.0, str(kind.sustained_source)
    else:
        assert kind.nearest is not None
        fall = 0.5 * full_fall(KIND_POWER[kind.nearest])
        error = LEAST_EXPONENT * fall
        source = f"no sustained rate known: half the fall of {kind.nearest}, the other half its error"
    threshold = THRESHOLD * short
    return ClockLaw(PowerCap(0.0, threshold, fall / (short - threshold), 0.0), error, source)
