"""What a plan file says: a model, a goal, what may be rented, and what the planner may choose; from a file to a Plan.

Sections that a scenario has too (model, routing, dispatch, ...) are those of a scenario. `choices` lists the values
that the planner may take, key by key; a key that is not listed has the value of a scenario that leaves it out.
"""

from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, model_validator

from moesim.errors import UserError
from moesim.scenario import (
    Capacity,
    Compute,
    Contiguous,
    Dispatch,
    Fabric,
    GroupedRouter,
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
    TraceRouting,
    Uncertainty,
    UniformRouting,
    Zero,
    gpu_spec,
)
from moesim.scenario.base import (
    BandwidthFactor,
    FileName,
    Flag,
    Gpus,
    GpusPerNode,
    PositiveExperts,
    PositiveFloat,
    PositiveRent,
    Section,
    Seed,
    Sequences,
    Share,
    Text,
    Tokens,
    TokensPerSecond,
    TrainTokens,
    Usd,
)
from moesim.scenario.catalogue import gpu_names
from moesim.scenario.document import Node, Path, find, mapping_node, node_of, read_yaml, refusal
from moesim.scenario.failures import Failures
from moesim.scenario.loader import accept_model_forms, accept_named_implementation, finished_schema, validated
from moesim.scenario.schema import AnyRecompute
from moesim.scenario.short_forms import (
    absolute_paths,
    apply_overrides,
    default_routing,
    explicit_model,
    named_implementation,
)
from moesim.scenario.software import MEGATRON


def _day(value: object) -> date:
    try:
        return value if isinstance(value, date) else date.fromisoformat(str(value))
    except ValueError:
        raise ValueError(f'"{value}" is no date; write it as 2027-03-31') from None


Day = Annotated[date, BeforeValidator(_day), PlainSerializer(str)]
MOST_VALUES = 1_000  # of one choice
Item = TypeVar("Item")
Values = Annotated[tuple[Item, ...], Field(min_length=1, max_length=MOST_VALUES)]
Sizes = Values[Gpus]
Layouts = Annotated[int, Field(strict=True, ge=0, le=10_000)]
Objective = Literal["usd", "days", "mfu"]


class Offer(Section):
    """GPUs of one kind that can be rented: how many at most, at which price, and who says so."""

    gpu: Text = Field(description="Kind of GPU, by its name in the catalogue.")
    at_most: Gpus = Field(description="GPUs of this kind that can be rented at most.")
    usd_per_gpu_hour: PositiveRent = Field(description="Rent of one GPU in USD per hour.")
    source: Text = Field(min_length=1, description="Who quotes this rent, and when.")
    gpus_per_node: GpusPerNode = Field(default=8, description="GPUs of each machine.")


class Goal(Section):
    """Train on `tokens` within `days` (or from `start` to `by`) for at most `usd` on GPUs of one of the offers."""

    tokens: TrainTokens = Field(description="Tokens of the whole training.")
    days: PositiveFloat | None = Field(
        default=None, description="Days that the training may take; absent: no deadline."
    )
    start: Day | None = Field(default=None, description="First day of the training, such as 2027-01-04; with by.")
    by: Day | None = Field(default=None, description="Day on which the training must be done; with start.")
    usd: Usd | None = Field(default=None, description="What the training may cost in USD; absent: no limit.")
    gpus: Values[Offer] = Field(description="GPUs that can be rented.")

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

    sequence_length: Tokens = Field(description="Tokens of one sequence.")
    global_batch: Sequences = Field(description="Sequences of one optimizer step on all ranks together.")
    precision: Precision = Field(default=Precision(), description="Number formats; bf16 with fp32 moments if absent.")
    gradient_clipping: PositiveFloat | None = Field(
        default=None, description="Largest norm of all gradients together; absent: no limit."
    )


