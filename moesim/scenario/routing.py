"""The `routing` and `capacity` sections: which router decides, how it is balanced, and what is dropped."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from moesim.scenario.base import Flag, NonNegativeFloat, PositiveFloat, PositiveInt, Section, Share
from moesim.scenario.model import Model


class PlainRouter(Section):
    """A router without groups: Switch, Mixtral/Qwen3 (`topk_softmax`), DeepSeekMoE/OLMoE, or a fixed one."""

    kind: Literal["switch", "topk_softmax", "deepseek_moe", "hash", "uniform"]


class GshardRouter(Section):
    """Top-2 with gates renormalised; `random_second` takes the second expert with probability min(1, 2 g2)."""

    kind: Literal["gshard"]
    random_second: Flag = False


class GroupedRouter(Section):
    """Group-limited top-K of DeepSeek-V2 and -V3. `device_limit: M` means groups = expert-parallel size, limit M.

    Without a limit that of the model holds (`model.router_groups`, `model.router_group_limit`), and a `group_limit`
    alone is one of the model's groups; `groups: 1, group_limit: 1` is no limit.
    """

    kind: Literal["deepseek_v2", "deepseek_v3"]
    groups: PositiveInt | None = None
    group_limit: PositiveInt | None = None
    device_limit: PositiveInt | None = None


class ExpertChoiceRouter(Section):
    """Each expert takes its C = ceil(capacity_factor K T / N) best tokens (arXiv 2202.09368)."""

    kind: Literal["expert_choice"]
    capacity_factor: PositiveFloat = 1.0


Router = Annotated[PlainRouter | GshardRouter | GroupedRouter | ExpertChoiceRouter, Field(discriminator="kind")]

NO_GROUPS = PlainRouter(kind="uniform")  # for synthetic routing: not even the model's own groups


class LossFree(Section):
    """Auxiliary-loss-free balancing: after each step b_i += gamma * sign(mean load - load_i)."""

    gamma: NonNegativeFloat = 0.001


class Balance(Section):
    """Coefficients of the balance losses (spec: expert a1, device a2, communication a3, variance w, sequence a)."""

    expert: NonNegativeFloat = 0.0
    device: NonNegativeFloat = 0.0
    communication: NonNegativeFloat = 0.0
    variance: NonNegativeFloat = 0.0
    sequence: NonNegativeFloat = 0.0
    loss_free: LossFree | None = None
    scope: Literal["micro_batch", "global_batch"] = "micro_batch"


class Thin(Section):
    """The small byte-level language model that carries the real expert layout (N, K, groups, M)."""

    layers: PositiveInt = 2
    hidden: PositiveInt = 128
    heads: PositiveInt = 2
    expert_intermediate: PositiveInt = 32
    context: PositiveInt = 256
    tokens_per_step: PositiveInt = 2048
    micro_batches: PositiveInt = 1
    learning_rate: PositiveFloat = 3e-3
    attention: Literal["mha", "gqa", "mla", "local_global"] = "mha"
    hash_warmup_share: Share = 0.0
    expert_grad_clip: PositiveFloat | None = 1.0
    device: Literal["cpu", "cuda", "auto"] = "auto"


class TrainRouting(Section):
    """Train a thin MoE language model on real text and record how its router routes held-out text."""

    kind: Literal["train"]
    router: Router
    balance: Balance = Balance()
    steps: PositiveInt = 150
    corpus: str = "stdlib"
    tokens: PositiveInt | None = None  # held-out tokens to record; at least 65,536 and one EP group's micro-batch
    thin: Thin = Thin()


LIBRARY_PREFIX = "library:"  # `routing.file` that begins so names shipped routing, not a file


class TraceRouting(Section):
    """Replay a recorded trace: a file, or `library:NAME` (`moesim trace library:` lists the names).

    The trace brings its router, groups and limit with it. `router` asks for nothing but that they are these.
    """

    kind: Literal["trace"]
    file: str
    router: Router | None = None


def _counts_form(value: object) -> str:
    nested = isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], list | tuple)
    return "<per layer>" if nested else "<one list>"


ExpertCounts = Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)]
# The tags in angle brackets never show: they only keep pydantic from reporting both forms for one mistake.
AnyCounts = Annotated[
    Annotated[ExpertCounts, Tag("<one list>")]
    | Annotated[tuple[ExpertCounts, ...], Field(min_length=1), Tag("<per layer>")],
    Discriminator(_counts_form),
]


class PopularityRouting(Section):
    """K distinct experts per token drawn by measured popularity (Gumbel top-k).

    `counts` is one list of N counts for all layers, or a list of such lists: MoE layer l uses list l mod their number.
    """

    kind: Literal["popularity"]
    counts: AnyCounts
    router: Router | None = None  # only its groups and limit are used; the model's own without it


class UniformRouting(Section):
    """K distinct experts per token, all equally likely; within M random groups when the router has a limit.

    Without `router` the limit is the model's own; a router of a kind without groups has none.
    """

    kind: Literal["uniform"]
    router: Router | None = None


Routing = Annotated[TrainRouting | TraceRouting | PopularityRouting | UniformRouting, Field(discriminator="kind")]


class NoCapacity(Section):
    """Dropless."""

    kind: Literal["none"] = "none"


class ExpertCapacity(Section):
    """C = ceil(factor K T / N) rows per expert over the T tokens of one rank and micro-batch, but no more than T."""

    kind: Literal["expert"]
    factor: PositiveFloat
    by: Literal["position", "score"] = "position"
    pad: Flag = False


class DeviceCapacity(Section):
    """DeepSeek-V2: each device keeps factor * mean rows per device; protected sequences are kept first."""

    kind: Literal["device"]
    factor: PositiveFloat
    protected_share: Share = 0.1


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

    A trained router keeps its own kind; `popularity` and `uniform` take groups and limit from their `router` or, where
    it says nothing of them, from the model. A recorded trace brings its own: only the model's experts and top_k are
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
    takes_the_models = isinstance(router, GroupedRouter) or (router is None and not isinstance(routing, TraceRouting))
    return (model.router_groups, model.router_group_limit) if takes_the_models else (1, 1)
