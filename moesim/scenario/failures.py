"""What stops a job or slows it down: degraded links, slow and slowing GPUs, and the `failures` section.

`cluster.speeds` names ranks whose GPUs are slower or faster, `cluster.slowdowns` and `cluster.fabric.changes` what
changes while steps run. Thermal spread: on five clusters of one kind of GPU each, times of the same program varied by
8 % in the mean, 22 % on the worst of them, with outliers of 1.5 times the median (Sinha et al., "Not All GPUs Are
Created Equal", SC 2022, arXiv 2208.11035). That is the width of a distribution: as a standard deviation it is a few
per cent.

The `failures` section: what stops a job and how often, how it goes on, what it keeps, and who is slow. Published
interruptions of real jobs are data (`catalogue/failures.yaml`): what stopped them, how often, on how many GPUs, and who
says so. A scenario names a record in `failures.record`; its rates are the counts over the parts and the time observed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AllowInfNan,
    BeforeValidator,
    Discriminator,
    Field,
    PlainSerializer,
    Strict,
    Tag,
    WithJsonSchema,
    model_validator,
)

from moesim.scenario.base import (
    MOST_GPUS,
    Bandwidth,
    Bytes,
    Coefficient,
    Efficiency,
    Flag,
    Index,
    LinkFactor,
    Name,
    Section,
    Share,
    Text,
    one_of,
)
from moesim.scenario.catalogue import catalogue
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


class LinkChange(Degraded, Change):
    """Links with a share of their bandwidth for a while: a degradation, or a flap."""

    @property
    def degraded(self) -> Degraded:
        """The same as a link that is always so."""
        return Degraded(link=self.link, node=self.node, rail=self.rail, factor=self.factor)


Part = Literal["gpu", "nic", "node", "job"]


@dataclass(frozen=True, kw_only=True)
class RecordedCause:
    """What stopped a job. per: the part that fails, of which a job has more the larger it is; job: of any size alike.

    broken: the part's node leaves the job and is repaired; otherwise the job starts again on the same nodes.
    """

    name: str
    count: float
    per: Part
    broken: bool


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """Interruptions of `gpus` GPUs in `days` days. kinds: the GPUs of the catalogue that they were.

    checked: whether the figures here were compared with the published table; else they are quoted, an assumption.
    """

    name: str
    about: str
    kinds: tuple[str, ...]
    gpus: int
    gpus_per_node: int
    nics_per_node: int
    days: float
    causes: tuple[RecordedCause, ...]
    source: str
    checked: bool

    def per_hour(self, cause: RecordedCause) -> float:
        """Interruptions of one part (GPU, NIC, node, or the whole job) in an hour."""
        nodes = self.gpus / self.gpus_per_node
        parts = {"gpu": self.gpus, "nic": nodes * self.nics_per_node, "node": nodes, "job": 1}[cause.per]
        return cause.count / (parts * self.days * 24)


def _records() -> Iterator[FailureRecord]:
    for name, entry in catalogue("failures").items():
        causes = tuple(RecordedCause(**cause) for cause in entry["causes"])
        yield FailureRecord(name=name, **{**entry, "kinds": tuple(entry["kinds"]), "causes": causes})


NO_FAILURES = FailureRecord(
    name="none",
    about="nothing but the causes that the scenario lists",
    kinds=(),
    gpus=1,
    gpus_per_node=1,
    nics_per_node=1,
    days=1,
    causes=(),
    source="scenario",
    checked=True,
)
FAILURE_RECORDS = {record.name: record for record in (*_records(), NO_FAILURES)}


def record_of_gpu(gpu: str) -> FailureRecord:
    """The first record of this kind of GPU; the first of all where nobody has published one."""
    records = list(FAILURE_RECORDS.values())
    return next((record for record in records if gpu in record.kinds), records[0])


LONGEST = 10 * 366 * 86400.0  # seconds of a period: ten years


def _period(value: object) -> float:
    try:
        seconds = parse_seconds(value)
    except ValueError as error:
        raise ValueError(str(error).replace("3.3 us", "30 min")) from None
    if seconds > LONGEST:
        raise ValueError(f'"{value}" is longer than ten years')
    return seconds


def _positive_period(value: object) -> float:
    seconds = _period(value)
    if seconds < 1e-3:
        raise ValueError(f'"{value}" is shorter than 1 ms; write it as 30 min')
    return seconds


_EXAMPLE = WithJsonSchema({"type": "string", "examples": ["30 min"]})
Period = Annotated[float, BeforeValidator(_period), PlainSerializer(lambda v: f"{v!r} s"), _EXAMPLE]
PositivePeriod = Annotated[float, BeforeValidator(_positive_period), PlainSerializer(lambda v: f"{v!r} s"), _EXAMPLE]
Steps = Annotated[int, Strict(), Field(gt=0, le=10**9)]
RecordName = Annotated[str, one_of(FAILURE_RECORDS), WithJsonSchema({"enum": list(FAILURE_RECORDS), "type": "string"})]

DETECTION_SECONDS = 600.0
RESTART_SECONDS = 300.0
WRITE_PER_NODE = 10 * 2.0**30  # bytes/s
COPY_TO_HOST = 32e9  # bytes/s of a GPU

# Where the defaults are taken from. None of the three papers' texts could be compared here: each is an assumption.
ASSUMED = {
    "detection": "10 min: MegaScale (arXiv 2402.15627) is quoted for less than that in the mean",
    "restart": "5 min: what arXiv 2410.21680 is quoted to reckon with until a job computes again",
    "write_per_node": "10 GiB/s: 3FS (arXiv 2408.14158) is quoted for more than that when it saves checkpoints",
    "copy_bandwidth": "32 GB/s: the nominal rate of PCIe 4.0 x16 in one direction",
}


def _interval_form(value: object) -> str:
    if isinstance(value, bool):
        return "<text>"
    if isinstance(value, int):
        return "<number>"
    return "<best>" if value == "best" else "<text>"


# The tags in angle brackets never show: they only keep pydantic from reporting all forms for one mistake.
Interval = Annotated[
    Annotated[Steps, Tag("<number>")]
    | Annotated[Literal["best"], Tag("<best>")]
    | Annotated[PositivePeriod, Tag("<text>")],
    Discriminator(_interval_form),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1, "maximum": 10**9}, {"type": "string", "examples": ["30 min"]}]}
    ),
]


class Cause(Section):
    """What stops the job beside the record, or in place of the record's cause of this name."""

    name: Name = Field(description="Name of the cause; one of the record's replaces it.")
    per: Literal["gpu", "nic", "node", "job"] = Field(
        default="gpu", description="The part that fails, each of the job's for itself; job: the job as a whole."
    )
    every: PositivePeriod = Field(description="Mean time between failures of one part, such as 5000 d.")
    broken: Flag = Field(
        default=True, description="Whether the part's node leaves the job for repair, or the job just starts again."
    )