class Choices(Section):
    """Values that the planner may take, one list per key.

    Every listed combination that a scenario may have is looked at.
    """

    gpus: Sizes = Field(description="How many GPUs to rent in all.")
    fabric: Values[Fabric] = Field(
        default=(Fabric(),), description="Fabrics to choose from, each as in a scenario's cluster.fabric."
    )
    pipeline: Sizes = Field(default=(1,), description="Pipeline-parallel sizes.")
    tensor: Sizes = Field(default=(1,), description="Tensor-parallel sizes.")
    context: Sizes = Field(default=(1,), description="Context-parallel sizes.")
    data: Sizes | None = Field(
        default=None, description="Data-parallel sizes; absent: what the other sizes leave of the GPUs."
    )
    expert: Sizes = Field(default=(1,), description="Expert-parallel sizes.")
    expert_tensor: Sizes = Field(default=(1,), description="Expert-tensor-parallel sizes.")
    schedule: Values[PipelineSchedule] = Field(
        default=(PipelineSchedule(),), description="Pipeline schedules; without a pipeline all are alike."
    )
    micro_batch: Values[Sequences] = Field(
        default=(1,), description="Sequences that a data-parallel rank computes at a time."
    )
    recompute: Values[AnyRecompute] = Field(
        default=("none",), description="Activations that the backward pass computes again."
    )
    zero: Values[Zero] = Field(default=(Zero(),), description="ZeRO stages of dense and expert parameters.")
    group_limit: Values[PositiveExperts] | None = Field(
        default=None, description="Groups M that a token may reach; absent: as routing.router says."
    )
    capacity: Values[Capacity] = Field(
        default=(NoCapacity(),), description="Limits on the rows of an expert or a rank."
    )
    dispatch: Values[Dispatch] = Field(
        default=(Dispatch(),), description="Ways in which tokens travel to their experts."
    )


class Constraints(Section):
    """What else a layout must keep to."""

    free_memory: Share = Field(
        default=0.0, description="Share of each GPU's memory that stays free in every routing sample."
    )
    tensor_in_node: Flag = Field(default=True, description="Whether tensor groups must lie inside one node.")
    expert_in_node: Flag = Field(default=False, description="Whether expert groups must lie inside one node.")
    tokens_per_second: TokensPerSecond | None = Field(
        default=None, description="Tokens per second at least; absent: any."
    )


class Search(Section):
    """How much is looked at."""

    method: Literal["auto", "enumerate", "nsga2"] = Field(
        default="auto",
        description="enumerate: screen all; nsga2: search; auto: enumerate where there are not too many.",
    )
    enumerate_at_most: Annotated[int, Field(strict=True, gt=0, le=10_000_000)] = Field(
        default=50_000, description="Combinations up to which auto screens all."
    )
    trials: Annotated[int, Field(strict=True, gt=0, le=1_000_000)] = Field(
        default=2_000, description="Combinations that NSGA-II screens."
    )
    population: Annotated[int, Field(strict=True, ge=2, le=10_000)] = Field(
        default=50, description="Combinations of one generation of NSGA-II."
    )
    simulate: Annotated[int, Field(strict=True, gt=0, le=10_000)] = Field(
        default=8, description="Layouts simulated for their own sake, at most."
    )
    check: Layouts = Field(
        default=6, description="Further layouts drawn at random and simulated, to judge the screen by."
    )


class Sensitivity(Section):
    """Changes under which layouts are ranked again: of the best `candidates` all bandwidths, of all of them prices."""

    candidates: Layouts = Field(default=3, description="Best layouts that are simulated again with other bandwidths.")
    bandwidth: Annotated[tuple[BandwidthFactor, ...], Field(max_length=100)] = Field(
        default=(0.5, 2.0), description="Factors on the bandwidth of every link."
    )
    price: Share = Field(default=0.3, description="Share by which each kind of GPU gets dearer and cheaper.")


