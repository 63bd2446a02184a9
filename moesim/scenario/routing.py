"""The `routing` and `capacity` sections: which router decides, how it is balanced, and what is dropped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AllowInfNan, Discriminator, Field, Strict, Tag, WithJsonSchema

from moesim.scenario.base import (
    MOST_EXPERTS,
    MOST_LAYERS,
    CapacityFactor,
    Coefficient,
    Flag,
    Heads,
    Popularity,
    PositiveExperts,
    PositiveFloat,
    Section,
    Share,
    Text,
    Tokens,
    one_of,
)
from moesim.scenario.model import Model
from moesim.scenario.routers import STRESS, StressFacts

ThinWidth = Annotated[int, Field(strict=True, gt=0, le=16_384)]


class PlainRouter(Section):
    """A router without groups: Switch, Mixtral/Qwen3 (`topk_softmax`), DeepSeekMoE/OLMoE, or a fixed one."""

    kind: Literal["switch", "topk_softmax", "deepseek_moe", "hash", "uniform"] = Field(
        description="switch: top-1; topk_softmax: Mixtral, Qwen3; deepseek_moe: softmax before top-K; "
        "hash, uniform: nothing learned."
    )


class GshardRouter(Section):
    """Top-2 with gates renormalised."""

    kind: Literal["gshard"] = Field(description="Top-2 of GShard, gates renormalised.")
    random_second: Flag = Field(
        default=False,
        description="Whether the second expert is taken with probability min(1, 2 g2) only, g2 being its gate.",
    )


class GroupedRouter(Section):
    """Group-limited top-K of DeepSeek-V2 and -V3.

    Without a limit that of the model holds (`model.router_groups`, `model.router_group_limit`), and a `group_limit`
    alone is one of the model's groups; `groups: 1, group_limit: 1` is no limit.
    """

    kind: Literal["deepseek_v2", "deepseek_v3"] = Field(
        description="deepseek_v2: softmax, groups by their best expert; deepseek_v3: sigmoid, by their two best."
    )
    groups: PositiveExperts | None = Field(
        default=None, description="Groups that the experts are cut into; absent: those of the model."
    )
    group_limit: PositiveExperts | None = Field(
        default=None, description="Groups that a token may reach; absent: the limit of the model."
    )
    device_limit: PositiveExperts | None = Field(
        default=None, description="Short for groups = parallelism.expert and group_limit = this number of ranks."
    )


class ExpertChoiceRouter(Section):
    """Each expert takes its C = ceil(capacity_factor K T / N) best tokens (arXiv 2202.09368)."""

    kind: Literal["expert_choice"] = Field(description="Each expert chooses its tokens.")
    capacity_factor: CapacityFactor = Field(default=1.0, description="Tokens per expert over the even share K T / N.")


Router = Annotated[PlainRouter | GshardRouter | GroupedRouter | ExpertChoiceRouter, Field(discriminator="kind")]

NO_GROUPS = PlainRouter(kind="uniform")  # for synthetic routing: not even the model's own groups


class LossFree(Section):
    """Auxiliary-loss-free balancing: after each step b_i += gamma * sign(mean load - load_i)."""

    gamma: Coefficient = Field(default=0.001, description="Change of an expert's bias after each step.")


class Balance(Section):
    """Coefficients of the balance losses."""

    expert: Coefficient = Field(default=0.0, description="Coefficient of the expert-level balance loss.")
    device: Coefficient = Field(default=0.0, description="Coefficient of DeepSeek-V2's device-level balance loss.")
    communication: Coefficient = Field(
        default=0.0, description="Coefficient of DeepSeek-V2's communication balance loss."
    )
    variance: Coefficient = Field(default=0.0, description="Coefficient of the variance of the expert loads.")
    sequence: Coefficient = Field(default=0.0, description="Coefficient of DeepSeek-V3's loss within each sequence.")
    loss_free: LossFree | None = Field(default=None, description="Balancing by a bias on each expert; absent: none.")
    scope: Literal["micro_batch", "global_batch"] = Field(
        default="micro_batch", description="Tokens over which loads are counted."
    )


class Thin(Section):
    """The small byte-level language model that carries the real expert layout (N, K, groups, M)."""

    layers: Annotated[int, Field(strict=True, gt=0, le=64)] = Field(
        default=2, description="MoE layers that are really trained; the model's layers take them in turn."
    )
    hidden: ThinWidth = Field(default=128, description="Width of the residual stream.")
    heads: Heads = Field(default=2, description="Attention heads.")
    expert_intermediate: ThinWidth = Field(default=32, description="Width of one expert.")
    context: Annotated[int, Field(strict=True, gt=0, le=2**16)] = Field(
        default=256, description="Tokens of one sequence."
    )
    tokens_per_step: Annotated[int, Field(strict=True, gt=0, le=2**22)] = Field(
        default=2048, description="Tokens of one training step."
    )
    micro_batches: Annotated[int, Field(strict=True, gt=0, le=1_024)] = Field(
        default=1, description="Parts of a step whose loads the scope global_batch adds up."
    )
    learning_rate: Annotated[float, Field(strict=True, allow_inf_nan=False, ge=1e-9, le=10)] = Field(
        default=3e-3, description="Learning rate of AdamW."
    )
    attention: Literal["mha", "gqa", "mla", "local_global"] = Field(default="mha", description="Kind of attention.")
    hash_warmup_share: Share = Field(
        default=0.0, description="Share of the steps that begin with a fixed hash for a router."
    )
    expert_grad_clip: PositiveFloat | None = Field(
        default=1.0, description="Largest norm of each expert's gradient; null: no limit."
    )
    device: Literal["cpu", "cuda", "auto"] = Field(
        default="auto", description="Where to train; auto: CUDA where there is any."
    )


class TrainRouting(Section):
    """Train a thin MoE language model on real text and record how its router routes held-out text."""

    kind: Literal["train"] = Field(description="Train a router on real text.")
    router: Router = Field(description="The router to train.")
    balance: Balance = Field(default=Balance(), description="How its load is balanced; absent: not at all.")
    steps: Annotated[int, Field(strict=True, gt=0, le=1_000_000)] = Field(default=150, description="Training steps.")
    corpus: Text = Field(
        default="stdlib", description="stdlib: the source of Python's standard library; or a file of text."
    )
    tokens: Tokens | None = Field(
        default=None,
        description="Held-out tokens to record; absent: 65,536, or a group's micro-batch where that is more.",
    )
    thin: Thin = Field(default=Thin(), description="The small model that is trained.")


LIBRARY_PREFIX = "library:"  # `routing.file` that begins so names shipped routing, not a file


class TraceRouting(Section):
    """Replay a recorded trace: a file, `library:NAME` (`moesim trace library:` lists the names), or a file or folder
    of what another program recorded, whose form its content tells.

    The trace brings its router, groups and limit with it; a recording of another program takes what it does not say
    from the model and from workload.sequence_length.
    """

    kind: Literal["trace"] = Field(description="Replay recorded routing.")
    file: Text = Field(
        description="A trace file relative to this file, library:NAME for one that ships, or what FLAME-MoE, Megatron, "
        "SGLang, vLLM, TensorRT-LLM or OLMoE recorded (file or folder), or counts as CSV or JSON."
    )
    router: Router | None = Field(default=None, description="What the trace's router must be; absent: any.")


def _counts_form(value: object) -> str:
    nested = isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], list | tuple)
    return "<per layer>" if nested else "<one list>"


ExpertCounts = Annotated[tuple[Popularity, ...], Field(min_length=1, max_length=MOST_EXPERTS)]
# The tags in angle brackets never show: they only keep pydantic from reporting both forms for one mistake.
AnyCounts = Annotated[
    Annotated[ExpertCounts, Tag("<one list>")]
    | Annotated[tuple[ExpertCounts, ...], Field(min_length=1, max_length=MOST_LAYERS), Tag("<per layer>")],
    Discriminator(_counts_form),
]


class PopularityRouting(Section):
    """K distinct experts per token drawn by measured popularity (Gumbel top-k)."""

    kind: Literal["popularity"] = Field(description="Draw experts by measured popularity.")
    counts: AnyCounts = Field(
        description="One list of a count per expert for all layers, or a list of such lists: MoE layer l uses list l "
        "mod their number. Only ratios within a list matter."
    )
    source: Text | None = Field(default=None, description="Whose counts these are, on which text; a run repeats it.")
    router: Router | None = Field(
        default=None, description="Only its groups and limit are used; absent: those of the model."
    )


class UniformRouting(Section):
    """K distinct experts per token, all equally likely; within M random groups when the router has a limit.

    Without `router` the limit is the model's own; a router of a kind without groups has none.
    """

    kind: Literal["uniform"] = Field(description="Every expert is equally likely.")
    router: Router | None = Field(
        default=None, description="Only its groups and limit are used; absent: those of the model."
    )


Balancedness = Annotated[float, Strict(), AllowInfNan(False), Field(gt=0, le=1)]


class BalancednessRouting(Section):
    """Synthetic routing where only one number is known: mean / max of the rows per expert-parallel rank.

    That is the balancedness of SGLang's and EPLB's reports, here in every layer and micro-batch, before drops. One rank
    of each layer is hot, the others share the rest evenly; which rank differs from layer to layer (`seed`). 1: all
    ranks get the same rows. The number holds for the ranks of this scenario, however many there are. Each token has K
    distinct experts, so that a rank takes at most min(K, its experts) of a token's rows: hence a lowest value.
    """

    kind: Literal["balancedness"] = Field(description="State how evenly ranks are loaded, as one number.")
    value: Balancedness = Field(
        description="Mean over the rows of an expert group's ranks / rows of the busiest, in every layer; 1: even."
    )
    router: Router | None = Field(
        default=None, description="Only its groups and limit are used; absent: those of the model."
    )


def lowest_balancedness(experts_of_ranks: Sequence[int], *, top_k: int) -> float:
    """The lowest mean / max of rank rows where any rank may be hot: it takes at most min(K, its experts) of K rows.

    Infinite where a rank has no experts at all: it is never loaded as the others.
    """
    fewest = min(experts_of_ranks)
    return top_k / (len(experts_of_ranks) * min(top_k, fewest)) if fewest else math.inf


PatternName = Annotated[str, one_of(STRESS), WithJsonSchema({"enum": list(STRESS), "type": "string"})]


class StressRouting(Section):
    """Synthetic routing that strains the scenario's ranks: one of the table `moesim.scenario.routers.STRESS`.

    What is hot differs from layer to layer (`seed`). Each token that is routed has K distinct experts.
    """

    kind: Literal["stress"] = Field(description="Strain a layout by a synthetic pattern.")
    pattern: PatternName = Field(
        description="; ".join(f"{facts.name}: {facts.about}" for facts in STRESS.values()) + "."
    )
    severity: Share = Field(
        default=1.0, description="From 0, balanced, to 1, as strong as K distinct experts per token allow."
    )
    router: Router | None = Field(
        default=None, description="Only its groups and limit are used; absent: those of the model."
    )

    @property
    def facts(self) -> StressFacts:
        """The facts of the pattern."""
        return STRESS[self.pattern]


Routing = Annotated[
    TrainRouting | TraceRouting | PopularityRouting | UniformRouting | BalancednessRouting | StressRouting,
    Field(discriminator="kind"),
]
StatedRouting = BalancednessRouting | StressRouting  # its traces are drawn for the ranks of one layout


class NoCapacity(Section):
    """Dropless."""

    kind: Literal["none"] = Field(default="none", description="Nothing is dropped.")


class ExpertCapacity(Section):
    """C = ceil(factor K T / N) rows per expert over the T tokens of one rank and micro-batch, but no more than T."""

    kind: Literal["expert"] = Field(description="Each expert takes a limited number of rows.")
    factor: CapacityFactor = Field(description="Rows that an expert takes over the even share K T / N.")
    by: Literal["position", "score"] = Field(
        default="position", description="Which rows stay: the earliest, or those with the highest affinity."
    )
    pad: Flag = Field(default=False, description="Whether every expert computes all its rows, empty ones too.")


class DeviceCapacity(Section):
    """DeepSeek-V2: each device keeps factor * mean rows per device; protected sequences are kept first."""

    kind: Literal["device"] = Field(description="Each rank takes a limited number of rows.")
    factor: CapacityFactor = Field(description="Rows that a rank takes over the mean of all ranks.")
    protected_share: Share = Field(default=0.1, description="Share of the sequences that never lose a row.")


Capacity = Annotated[NoCapacity | ExpertCapacity | DeviceCapacity, Field(discriminator="kind")]


@dataclass(frozen=True, kw_only=True)
class RouterShape:
    """The router of one scenario with every alias resolved: what `moe` builds and what a trace records.

    `num_groups` = 1 and `group_limit` = 1 mean no limit. `num_devices` is the expert-parallel size (for the device
    and communication losses and device capacity).
    """

    kind: str
    num_experts: int
    top_k: int
    num_groups: int = 1
    group_limit: int = 1
    num_devices: int = 1
    routed_scaling_factor: float = 1.0
    random_second: bool = False
    capacity_factor: float = 1.0


def resolve_router(routing: Routing, *, model: Model, num_devices: int) -> RouterShape:
    """The router shape of a `routing` section on `num_devices` ranks of an expert-parallel group.

    A trained router keeps its own kind; what is drawn takes groups and limit from its `router` or, where that says
    nothing of them, from the model. A recorded trace brings its own: only the model's experts and top_k are
    known here, and the groups it must have.
    """
    router = routing.router
    kind = router.kind if isinstance(routing, TrainRouting) and router is not None else routing.kind
    num_groups, group_limit = _groups_and_limit(routing, model=model, num_devices=num_devices)
    return RouterShape(
        kind=kind,
        num_experts=model.experts,
        top_k=model.top_k,
        num_groups=num_groups,
        group_limit=group_limit,
        num_devices=num_devices,
        routed_scaling_factor=model.routed_scaling_factor,
        random_second=isinstance(router, GshardRouter) and router.random_second,
        capacity_factor=router.capacity_factor if isinstance(router, ExpertChoiceRouter) else 1.0,
    )


def _groups_and_limit(routing: Routing, *, model: Model, num_devices: int) -> tuple[int, int]:
    router = routing.router
    if isinstance(router, GroupedRouter) and router.device_limit is not None:
        return num_devices, router.device_limit
    if isinstance(router, GroupedRouter) and router.group_limit is not None:
        return router.groups or model.router_groups, router.group_limit
    uses_model_routing = isinstance(router, GroupedRouter) or (router is None and not isinstance(routing, TraceRouting))
    return (model.router_groups, model.router_group_limit) if uses_model_routing else (1, 1)
