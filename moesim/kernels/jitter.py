"""How far ranks that do the same are apart: chips, their clocks, and hosts, as distributions by kind of GPU.

A rank's time for a segment of work of T seconds is normal, with a standard deviation of T times `constant` (the same in
every segment of a step: a chip is a little slower than another) and, independent from one segment to the next, of
sqrt(`white` T): relative to T it falls with the root of T. Under the power limit chips differ more, because each finds
a clock of its own: both parts grow with the fall of the clock. Where the host sets the pace its own two numbers hold.
R ranks that wait for each other wait for the slowest: the mean of the largest of R standard normal numbers, none
beyond `WIDEST`, is `expected_most(R)`, 0.56 for two ranks, 1.42 for 8, 2.32 for 64 and nearly 3 for thousands.

Measured on H100s (docs/accuracy.md); other kinds have the same numbers, which nobody measured there.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from moesim.seeding import WIDEST


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Standard deviations of one kind of GPU and its hosts.

    chip: of the log of a rank's time, constant in a step. power: of that, per fall of the clock as a share of itself at
    low loads. flicker: seconds by which that share's square counts as `white`. host: as chip, where the host sets the
    pace; host_white (s): as `white` there.
    """

    chip: float
    power: float
    flicker: float
    host: float
    host_white: float
    source: str

    def at_fall(self, log_fall: float) -> "Jitter":
        """That of a step whose clock is so far (log) below that of low loads."""
        fall = 1.0 - math.exp(-log_fall)
        return Jitter(
            constant=math.hypot(self.chip, self.power * fall),
            white=self.flicker * fall**2,
            host=self.host,
            host_white=self.host_white,
            source=self.source,
        )


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """The spread in one step; see the top of the file. All zero: ranks are alike."""

    constant: float = 0.0
    white: float = 0.0
    host: float = 0.0
    host_white: float = 0.0
    source: str = "none"

    @property
    def is_none(self) -> bool:
        """Whether all ranks are alike."""
        return not (self.constant or self.white or self.host or self.host_white)


NO_JITTER = Jitter()
# chip: captured graphs of one pair. power: clocks of pairs in 22 steps under the power limit differed by 0.16 of their
# fall, of which two thirds tell in time. flicker: successive iterations of GEMMs without pause, whose clock falls by
# about 0.27. host, host_white: eager operations of one pair, all together and successive iterations.
_H100 = Spread(chip=0.006, power=0.10, flicker=2e-5, host=0.16, host_white=6.4e-6, source="measured on two H100")
SPREADS = {"h100": _H100}


def spread_of(kind: str) -> Spread:
    """That of a kind of GPU."""
    return SPREADS.get(kind) or replace(_H100, source="as measured on two H100")


@lru_cache(maxsize=1024)
def _of_most(ranks: int) -> tuple[float, float]:
    """Mean and standard deviation of the largest of `ranks` standard normal numbers."""
    x_N = np.linspace(-9.0, 9.0, 6001)
    below_N = np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in x_N.tolist()])
    share_N = np.diff(below_N**ranks)
    middle_N = np.clip(0.5 * (x_N[1:] + x_N[:-1]), -WIDEST, WIDEST)
    mean = float(share_N @ middle_N)
    return mean, math.sqrt(max(0.0, float(share_N @ middle_N**2) - mean**2))


def expected_most(ranks: int) -> float:
    """The mean of the largest of `ranks` standard normal numbers.

    >>> round(expected_most(2), 3), expected_most(1)
    (0.564, 0.0)
    """
    return 0.0 if ranks <= 1 else _of_most(ranks)[0]


def spread_of_most(ranks: int) -> float:
    """The standard deviation of the largest of `ranks` standard normal numbers."""
    return 1.0 if ranks <= 1 else _of_most(ranks)[1]