class Checkpoint(Section):
    """What is saved, how often and how fast."""

    interval: Interval = Field(
        default="best",
        description="Work between checkpoints: steps (a whole number), a time (30 min), or best, which the simulation "
        "searches.",
    )
    asynchronous: Flag = Field(
        default=False,
        description="Whether the job goes on while storage writes; it then stands only for the copy to its hosts.",
    )
    size: Bytes | None = Field(
        default=None, description="Bytes of one checkpoint; absent: weights, master copy and optimizer states."
    )
    write_per_node: Bandwidth = Field(default=WRITE_PER_NODE, description="What one node writes to storage.")
    write_total: Bandwidth | None = Field(
        default=None, description="What the storage takes in from all nodes together; absent: no limit."
    )
    read_per_node: Bandwidth | None = Field(
        default=None, description="What one node reads when the job starts again; absent: as it writes."
    )
    read_total: Bandwidth | None = Field(
        default=None, description="What the storage gives to all nodes together; absent: as it takes in."
    )
    copy_bandwidth: Bandwidth = Field(
        default=COPY_TO_HOST, description="What a GPU copies to its host, when asynchronous."
    )


class Slow(Section):
    """A part that is slow from a moment on: the whole job waits for it."""

    part: Literal["rank", "node_links"] = Field(
        description="rank: the compute of one rank; node_links: all links of one node, with which the step is "
        "simulated again."
    )
    factor: Efficiency = Field(description="Share of its speed or bandwidth that is left.")
    start: Period = Field(default=0.0, description="When it begins, from the start of the job.")
    lasts: PositivePeriod | None = Field(default=None, description="How long it lasts; absent: to the end.")
    every: PositivePeriod | None = Field(
        default=None,
        description="It flaps: from start on it comes at random, in the mean so long behind the end of the last time, "
        "and lasts as long as lasts says; absent: it comes once.",
    )
    node: Index = Field(default=0, description="The node whose links are slow; of no account for a rank.")

    @model_validator(mode="after")
    def _ends(self) -> "Slow":
        if self.every is not None and self.lasts is None:
            raise ValueError("what comes again needs lasts beside every: how long each time lasts, such as 30 s")
        return self


