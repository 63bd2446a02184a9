"""Checks of clusters of several pools: which axis crosses them, how they share the batch, what differs by rank."""

from collections.abc import Sequence
from itertools import pairwise

from moesim.errors import UserError
from moesim.scenario.check_layout import Report, either
from moesim.scenario.failures import LinkChange, Slowdown
from moesim.scenario.pools import data_ranks_of_pools, is_mixed, pools_of_ranks, ranked_cluster
from moesim.scenario.schema import Scenario


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
