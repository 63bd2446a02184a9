"""What the library of trained routing holds: layouts, the axes varied around each one's published setting, seeds.

One axis is varied at a time; everything else stays as published (spec, "Balance losses and dynamics"). All points of a
layout and seed start from the same weights and see the same text in the same order.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from moesim.routing.request import TrainingRequest
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import (
    Balance,
    Capacity,
    DeviceCapacity,
    LossFree,
    NoCapacity,
    RouterShape,
    Thin,
)

SEEDS = (0, 1, 2)
NUM_GROUPS = 8
UNLIMITED = NUM_GROUPS
LIMITS = (1, 2, 3, 4, UNLIMITED)
CAPACITY_FACTORS = (1.0, 1.25, 1.5, None)
SEQUENCE_LENGTH = 4096
SHARE_TOKENS = 4096  # where loads and losses are what is asked for
STUDY_TOKENS = {"64x6": 16_384, "160x6": 8192, "256x8": 8192, "granularity": 16_384}  # that studies give to 8 ranks
WIDE_TOKENS = {"64x6": 262_144, "160x6": 32_768, "256x8": 262_144}  # published settings that 64, 8, 64 ranks draw
V2_BALANCE = Balance(expert=0.003, device=0.05, communication=0.02)
V3_BALANCE = Balance(sequence=1e-4, loss_free=LossFree(gamma=1e-3))
FINE_BALANCE = Balance(expert=0.01)  # DeepSeekMoE 2B, whose paper varies the granularity
THIN = Thin(
    layers=2,
    hidden=512,
    heads=8,
    expert_intermediate=64,
    context=512,
    tokens_per_step=8192,
    learning_rate=1e-3,
    device="auto",
)
STEPS = 800
GRANULARITY_WIDTH = 512  # top-K times the width of one expert
GRANULARITIES = ((16, 2), (32, 4), (64, 8), (128, 16))
PLANNED_TOKENS = {"8x2": 65_536, "64x8": 65_536, "128x8": 65_536, "384x8": 65_536}  # published settings, 16 ranks


@dataclass(frozen=True, kw_only=True)
class LibraryPoint:
    """One router to train. `point` names it within its layout, `aliases` are the points that it also is."""

    layout: str
    point: str
    axis: str
    value: str
    request: TrainingRequest
    aliases: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """LAYOUT/POINT/seedN."""
        return f"{self.layout}/{self.point}/seed{self.request.seed}"


def library_points(*, corpus: str = "stdlib", tokens: int | None = None, **thin: Any) -> tuple[LibraryPoint, ...]:
    """Every point of the library, ordered by layout; `thin` changes fields of the trained model, or `steps`.

    With `tokens` every point records that many, whole sequences of them, instead of what its studies need.
    """
    steps = thin.pop("steps", STEPS)
    points = [*_v2_layout("64x6", 64, factor=1.0), *_v2_layout("160x6", 160, factor=16.0), *_v3_layout()]
    points += [*_few_experts(), *_granularity(), *_planned()]
    return tuple(
        replace(
            point,
            request=replace(
                point.request,
                corpus=corpus,
                steps=steps,
                recorded_sequences=tokens // SEQUENCE_LENGTH if tokens else point.request.recorded_sequences,
                thin=point.request.thin.model_copy(update=thin),
            ),
        )
        for point in points
    )


def _request(
    router: RouterShape,
    *,
    balance: Balance,
    capacity: Capacity,
    shared: int,
    tokens: int,
    seed: int = 0,
    thin: Thin = THIN,
) -> TrainingRequest:
    return TrainingRequest(
        router=router,
        steps=STEPS,
        sequence_length=SEQUENCE_LENGTH,
        recorded_sequences=tokens // SEQUENCE_LENGTH,
        shared_experts=shared,
        balance=balance,
        capacity=capacity,
        thin=thin,
        seed=seed,
    )


def _vary(published: LibraryPoint, point: str, axis: str, value: object, **changes: Any) -> LibraryPoint:
    """The published setting with fields of its request changed, on as many tokens as its studies draw."""
    studied = axis == "M" or (published.layout == "64x6" and axis != "router")
    tokens = STUDY_TOKENS[published.layout] if studied else SHARE_TOKENS
    request = replace(published.request, **{"recorded_sequences": tokens // SEQUENCE_LENGTH, **changes})
    return LibraryPoint(layout=published.layout, point=point, axis=axis, value=str(value), request=request)


def _with_seeds(published: LibraryPoint) -> Iterator[LibraryPoint]:
    """The published setting and every M, each with every seed; only seed 0 of the published one for many ranks."""
    router = published.request.router
    for seed in SEEDS:
        tokens = (WIDE_TOKENS if seed == 0 else STUDY_TOKENS)[published.layout]
        request = replace(published.request, seed=seed, recorded_sequences=tokens // SEQUENCE_LENGTH)
        yield replace(published, request=request)
        for limit in LIMITS:
            if limit != router.group_limit:
                limited = replace(router, group_limit=limit)
                yield _vary(published, _limit_name(limit), "M", _limit_value(limit), router=limited, seed=seed)


def _limit_value(limit: int) -> str:
    return "unlimited" if limit == UNLIMITED else str(limit)


def _limit_name(limit: int) -> str:
    return "M-unlimited" if limit == UNLIMITED else f"M{limit}"


def _capacities(published: LibraryPoint) -> Iterator[LibraryPoint]:
    for factor in CAPACITY_FACTORS:
        capacity = NoCapacity() if factor is None else DeviceCapacity(kind="device", factor=factor)
        if capacity != published.request.capacity:
            value = factor or "none"
            yield _vary(published, f"capacity-{value}", "capacity", value, capacity=capacity)


def _coefficients(published: LibraryPoint, *, around: Balance, scales: tuple[float, ...]) -> Iterator[LibraryPoint]:
    """Each balance loss alone at multiples of its coefficient in `around`."""
    for loss in ("expert", "device", "communication"):
        for scale in scales:
            changed = published.request.balance.model_copy(update={loss: scale * getattr(around, loss)})
            name = f"{loss}-coefficient"
            yield _vary(published, f"{name}-{_scale_name(scale)}", name, _scale_name(scale), balance=changed)


def _scale_name(scale: float) -> str:
    return f"x{scale}" if scale else "0"


def _routers(published: LibraryPoint, kinds: tuple[str, ...]) -> Iterator[LibraryPoint]:
    """Other kinds of router. A renormalised one has no use for a scaling factor; expert choice and hash no balance."""
    shape, balance = published.request.router, published.request.balance
    for kind in kinds:
        changes: dict[str, Any] = {"router": replace(shape, kind=kind, num_groups=1, group_limit=1)}
        facts = ROUTERS[kind]
        if facts.grouped:
            factor = 1.0 if facts.normalised else shape.routed_scaling_factor
            changes["router"] = replace(shape, kind=kind, routed_scaling_factor=factor)
        if not facts.biased and balance.loss_free is not None:
            changes["balance"] = balance.model_copy(update={"loss_free": None})
        if facts.by_experts or not facts.learned:
            changes["balance"] = Balance()
        if facts.by_experts:
            changes["capacity"] = NoCapacity()
        yield _vary(published, f"router-{kind}", "router", kind, **changes)


def _v2_layout(layout: str, num_experts: int, *, factor: float) -> Iterator[LibraryPoint]:
    """DeepSeek-V2's router and losses: 8 devices, M = 3, device capacity 1.0, a tenth of the sequences protected."""
    router = RouterShape(
        kind="deepseek_v2",
        num_experts=num_experts,
        top_k=6,
        num_groups=NUM_GROUPS,
        group_limit=3,
        num_devices=NUM_GROUPS,
        routed_scaling_factor=factor,
    )
    capacity = DeviceCapacity(kind="device", factor=1.0)
    published = LibraryPoint(
        layout=layout,
        point="published",
        axis="published",
        value="published",
        request=_request(router, balance=V2_BALANCE, capacity=capacity, shared=2, tokens=WIDE_TOKENS[layout]),
        aliases=(
            "M3",
            "capacity-1.0",
            "router-deepseek_v2",
            *(f"{loss}-coefficient-x1" for loss in ("expert", "device", "communication")),
        ),
    )
    yield from _with_seeds(published)
    yield from _capacities(published)
    yield from _coefficients(published, around=V2_BALANCE, scales=(0, 0.1, 10))
    yield _vary(published, "no-balance", "balance", "none", balance=Balance())
    loss_free = replace(router, kind="deepseek_v3", routed_scaling_factor=1.0)
    only_bias = Balance(loss_free=LossFree(gamma=1e-3))
    yield _vary(published, "loss-free", "balance", "loss-free", router=loss_free, balance=only_bias)
    yield from _routers(published, ("deepseek_moe", "topk_softmax", "deepseek_v3", "expert_choice", "hash"))


