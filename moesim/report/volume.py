"""Volume laws, counted: what one token sends in one dispatch as its expert group grows, for several group limits M.

The router's groups are what dispatch sends to once: the ranks of the expert group, or its nodes under `per_node`.
Every number is counted on simulated routing laid out on that many ranks, as `moesim run` does; no formula enters.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import UserError
from moesim.parallel import TrafficSampler, token_bytes
from moesim.parallel.traffic import held_copies, tier_copies
from moesim.routing.request import ProgressCallback
from moesim.run import obtain_trace
from moesim.scenario import (
    Cluster,
    GroupedRouter,
    Parallelism,
    PopularityRouting,
    Scenario,
    Uncertainty,
    UniformRouting,
)
from moesim.scenario.routing import NO_GROUPS, Router, StatedRouting
from moesim.seeding import stream
from moesim.trace import RoutingTrace

UNITS = (2, 4, 8, 16, 32, 64)  # sizes of the group by default: ranks, or nodes under per_node
LIMITS = (1, 2, 3, 4, None)  # None: no limit
_TOKENS = 65_536  # of one point, at least: the mean copies of a token are then known to about 0.005


@dataclass(frozen=True, kw_only=True)
class VolumePoint:
    """One token in one dispatch on `devices` ranks, means over all tokens; `limit` None where nothing limits.

    copies: copies in all, one for each distinct group that it reaches (each expert under per_expert), its own included.
    intra_node_bytes, inter_node_bytes: what leaves its rank, by NVLink and over the network; its own copy does not.
    """

    devices: int
    nodes: int
    limit: int | None
    copies: float
    intra_node_bytes: float
    inter_node_bytes: float


@dataclass(frozen=True, kw_only=True)
class VolumeStudy:
    """Points of every group size and limit that can be; a limit whose groups hold fewer than K experts cannot.

    `recorded`: the routing comes from a trace, whose own limit stands.
    """

    scenario: Scenario
    limits: tuple[int | None, ...]
    devices: tuple[int, ...]
    points: tuple[VolumePoint, ...]
    source: str
    recorded: bool

    @property
    def per_node(self) -> bool:
        """Whether groups are nodes, and bytes those over the network."""
        return self.scenario.dispatch.deduplicate == "per_node"

    @property
    def copy_bytes(self) -> float:
        """Bytes of one copy of a token on its way to its experts."""
        return token_bytes(self.scenario.model.row_width, self.scenario.dispatch.dtype)

    def bytes_of(self, point: VolumePoint) -> float:
        """What the law speaks of: bytes over the network under per_node, else all that leave the rank."""
        return point.inter_node_bytes + (0.0 if self.per_node else point.intra_node_bytes)

    def find(self, devices: int, limit: int | None) -> VolumePoint | None:
        """The point of one size and limit, None where that cannot be."""
        found = [point for point in self.points if (point.devices, point.limit) == (devices, limit)]
        return found[0] if found else None


def study_volume(
    scenario: Scenario,
    *,
    devices: Sequence[int] | None = None,
    limits: Sequence[int | None] | None = None,
    progress: ProgressCallback | None = None,
    cache_dir: Path | None = None,
) -> VolumeStudy:
    """Count the copies and bytes of `scenario`'s routing on expert groups of `devices` ranks under every limit.

    Its model, routing, capacity, dispatch and nodes stand; experts are placed in order. Uniform and popularity routing
    is drawn anew for every limit; a trained or recorded router keeps the limit that it was recorded with. Raises
    UserError for sizes that the experts or nodes cannot fill.
    """
    recorded = not isinstance(scenario.routing, UniformRouting | PopularityRouting)
    _check_routing(scenario, limits_fixed=recorded and limits is not None)
    trace = obtain_trace(scenario, progress=progress, cache_dir=cache_dir) if recorded else None
    sizes = tuple(sorted(set(devices))) if devices is not None else _usual_sizes(scenario)
    for size in sizes:
        _check_size(scenario, size)
    chosen = (None,) if recorded else tuple(dict.fromkeys(LIMITS if limits is None else limits))
    kept: dict[tuple[int, int], RoutingTrace] = {}
    points = [
        _count(laid_out, trace or _routed(laid_out, kept), limit)
        for limit in chosen
        for size in sizes
        if (laid_out := _laid_out(scenario, devices=size, limit=limit)) is not None
    ]
    return VolumeStudy(
        scenario=scenario,
        limits=chosen,
        devices=sizes,
        points=tuple(points),
        source=_source(scenario, trace),
        recorded=recorded,
    )


def _source(scenario: Scenario, trace: RoutingTrace | None) -> str:
    if trace is None:
        return f"{scenario.routing.kind} routing, drawn for every size and limit"
    router = trace.router
    limit = f", at most {router.group_limit} of {router.num_groups} groups" if router.num_groups > 1 else ""
    return f"{trace.final.num_tokens:,} tokens as {router.kind} routed them{limit}"


def _check_routing(scenario: Scenario, *, limits_fixed: bool) -> None:
    if scenario.model.experts == 0:
        raise UserError(f"{scenario.name}: the model is dense (model.experts = 0), so no token is dispatched")
    if isinstance(scenario.routing, StatedRouting):
        raise UserError(
            f"{scenario.name}: routing.kind = {scenario.routing.kind} states the load of one size of expert group, not "
            "of every size; use --set routing.kind=uniform"
        )
    if limits_fixed:
        raise UserError(
            f"--limits: routing.kind = {scenario.routing.kind} keeps the limit that it was recorded with; "
            "leave --limits out, or use --set routing.kind=uniform"
        )


def _usual_sizes(scenario: Scenario) -> tuple[int, ...]:
    unit = _node_size(scenario) if scenario.dispatch.deduplicate == "per_node" else 1
    return tuple(unit * count for count in UNITS if scenario.model.experts % (unit * count) == 0)


def _node_size(scenario: Scenario) -> int:
    sizes = {pool.gpus_per_node: None for pool in scenario.cluster.pools}
    if len(sizes) > 1:
        counts = " and ".join(map(str, sizes))
        raise UserError(f"{scenario.name}: cluster.pools has nodes of {counts} GPUs; a volume needs nodes of one size")
    return next(iter(sizes))


def _check_size(scenario: Scenario, size: int) -> None:
    experts, node = scenario.model.experts, _node_size(scenario)
    if size < 1 or experts % size:
        raise UserError(f"--devices: {size} ranks cannot share {experts} experts evenly; use divisors of {experts}")
    if scenario.dispatch.deduplicate == "per_node" and size % node:
        raise UserError(f"--devices: {size} ranks do not fill nodes of {node} GPUs; use multiples of {node}")


def _routed(laid_out: Scenario, kept: dict[tuple[int, int], RoutingTrace]) -> RoutingTrace:
    """Routing drawn for one layout; what does not depend on it, as without a limit, is drawn once."""
    shape = laid_out.router_shape()
    key = (shape.num_groups, shape.group_limit)
    if key not in kept:
        trace = obtain_trace(laid_out)
        assert trace is not None, "the model has experts"
        kept[key] = trace
    return kept[key]


def _count(laid_out: Scenario, trace: RoutingTrace, limit: int | None) -> VolumePoint:
    """Count one point: a step of the expert group in every layer of the trace."""
    dispatch, devices = laid_out.dispatch, laid_out.parallelism.expert
    sampler = TrafficSampler(laid_out, trace)
    sample = sampler.draw(stream(laid_out.seed, "volume", devices))
    copy_bytes = token_bytes(laid_out.model.row_width, dispatch.dtype)
    copies = intra = inter = 0.0
    for layer in range(trace.num_layers):
        traffic, way = sample.thin_arrays(0, layer), dispatch.deduplicate
        held_BRX = held_copies(traffic, sampler.placement, way, tokens=laid_out.tokens_per_rank)
        copies += float((traffic.node_copies_BRJ if way == "per_node" else held_BRX).sum())
        tiers = tier_copies(traffic, sampler.placement, way, tokens=laid_out.tokens_per_rank)
        intra, inter = intra + copy_bytes * tiers.intra_node, inter + copy_bytes * tiers.inter_node
    tokens = trace.num_layers * laid_out.tokens_per_step
    return VolumePoint(
        devices=devices,
        nodes=laid_out.cluster.main_pool.nodes,
        limit=limit,
        copies=copies / tokens,
        intra_node_bytes=intra / tokens,
        inter_node_bytes=inter / tokens,
    )


def _laid_out(scenario: Scenario, *, devices: int, limit: int | None) -> Scenario | None:
    """The scenario as one expert group of `devices` ranks with a sequence each, and with a router of that many groups.

    None where the groups within the limit hold fewer experts than a token needs.
    """
    model, nodes = scenario.model, -(-devices // _node_size(scenario))
    groups = nodes if scenario.dispatch.deduplicate == "per_node" else devices
    if limit is not None and min(limit, groups) * model.experts < model.top_k * groups:
        return None
    router: Router = NO_GROUPS
    if limit is not None and limit < groups:
        router = GroupedRouter(kind="deepseek_v2", groups=groups, group_limit=limit)
    routing = scenario.routing
    if isinstance(routing, UniformRouting | PopularityRouting):
        routing = routing.model_copy(update={"router": router})
    pool = scenario.cluster.main_pool.model_copy(update={"nodes": nodes})
    length = scenario.workload.sequence_length
    if scenario.capacity.kind == "none":  # what is dropped depends on the length, what is sent else does not
        length = min(length, -(-_TOKENS // devices))
    micro_batches = -(-_TOKENS // (devices * length))
    workload = {"sequence_length": length, "micro_batch": 1, "global_batch": devices * micro_batches}
    return Scenario(
        name=scenario.name,
        model=model,
        routing=routing,
        capacity=scenario.capacity,
        cluster=Cluster(pools=(pool,)),
        parallelism=Parallelism(data=devices, expert=devices),
        workload=scenario.workload.model_copy(update=workload),
        dispatch=scenario.dispatch,
        uncertainty=Uncertainty(bank=micro_batches),
        seed=scenario.seed,
    )
