"""Checks of where ranks and experts are.

Clusters of several pools: which axis crosses them, how they share the batch, ranks that differ. The `placement`
section: every expert has a slot, and slots are spread as they are said to be.
"""

from collections.abc import Sequence
from itertools import pairwise

from moesim.errors import UserError
from moesim.scenario.base import MOST_EXPERTS
from moesim.scenario.check_layout import Report, either, nearest_divisors
from moesim.scenario.degraded import LinkChange, Slowdown
from moesim.scenario.mixed import data_ranks_of_pools, is_mixed, pools_of_ranks, ranked_cluster
from moesim.scenario.placement import Explicit, MadeFromRows, keeps_groups
from moesim.scenario.routing import ExpertCapacity
from moesim.scenario.schema import Scenario
from moesim.scenario.software import FUSED


def check_mixed(scenario: Scenario, report: Report) -> None:
    """Raises UserError where ranks cannot be on the pools as the scenario says."""
    mesh, cluster = scenario.parallelism, scenario.cluster
    _check_speeds(scenario, report)
    _check_changes(scenario, report)
    axis = mesh.across_pools
    if axis is not None and len(cluster.pools) == 1:
        raise report.user("parallelism.across_pools", f"{axis} crosses no pool: there is one; name several, or drop it")
    if axis == "expert" and mesh.expert == 1:
        raise report.user("parallelism.across_pools", "expert groups of 1 rank cross no pool; use data or pipeline")
    if axis == "pipeline" and mesh.pipeline == 1:
        raise report.user("parallelism.across_pools", "1 pipeline stage crosses no pool; use data or expert")
    if axis in ("data", "expert") and scenario.idle_gpus:
        what = f"{mesh.world_size} ranks on {cluster.num_gpus} GPUs: ranks are dealt out over all nodes of every pool"
        raise report.user("parallelism.across_pools", f"{what}; name as many nodes as there are ranks")
    try:
        ranked_cluster(cluster, mesh)
    except UserError as error:
        raise report.user("parallelism.across_pools", str(error).partition(": ")[2]) from None
    if is_mixed(cluster, mesh) or mesh.batch_share != "even":
        _check_boundaries(scenario, report)


def _check_speeds(scenario: Scenario, report: Report) -> None:
    speeds, world = scenario.cluster.speeds, scenario.parallelism.world_size
    if speeds.factors is not None and len(speeds.factors) != world:
        what = f"{len(speeds.factors)} factors for {world} ranks"
        raise report.user("cluster.speeds.factors", f"{what}; give one per rank, or name single ones in ranks")
    for index, one in enumerate(speeds.ranks):
        if one.rank >= world:
            raise report.user(f"cluster.speeds.ranks.{index}.rank", f"rank {one.rank} of ranks 0 to {world - 1}")


def _check_changes(scenario: Scenario, report: Report) -> None:
    cluster, world = scenario.cluster, scenario.parallelism.world_size
    nodes = sum(pool.nodes for pool in cluster.pools)
    steps = scenario.uncertainty.samples if scenario.model.experts else 1
    lists: tuple[tuple[str, Sequence[Slowdown | LinkChange]], ...] = (
        ("cluster.slowdowns", cluster.slowdowns),
        ("cluster.fabric.changes", cluster.fabric.changes),
    )
    for where, changes in lists:
        for index, one in enumerate(changes):
            key, rank, node = f"{where}.{index}", getattr(one, "rank", None), one.node
            named = [name for name in ("rank", "node", "link", "rail") if getattr(one, name, None) is not None]
            if len(named) != 1:
                raise report.user(key, "names " + (" and ".join(named) or "nothing") + "; name one")
            if rank is not None and rank >= world:
                raise report.user(f"{key}.rank", f"rank {rank} of ranks 0 to {world - 1}")
            if node is not None and node >= nodes:
                raise report.user(f"{key}.node", f"node {node} of nodes 0 to {nodes - 1}")
            if one.until is not None and one.until <= one.at:
                raise report.user(f"{key}.until", f"{one.until:g} s is not behind at = {one.at:g} s")
            if one.from_step >= steps:
                what = f"step {one.from_step} of the {steps} that are simulated"
                raise report.user(f"{key}.from_step", f"{what}; a step is a routing sample (uncertainty.samples)")


def _check_boundaries(scenario: Scenario, report: Report) -> None:
    """No group that cannot be on several kinds of GPU has ranks on two pools."""
    mesh, cluster = scenario.parallelism, scenario.cluster
    blocks = {
        "tensor and context parallelism": mesh.tensor * mesh.context,
        "expert-tensor parallelism": mesh.expert_tensor,
    }
    if mesh.across_pools == "pipeline":
        blocks = {"the ranks of a pipeline stage (across_pools: pipeline)": mesh.stage_ranks, **blocks}
    if mesh.across_pools == "data":
        blocks["an expert group (across_pools: data)"] = mesh.expert * mesh.expert_tensor
    pools = pools_of_ranks(cluster, mesh)
    ends = [(rank + 1, first, second) for rank, (first, second) in enumerate(pairwise(pools)) if first != second]
    for what, size in blocks.items():
        for end, first, second in ends:
            if end % size:
                names = f'"{cluster.pools[first].name}" and "{cluster.pools[second].name}"'
                why = f"{what} cannot cross pools, but {size} ranks of it are on {names} (from rank {end} on)"
                key = "cluster.pools" if mesh.across_pools is None else "parallelism.across_pools"
                raise report.user(key, f"{why}; use pools whose GPUs are multiples of {size}, or smaller groups")