def _v3_layout() -> Iterator[LibraryPoint]:
    """DeepSeek-V3's router, loss-free balancing and sequence loss: 8 nodes, M = 4, nothing dropped.

    Its published expert, device and communication coefficients are 0; DeepSeek-V2's stand in for `x1`.
    """
    router = RouterShape(
        kind="deepseek_v3",
        num_experts=256,
        top_k=8,
        num_groups=NUM_GROUPS,
        group_limit=4,
        num_devices=NUM_GROUPS,
        routed_scaling_factor=2.5,
    )
    losses = ("expert", "device", "communication")
    published = LibraryPoint(
        layout="256x8",
        point="published",
        axis="published",
        value="published",
        request=_request(router, balance=V3_BALANCE, capacity=NoCapacity(), shared=1, tokens=WIDE_TOKENS["256x8"]),
        aliases=(
            "M4",
            "capacity-none",
            "router-deepseek_v3",
            "loss-free",
            "gamma-x1",
            "sequence-coefficient-x1",
            *(f"{loss}-coefficient-0" for loss in losses),
        ),
    )
    yield from _with_seeds(published)
    yield from _capacities(published)
    yield from _coefficients(published, around=V2_BALANCE, scales=(0.1, 1, 10))
    yield from _v3_balances(published)
    yield from _routers(published, ("deepseek_moe", "topk_softmax", "deepseek_v2", "expert_choice", "hash"))