class Baseline(Section):
    """A dense model to hold the plan against."""

    model: Model = Field(description="The dense model.")
    source: Text = Field(min_length=1, description="Why it is of an equal class of quality.")
    choices: Choices | None = Field(
        default=None, description="What the planner may choose for it; absent: as for the plan."
    )
    simulate: Annotated[int, Field(strict=True, gt=0, le=10_000)] = Field(
        default=2, description="Layouts of it that are simulated, at most."
    )


def _no_slow_parts(failures: Failures | None) -> Failures | None:
    if failures is not None and (failures.slow or failures.jitter):
        raise ValueError("slow and jitter are not part of a plan; leave them to `moesim goodput` of its best layouts")
    return failures


PlanFailures = Annotated[Failures | None, AfterValidator(_no_slow_parts)]


class Plan(Section):
    """A whole plan file."""

    schema_version: Annotated[int, Field(ge=1, le=1, strict=True)] = Field(
        default=1, description="Version of this format."
    )
    name: Annotated[FileName, Field(max_length=100)] = Field(description="Name of the plan and of its folder.")
    model: Model = Field(description="The language model: a preset, a config.json, or its architecture.")
    goal: Goal = Field(description="What must be reached, and what may be rented for it.")
    workload: PlanWorkload = Field(description="What one step trains on, and in which number formats.")
    choices: Choices = Field(description="Values that the planner may take.")
    constraints: Constraints = Field(
        default=Constraints(), description="Limits beside the goal; absent: tensor groups inside one node."
    )
    objectives: Annotated[tuple[Objective, ...], Field(min_length=1)] = Field(
        default=("usd", "days"), description="What is best, first one first; layouts are ranked by it."
    )
    search: Search = Field(default=Search(), description="How many layouts are screened and simulated.")
    sensitivity: Sensitivity = Field(default=Sensitivity(), description="Changes under which layouts are ranked again.")
    baseline: Baseline | None = Field(default=None, description="A dense model to hold the plan against; absent: none.")
    routing: Routing = Field(
        default=UniformRouting(kind="uniform"),
        description="How tokens choose experts; absent: model.routing.",
    )
    placement: Placement = Field(
        default=Contiguous(), description="Which rank holds which experts; absent: neighbouring experts on each rank."
    )
    implementation: Implementation = Field(
        default=Implementation(kind=MEGATRON.name),
        description="The software that is simulated: its name, or a mapping with its kind; absent: megatron, which has "
        "all of these layouts.",
    )
    overlap: Overlap = Field(
        default=Overlap(), description="What runs beside what; absent: as the implementation does."
    )
    memory: Memory = Field(
        default=Memory(), description="GPU memory that is not there for tensors; absent: as measured on H200."
    )
    network: Network = Field(
        default=Network(), description="Model of the network: how transfers share the links; ports if absent."
    )
    compute: Compute = Field(
        default=Compute(), description="Source of kernel durations; absent: the best that there is for the GPU."
    )
    uncertainty: Uncertainty = Field(
        default=Uncertainty(samples=1, bank=4), description="Routing samples behind each number; one by default."
    )
    failures: PlanFailures = Field(
        default=None,
        description="What stops the job, as in a scenario: layouts are ranked, and the goal is met, by days and USD "
        "with failures; {} for published rates. Absent: nothing ever fails.",
    )
    seed: Seed = Field(default=0, description="Seed of all random draws; the same seed gives the same plan.")


def is_serving_plan(root: Node) -> bool:
    """Whether a plan file has `goal: {serve: ...}`."""
    goal = root.value.get("goal") if isinstance(root.value, dict) else None
    return goal is not None and isinstance(goal.value, dict) and "serve" in goal.value


def load_plan(path: str | FilePath, overrides: Sequence[str] = ()) -> Plan:
    """The plan in the file `path` with `a.b=c` overrides applied; models explicit, paths absolute.

    Raises UserError, one line with `file:line:column` or `--set a.b=c`.
    """
    path = FilePath(path)
    return validated_plan(read_yaml(path, what="plan"), overrides, base=path.parent)