def check_batch(scenario: Scenario, report: Report) -> None:
    """Raises UserError where the global batch does not split into whole micro-batches of all ranks."""
    work, mesh = scenario.workload, scenario.parallelism
    if mesh.batch_share != "even":
        _check_shares(scenario, report)
        return
    unit = mesh.data * work.micro_batch
    if work.global_batch % unit:
        below = work.global_batch // unit * unit
        fits = either(size for size in (below, below + unit) if size)
        what = (
            f"{work.global_batch} sequences do not split into data * micro_batch = {mesh.data} * {work.micro_batch} = "
            f"{unit}"
        )
        raise report.user("workload.global_batch", f"{what}; use {fits}")


def _check_shares(scenario: Scenario, report: Report) -> None:
    work, mesh, pools = scenario.workload, scenario.parallelism, scenario.cluster.pools
    key = "parallelism.batch_share"
    if mesh.across_pools != "data":
        what = "data-parallel ranks of one pool share the batch evenly; shares need parallelism.across_pools: data"
        raise report.user(key, f"{what}; or use even")
    if max(mesh.zero.dense, mesh.zero.expert) > 1:
        what = "ZeRO 2 and 3 gather and reduce in every micro-batch, so that all ranks need equally many"
        raise report.user(key, f"{what}; use even, or ZeRO 0 or 1")
    ranks = data_ranks_of_pools(scenario)
    if isinstance(mesh.batch_share, tuple):
        if len(mesh.batch_share) != len(pools):
            what = f"{len(mesh.batch_share)} numbers of micro-batches for {len(pools)} pools"
            raise report.user(key, f"{what}; give one per pool, in their order")
        total = sum(n * share for n, share in zip(ranks, mesh.batch_share, strict=True)) * work.micro_batch
        if total != work.global_batch:
            terms = " + ".join(f"{n} * {share}" for n, share in zip(ranks, mesh.batch_share, strict=True))
            what = f"({terms}) micro-batches of {work.micro_batch} are {total} sequences"
            raise report.user(key, f"{what}, not workload.global_batch = {work.global_batch}; make them equal")
        counts = mesh.batch_share
    else:
        try:
            counts = scenario.micro_batches_of_pools
        except UserError as error:
            raise report.user("workload.global_batch", str(error).partition(": ")[2]) from None
    facts, p = mesh.schedule.facts, mesh.pipeline
    for pool, count in zip(pools, counts, strict=True):
        if (facts.whole_rounds and count % p) or (facts.even and count % 2) or count < facts.least_rounds * p:
            what = f'{facts.name} cannot run {count} micro-batches (pool "{pool.name}") on {p} pipeline ranks'
            raise report.user(key, f"{what}; give numbers that it can as a list, or use 1f1b")


def check_placement(scenario: Scenario, report: Report) -> None:
    """Raises UserError for maps that are not complete or of another model, and for slots that do not spread evenly."""
    experts, num_ranks, placement = scenario.model.experts, scenario.parallelism.expert, scenario.placement
    if experts == 0:
        return
    if isinstance(placement, Explicit):
        _check_explicit(scenario, placement, report)
    else:
        _check_number(experts, placement.redundant_experts, num_ranks, report)
    _check_split(scenario, report)
    speeds = placement.rank_speeds if isinstance(placement, MadeFromRows) else None
    if speeds is not None and len(speeds) != num_ranks:
        what = f"{len(speeds)} speeds for parallelism.expert = {num_ranks} ranks"
        raise report.user("placement.speeds", f"{what}; give one per rank")
    slots = sum(placement.slots_of_ranks(num_experts=experts, num_ranks=num_ranks))
    if slots > MOST_EXPERTS:
        raise report.user("placement", f"{slots:,} slots of {num_ranks} ranks; at most {MOST_EXPERTS:,} are simulated")
    _check_places(scenario, report)
    if slots > experts and isinstance(scenario.capacity, ExpertCapacity) and scenario.capacity.pad:
        raise report.user("capacity.pad", "rows of experts with copies are not padded; use pad: false")


def _check_number(experts: int, redundant: int, num_ranks: int, report: Report) -> None:
    """Equally many slots on each rank."""
    if redundant == 0 and experts % num_ranks:
        fits = either(nearest_divisors(experts, num_ranks))
        raise report.user("parallelism.expert", f"{num_ranks} does not divide experts = {experts}; use {fits}")
    if (experts + redundant) % num_ranks:
        most = redundant + -(experts + redundant) % num_ranks
        fits = either(number for number in (most - num_ranks, most) if number >= 0)
        what = f"{experts} experts and {redundant} copies do not spread over parallelism.expert = {num_ranks} ranks"
        raise report.user("placement.redundant_experts", f"{what}; use {fits}")


