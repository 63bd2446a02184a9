"""What a plan file says: a model, a goal, what may be rented, and what the planner may choose.

Sections that a scenario has too (model, routing, dispatch, ...) are those of a scenario. `choices` lists the values
that the planner may take, key by key; a key that is not listed has the value of a scenario that leaves it out.
"""

from datetime import date
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from moesim.scenario import (
    Capacity,
    Compute,
    Contiguous,
    Dispatch,
    Fabric,
    Implementation,
    Memory,
    Model,
    Network,
    NoCapacity,
    Overlap,
    PipelineSchedule,
    Placement,
    Precision,
    Routing,
    Section,
    Uncertainty,
    UniformRouting,
    Zero,
)
from moesim.scenario.base import Count, Flag, PositiveFloat, PositiveInt, Share
from moesim.scenario.schema import AnyRecompute


def _day(value: object) -> date:
    try:
        return value if isinstance(value, date) else date.fromisoformat(str(value))
    except ValueError:
        raise ValueError(f'"{value}" is no date; write it as 2027-03-31') from None


Day = Annotated[date, BeforeValidator(_day), PlainSerializer(str)]
PositiveInts = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
Objective = Literal["usd", "days", "mfu"]


class Offer(Section):
    """GPUs of one kind that can be rented: how many at most, at which price, and who says so."""

    gpu: str
    at_most: PositiveInt
    usd_per_gpu_hour: PositiveFloat
    source: str = Field(min_length=1)
    gpus_per_node: PositiveInt = 8


class Goal(Section):
    """Train on `tokens` within `days` (or from `start` to `by`) for at most `usd` on GPUs of one of the offers."""

    tokens: PositiveFloat
    days: PositiveFloat | None = None
    start: Day | None = None
    by: Day | None = None
    usd: PositiveFloat | None = None
    gpus: tuple[Offer, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_deadline(self) -> "Goal":
        if (self.start is None) != (self.by is None):
            raise ValueError("start and by belong together; write both, or days alone")
        if self.by is not None and self.start is not None and self.by <= self.start:
            raise ValueError(f"by {self.by} is not after start {self.start}")
        if self.by is not None and self.days is not None:
            raise ValueError("days and by are two deadlines; keep one")
        return self

    @property
    def deadline_days(self) -> float | None:
        """Days until the goal must be reached; None without a deadline."""
        if self.by is not None and self.start is not None:
            return float((self.by - self.start).days)
        return self.days


class PlanWorkload(Section):
    """What a step trains on; what the planner chooses of a workload (micro-batch, recomputation) is missing."""

    sequence_length: PositiveInt
    global_batch: PositiveInt
    precision: Precision = Precision()
    gradient_clipping: PositiveFloat | None = None


class Choices(Section):
    """Values that the planner may take, one list per key.

    `gpus`: how many in all. `data` is what the other sizes leave of them when it is not listed. `group_limit` is the M
    of the routing section's router. Every listed combination that a scenario may have is looked at.
    """

    gpus: PositiveInts
    fabric: Annotated[tuple[Fabric, ...], Field(min_length=1)] = (Fabric(),)
    pipeline: PositiveInts = (1,)
    tensor: PositiveInts = (1,)
    context: PositiveInts = (1,)
    data: PositiveInts | None = None
    expert: PositiveInts = (1,)
    expert_tensor: PositiveInts = (1,)
    schedule: Annotated[tuple[PipelineSchedule, ...], Field(min_length=1)] = (PipelineSchedule(),)
    micro_batch: PositiveInts = (1,)
    recompute: Annotated[tuple[AnyRecompute, ...], Field(min_length=1)] = ("none",)
    zero: Annotated[tuple[Zero, ...], Field(min_length=1)] = (Zero(),)
    group_limit: PositiveInts | None = None
    capacity: Annotated[tuple[Capacity, ...], Field(min_length=1)] = (NoCapacity(),)
    dispatch: Annotated[tuple[Dispatch, ...], Field(min_length=1)] = (Dispatch(),)


class Constraints(Section):
    """What else a layout must keep to.

    `free_memory`: share of each GPU's memory that stays free in every routing sample. `tensor_in_node`,
    `expert_in_node`: these groups lie inside one node.
    """

    free_memory: Share = 0.0
    tensor_in_node: Flag = True
    expert_in_node: Flag = False
    tokens_per_second: PositiveFloat | None = None


class Search(Section):
    """How much is looked at.

    Spaces of at most `enumerate_at_most` combinations are screened whole; larger ones by `trials` evaluations of
    NSGA-II in generations of `population`. `simulate` layouts at most are simulated for their own sake, `check` more
    are drawn at random to judge the screen.
    """

    method: Literal["auto", "enumerate", "nsga2"] = "auto"
    enumerate_at_most: PositiveInt = 50_000
    trials: PositiveInt = 2_000
    population: Annotated[int, Field(ge=2, strict=True)] = 50
    simulate: PositiveInt = 8
    check: Count = 6


class Sensitivity(Section):
    """Changes under which layouts are ranked again: of the best `candidates` all bandwidths, of all of them prices.

    `bandwidth` are factors on every link, `price` is the share by which each kind of GPU gets dearer and cheaper.
    """

    candidates: Count = 3
    bandwidth: tuple[PositiveFloat, ...] = (0.5, 2.0)
    price: Share = 0.3


class Baseline(Section):
    """A dense model to hold the plan against, `source` saying why it is of an equal class of quality."""

    model: Model
    source: str = Field(min_length=1)
    choices: Choices | None = None
    simulate: PositiveInt = 2


class Plan(Section):
    """A whole plan file."""

    schema_version: Annotated[int, Field(ge=1, le=1, strict=True)] = 1
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    model: Model
    goal: Goal
    workload: PlanWorkload
    choices: Choices
    constraints: Constraints = Constraints()
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = ("usd", "days")
    search: Search = Search()
    sensitivity: Sensitivity = Sensitivity()
    baseline: Baseline | None = None
    routing: Routing = UniformRouting(kind="uniform")
    placement: Placement = Contiguous()
    implementation: Implementation = Implementation()
    overlap: Overlap = Overlap()
    memory: Memory = Memory()
    network: Network = Network()
    compute: Compute = Compute()
    uncertainty: Uncertainty = Uncertainty(samples=1, bank=4)
    seed: Count = 0
