"""Links and GPUs that are slower than their kind, or have failed: all the time, or from some moment on.

`cluster.speeds` names ranks whose GPUs are slower or faster, `cluster.slowdowns` and `cluster.fabric.changes` what
changes while steps run. Thermal spread: on five clusters of one kind of GPU each, times of the same program varied by
8 % in the mean, 22 % on the worst of them, with outliers of 1.5 times the median (Sinha et al., "Not All GPUs Are
Created Equal", SC 2022, arXiv 2208.11035). That is the width of a distribution: as a standard deviation it is a few
per cent.
"""

from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AllowInfNan, BeforeValidator, Field, PlainSerializer, Strict, WithJsonSchema

from moesim.scenario.base import MOST_GPUS, Index, LinkFactor, Name, Section, Share
from moesim.seeding import WIDEST, stream
from moesim.units import parse_seconds


class Degraded(Section):
    """A link, node or rail whose bandwidth is multiplied by `factor`."""

    link: tuple[Name, Name] | None = Field(default=None, description="One directed link by the names of its two ends.")
    node: Index | None = Field(default=None, description="All links of this node, counted from 0.")
    rail: Index | None = Field(
        default=None, description="The network links of the GPUs with this index in their nodes."
    )
    factor: LinkFactor = Field(description="Share of the bandwidth that is left; 0: the links have failed.")


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


LATEST = 1e5  # seconds


def _instant(value: object) -> float:
    seconds = parse_seconds(value)
    if not 0 <= seconds <= LATEST:
        raise ValueError(f"must be between 0 s and {LATEST:g} s, got {seconds:g} s")
    return seconds


Instant = Annotated[
    float,
    BeforeValidator(_instant),
    PlainSerializer(lambda v: f"{v!r} s"),
    WithJsonSchema({"type": "string", "examples": ["400 ms"]}),
]
Step = Annotated[int, Field(strict=True, ge=0, le=1_000)]


class Change(Section):
    """When it holds. Routing samples stand for steps one after the other."""

    at: Instant = Field(default=0.0, description="From when in a step; absent: from its start.")
    until: Instant | None = Field(default=None, description="Until when in the step; absent: to its end.")
    from_step: Step = Field(default=0, description="The first step (routing sample, counted from 0) that it is in.")
    probability: Share = Field(default=1.0, description="Share of these steps that it is in, drawn by the seed.")

    def holds(self, instant: float) -> bool:
        """Whether it does at an instant of a step that it is in."""
        return self.at <= instant and (self.until is None or instant < self.until)


class Slowdown(Change):
    """A rank, or all GPUs of a node, of another speed for a while."""

    rank: Index | None = Field(default=None, description="The rank, counted from 0.")
    node: Index | None = Field(default=None, description="All ranks of this machine, counted from 0.")
    factor: Speed = Field(description="Its speed meanwhile over what it is else: 0.5 makes kernels take twice as long.")


class LinkChange(Change):
    """Links with a share of their bandwidth for a while: a degradation, or a flap."""

    link: tuple[Name, Name] | None = Field(default=None, description="One directed link by the names of its two ends.")
    node: Index | None = Field(default=None, description="All links of this node, counted from 0.")
    rail: Index | None = Field(
        default=None, description="The network links of the GPUs with this index in their nodes."
    )
    factor: LinkFactor = Field(description="Share of the bandwidth that is left; 0: the links are down.")

    @property
    def degraded(self) -> Degraded:
        """The same as a link that is always so."""
        return Degraded(link=self.link, node=self.node, rail=self.rail, factor=self.factor)