def _check_places(scenario: Scenario, report: Report) -> None:
    """Software without copies needs each expert in one place, alike in all layers, and router groups together."""
    software, placement = scenario.implementation.software, scenario.placement
    experts = scenario.model.experts
    slots = placement.fixed_slots(num_experts=experts, num_ranks=scenario.parallelism.expert)
    once = slots is not None and sum(map(len, slots)) == experts
    if software.copies_experts:
        return
    if slots is None or not once:
        what = f"{software.name} holds every expert once, at the same place in all layers"
        raise report.user("placement.kind", f"{what}; use contiguous, or implementation: {{kind: {FUSED.name}}}")
    num_groups = scenario.router_shape().num_groups
    if num_groups == 1 or experts % num_groups:
        return  # groups that do not divide the experts are refused as such
    even = len(set(map(len, slots))) == 1
    if not even or not keeps_groups(slots, num_groups=num_groups):
        what = f"{placement.kind} splits the router's {num_groups} groups of {experts // num_groups} experts over ranks"
        raise report.user(
            "placement.kind", f"{what}, which {software.name} does not; use implementation: {{kind: {FUSED.name}}}"
        )


def _check_explicit(scenario: Scenario, placement: Explicit, report: Report) -> None:
    experts, num_ranks = scenario.model.experts, scenario.parallelism.expert
    if (placement.slots is None) == (placement.file is None):
        what = "missing" if placement.slots is None else "conflicts with placement.file"
        raise report.user("placement.slots", f"{what}; give one of slots and file")
    if placement.slots is not None:
        _check_slots(placement.slots, experts, num_ranks, report)
        return
    try:
        found = placement.read_file()
    except UserError as error:
        raise report.user("placement.file", str(error)) from None
    model = scenario.model
    maps = found.of_layers(model.moe_layer_numbers, num_layers=model.layers)
    if maps is None:
        what = f"{len(found.slots)} layers" if found.numbers is None else f"layers {_run(found.numbers)}"
        wanted = _run(model.moe_layer_numbers[: model.moe_layers])
        raise report.user(
            "placement.file", f"{found.path.name} maps {what}, but the model has experts in layers {wanted}"
        )
    if found.num_slots % num_ranks:
        fits = either(nearest_divisors(found.num_slots, num_ranks))
        what = f"{found.path.name} has {found.num_slots} slots, which parallelism.expert = {num_ranks} does not divide"
        raise report.user("placement.file", f"{what}; use {fits} ranks")
    for layer, slots in zip(model.moe_layer_numbers, maps, strict=True):
        if fault := _fault(slots, experts):
            raise report.user("placement.file", f"{found.path.name}: layer {layer}: {fault}")


def _check_split(scenario: Scenario, report: Report) -> None:
    """Weights are there where a split is by weights and no rows give them, and there alone."""
    placement = scenario.placement
    weights = placement.weights if isinstance(placement, Explicit) else None
    if weights is not None and placement.split != "weighted":
        raise report.user("placement.weights", "are of no account without split: weighted; add it, or drop them")
    if placement.split != "weighted" or isinstance(placement, MadeFromRows):
        return
    if weights is None:
        what = f"weighted needs weights, which {placement.kind} without rows to place by has not"
        raise report.user("placement.split", f"{what}; use an explicit map with slots and weights, or eplb")
    assert isinstance(placement, Explicit)
    if placement.slots is None:
        raise report.user("placement.weights", "go with slots; a file of maps has none")
    if list(map(len, weights)) != list(map(len, placement.slots)):
        raise report.user("placement.weights", "must be lists as long as those of slots, one number per slot")
    given = [0.0] * scenario.model.experts
    for row, numbers in zip(placement.slots, weights, strict=True):
        for expert, weight in zip(row, numbers, strict=True):
            given[expert] += weight
    if 0.0 in given:
        raise report.user("placement.weights", f"expert {given.index(0.0)} has no weight in any slot; give it one")


def _check_slots(slots: tuple[tuple[int, ...], ...], experts: int, num_ranks: int, report: Report) -> None:
    if len(slots) != num_ranks:
        raise report.user("placement.slots", f"{len(slots)} lists for parallelism.expert = {num_ranks} ranks")
    for rank, row in enumerate(slots):
        if not row:
            raise report.user(f"placement.slots.{rank}", f"rank {rank} has no slot; give it an expert")
    if fault := _fault([expert for row in slots for expert in row], experts):
        raise report.user("placement.slots", fault)


def _fault(held: tuple[int, ...] | list[int], experts: int) -> str | None:
    """What is wrong with the experts of a layer's slots."""
    if (most := max(held)) >= experts or min(held) < 0:
        return f"expert {most if most >= experts else min(held)} is none of experts 0 to {experts - 1}"
    missing = sorted(set(range(experts)) - set(held))
    return f"every expert 0 to {experts - 1} needs a slot; expert {missing[0]} has none" if missing else None


def _run(numbers: tuple[int, ...]) -> str:
    """`3 to 60`, or the numbers where they leave gaps."""
    if numbers == tuple(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])
    return ", ".join(map(str, numbers))