def _v3_balances(published: LibraryPoint) -> Iterator[LibraryPoint]:
    """The bias' speed and the sequence loss at multiples, neither of them, and DeepSeek-V2's losses instead."""
    for scale in (0, 0.1, 10):
        gamma = V3_BALANCE.model_copy(update={"loss_free": LossFree(gamma=scale * 1e-3)})
        sequence = V3_BALANCE.model_copy(update={"sequence": scale * 1e-4})
        name = _scale_name(scale)
        yield _vary(published, f"gamma-{name}", "gamma", name, balance=gamma)
        yield _vary(published, f"sequence-coefficient-{name}", "sequence-coefficient", name, balance=sequence)
    yield _vary(published, "no-balance", "balance", "none", balance=Balance())
    yield _vary(published, "balance-losses", "balance", "DeepSeek-V2's losses", balance=V2_BALANCE)


def _few_experts() -> Iterator[LibraryPoint]:
    """Switch and GShard fix top-1 and top-2: the 64 experts of 64x6, fewer of them used per token."""
    for layout, kind, top_k in (("64x1", "switch", 1), ("64x2", "gshard", 2)):
        router = RouterShape(kind=kind, num_experts=64, top_k=top_k, num_devices=NUM_GROUPS)
        capacity = DeviceCapacity(kind="device", factor=1.0)
        request = _request(router, balance=V2_BALANCE, capacity=capacity, shared=2, tokens=SHARE_TOKENS)
        yield LibraryPoint(layout=layout, point=f"router-{kind}", axis="router", value=kind, request=request)


def _granularity() -> Iterator[LibraryPoint]:
    """E x K experts at constant E * width and K * width: DeepSeekMoE's router, no groups, nothing dropped or shared."""
    for num_experts, top_k in GRANULARITIES:
        router = RouterShape(kind="deepseek_moe", num_experts=num_experts, top_k=top_k, num_devices=NUM_GROUPS)
        thin = THIN.model_copy(update={"expert_intermediate": GRANULARITY_WIDTH // top_k})
        for seed in SEEDS:
            tokens = STUDY_TOKENS["granularity"]
            request = _request(
                router, balance=FINE_BALANCE, capacity=NoCapacity(), shared=0, tokens=tokens, seed=seed, thin=thin
            )
            size = f"{num_experts}x{top_k}"
            yield LibraryPoint(layout="granularity", point=size, axis="granularity", value=size, request=request)


def _planned() -> Iterator[LibraryPoint]:
    """Layouts that people plan with, each with its published router and balance: nothing is dropped, no groups.

    Coefficients are in DeepSeekMoE's form, whose loss is 1 at perfect balance. That of Mixtral and Qwen3 is K there in
    transformers' code, so `router_aux_loss_coef` (0.02, 0.001) is multiplied by K; OLMoE's 0.01 (arXiv 2409.02060) is
    divided by K in the code that trained it. Kimi-K2 balances by a bias and takes 0.001 within sequences (its
    config.json). `no-balance` beside each: what its router does when left alone.
    """
    settings: tuple[tuple[str, RouterShape, Balance, int], ...] = (
        ("8x2", _ungrouped("topk_softmax", 8, 2), Balance(expert=0.04), 0),
        ("64x8", _ungrouped("deepseek_moe", 64, 8), Balance(expert=0.01), 0),
        ("128x8", _ungrouped("topk_softmax", 128, 8), Balance(expert=0.008), 0),
        (
            "384x8",
            _ungrouped("deepseek_v3", 384, 8, routed_scaling_factor=2.827),
            Balance(sequence=1e-3, loss_free=LossFree(gamma=1e-3)),
            1,
        ),
    )
    for layout, router, balance, shared in settings:
        for seed in SEEDS:
            tokens = PLANNED_TOKENS[layout] if seed == 0 else SHARE_TOKENS
            request = _request(router, balance=balance, capacity=NoCapacity(), shared=shared, tokens=tokens, seed=seed)
            published = LibraryPoint(
                layout=layout, point="published", axis="published", value="published", request=request
            )
            yield published
            if seed == 0:
                yield _vary(published, "no-balance", "balance", "none", balance=Balance())


def _ungrouped(kind: str, num_experts: int, top_k: int, **more: Any) -> RouterShape:
    return RouterShape(kind=kind, num_experts=num_experts, top_k=top_k, num_devices=NUM_GROUPS, **more)
