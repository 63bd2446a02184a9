"""The `cluster.speeds` section: ranks whose GPUs are slower or faster than their kind.

Thermal spread: on five clusters of one kind of GPU each, times of the same program varied by 8 % in the mean, 22 % on
the worst of them, with outliers of 1.5 times the median (Sinha et al., "Not All GPUs Are Created Equal", SC 2022, arXiv
2208.11035). That is the width of a distribution: as a standard deviation it is a few per cent.
"""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AllowInfNan, Field, Strict

from moesim.scenario.base import MOST_GPUS, Index, Section
from moesim.seeding import WIDEST, stream

Speed = Annotated[float, Strict(), AllowInfNan(False), Field(ge=1e-3, le=2)]


class RankSpeed(Section):
    """One rank and its speed."""

    rank: Index = Field(description="The rank, counted from 0.")
    factor: Speed = Field(
        description="Its speed over that of its kind of GPU: 0.8 makes kernels take 1.25 times as long."
    )


class Speeds(Section):
    """Speeds of ranks over those of their kinds of GPU; where several keys are given, factors multiply."""

    factors: tuple[Speed, ...] | None = Field(
        default=None, min_length=1, max_length=MOST_GPUS, description="The speed of every rank; absent: 1."
    )
    ranks: tuple[RankSpeed, ...] = Field(default=(), max_length=MOST_GPUS, description="Speeds of single ranks.")
    spread: Annotated[float, Strict(), AllowInfNan(False), Field(ge=0, le=0.3)] = Field(
        default=0.0,
        description="Standard deviation of speeds that are drawn for every rank, by the seed, such as 0.02; "
        "clusters of one kind of GPU were 8 % wide in the mean (Sinha et al., SC 2022).",
    )
    shape: Literal["normal", "lognormal"] = Field(
        default="normal", description="Distribution that they are drawn from: around 1, within three spreads."
    )

    def of_ranks(self, world: int, *, seed: int) -> NDArray[np.float64] | None:
        """[W]: the speed of every rank; None where all are as fast as their kind."""
        if self == Speeds():
            return None
        speed_W = np.ones(world)
        if self.factors is not None:
            speed_W *= np.array(self.factors[:world])
        for one in self.ranks:
            speed_W[one.rank] *= one.factor
        if self.spread:
            drawn_W = np.clip(stream(seed, "speeds").normal(size=world), -WIDEST, WIDEST) * self.spread
            speed_W *= np.exp(drawn_W) if self.shape == "lognormal" else 1.0 + drawn_W
        return speed_W
