"""What changes while steps run: `cluster.slowdowns` and `cluster.fabric.changes`."""

from typing import Annotated

from pydantic import BeforeValidator, Field, PlainSerializer, WithJsonSchema

from moesim.scenario.base import Index, LinkFactor, Name, Section, Share
from moesim.scenario.degraded import Degraded
from moesim.scenario.speeds import Speed
from moesim.units import parse_seconds

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