class Failures(Section):
    """What `moesim goodput` and plans with goal.failures add to the step: interruptions, checkpoints, slow parts."""

    record: RecordName | None = Field(
        default=None,
        description="; ".join(f"{record.name}: {record.about}" for record in FAILURE_RECORDS.values())
        + "; absent: that of the GPU, or llama3_h100.",
    )
    factor: Coefficient = Field(default=1.0, description="Factor on all rates of the record.")
    causes: Annotated[tuple[Cause, ...], Field(max_length=1_000)] = Field(
        default=(), description="Causes of one's own."
    )
    detection: Period = Field(
        default=DETECTION_SECONDS, description="From a failure until the job is stopped and diagnosed."
    )
    restart: Period = Field(
        default=RESTART_SECONDS,
        description="From there until the job reads its checkpoint: scheduling, processes, communicators.",
    )
    spares: Annotated[int, Strict(), Field(ge=0, le=65_536)] | None = Field(
        default=None, description="Nodes that stand by, paid for; absent: a node is always there, at no price."
    )
    without_spare: Literal["wait", "shrink"] = Field(
        default="wait",
        description="What the job does when no spare is left: wait for a repair, or go on with fewer data-parallel "
        "ranks until one is there.",
    )
    repair: PositivePeriod | None = Field(default=None, description="How long a broken node is away; needed by spares.")
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="Checkpoints; absent: synchronous, best interval.")
    slow: Annotated[tuple[Slow, ...], Field(max_length=1_000)] = Field(
        default=(), description="Ranks and links that are slow for a while or to the end."
    )
    jitter: Coefficient = Field(
        default=0.0,
        description="Mean share by which the compute of each rank is longer in a step, drawn anew for each rank and "
        "step from an exponential distribution; the step waits for the slowest.",
    )
    source: Text = Field(default="", description="Who says so, for rates and times of one's own.")

    @model_validator(mode="after")
    def _repairs(self) -> "Failures":
        if self.spares is not None and self.repair is None:
            raise ValueError("spares need repair beside them: how long a broken node is away, such as 24 h")
        if self.spares is None and (self.repair is not None or self.without_spare != "wait"):
            raise ValueError("repair and without_spare are of no account without spares; add spares: 0 or more")
        names = [cause.name for cause in self.causes]
        twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if twice is not None:
            raise ValueError(f'causes: "{twice}" is listed twice; give each cause its own name')
        return self

    def record_for(self, default: FailureRecord) -> FailureRecord:
        """The record that is named, or the default."""
        return default if self.record is None else FAILURE_RECORDS[self.record]