def plan_from_mapping(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Plan:
    """A plan from nested dicts in any form that a file may have; paths are relative to the working directory."""
    return validated_plan(node_of(data, Node(None, "plan", "plan")), overrides, base=FilePath())


def validated_plan(root: Node, overrides: Sequence[str], *, base: FilePath) -> Plan:
    """The plan of a document with overrides applied; paths are relative to `base`. Raises UserError, one line."""
    if not isinstance(root.value, dict):
        raise UserError(f"{root.where}: expected a mapping of sections; write name: ..., model: ..., goal: ...")
    root = named_implementation(apply_overrides(named_implementation(root), overrides))
    if is_serving_plan(root):
        where = find(root, ("goal", "serve"))[0].where
        raise UserError(f"{where}: goal.serve: this is a plan of serving; make it with `moesim plan`")
    root = absolute_paths(_explicit_models(root, base=base), base=base)
    plan = validated(root, Plan, subject="plan")
    _check(plan, root)
    return plan


def _explicit_models(root: Node, *, base: FilePath) -> Node:
    """Presets and configurations written out, in the plan and in its baseline, and the routing of the plan's model."""
    root = default_routing(explicit_model(root, base=base))
    baseline = root.value.get("baseline")
    if baseline is None or not isinstance(baseline.value, dict):
        return root
    return mapping_node({**root.value, "baseline": explicit_model(baseline, base=base)}, root)


def _check(plan: Plan, root: Node) -> None:
    def error(message: str, *path: str | int) -> UserError:
        return refusal(root, path, message)

    kinds = [offer.gpu for offer in plan.goal.gpus]
    for index, offer in enumerate(plan.goal.gpus):
        try:
            gpu_spec(offer.gpu)
        except UserError as unknown:
            raise error(str(unknown), "goal", "gpus", index, "gpu") from None
        if offer.gpu in kinds[:index]:
            raise error(f'"{offer.gpu}" is offered twice; keep one offer per kind', "goal", "gpus", index, "gpu")
    for index, objective in enumerate(plan.objectives):
        if objective in plan.objectives[:index]:
            raise error(f'"{objective}" is listed twice', "objectives", index)
    if plan.choices.group_limit is not None:
        _check_group_limit(plan, error_of=lambda message: error(message, "choices", "group_limit"))
    _check_repeats(plan.choices, root, ("choices",))
    if plan.baseline is not None:
        if plan.baseline.model.experts:
            raise error("has experts; name a dense model", "baseline", "model")
        if plan.baseline.choices is not None:
            _check_repeats(plan.baseline.choices, root, ("baseline", "choices"))


def _check_group_limit(plan: Plan, *, error_of: Callable[[str], UserError]) -> None:
    routing = plan.routing
    if isinstance(routing, TraceRouting):
        raise error_of("a recorded trace brings its router's limit; drop this key, or use another kind of routing")
    if not isinstance(routing.router, GroupedRouter):
        raise error_of("routing.router has no groups; use kind deepseek_v2 or deepseek_v3, or drop this key")


def _check_repeats(choices: Choices, root: Node, where: Path) -> None:
    for key in type(choices).model_fields:
        values = getattr(choices, key)
        for index, value in enumerate(values or ()):
            if value in values[:index]:
                raise refusal(root, (*where, key, index), "listed twice; keep one")


def plan_json_schema(*, units: bool = False) -> dict[str, Any]:
    """JSON Schema (2020-12) that accepts every form that `load_plan` accepts at the level of single sections.

    `units`: as in the schema of a scenario.
    """
    schema = Plan.model_json_schema(mode="validation")
    accept_model_forms(schema["$defs"]["Model"])
    accept_named_implementation(schema)
    schema["$defs"]["Offer"]["properties"]["gpu"]["enum"] = list(gpu_names())
    return finished_schema(schema, title="moesim plan", units=units)
