"""Which GPU runs which rank, how fast GPUs of several kinds are, and how their ranks share the batch.

Ranks are numbered with the pipeline slowest, so that pools in their order cross it. Where another axis is to cross
pools, the nodes of every pool are dealt out: in each pipeline stage (data) or each expert group (expert) every pool has
the same share of nodes.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from moesim.errors import UserError
from moesim.scenario.catalogue import GpuSpec
from moesim.scenario.cluster import Cluster
from moesim.scenario.part_seconds import part_seconds

if TYPE_CHECKING:
    from moesim.scenario.schema import Parallelism, Scenario

DIGITS = 3  # of speeds and of parts in layers: a last bit that differs between machines must not move a layer
NEAR = 64  # micro-batches around a pool's exact share that are tried


def ranked_cluster(cluster: Cluster, mesh: "Parallelism") -> Cluster:
    """The cluster with its nodes in the order of the ranks: pools may come several times, with a part of their nodes.

    Raises UserError where the nodes of a pool cannot be dealt out evenly.
    """
    deals = _deals(mesh)
    if len(cluster.pools) == 1 or deals == 1:
        return cluster
    dealt = []
    for pool in cluster.pools:
        if pool.nodes % deals or (pool.nodes // deals) % cluster.trays_per_domain(pool):
            where = "pipeline stages" if mesh.across_pools == "data" else "expert groups"
            what = f'pool "{pool.name}" has {pool.nodes} nodes, which do not divide among {deals} {where}'
            raise UserError(
                f"parallelism.across_pools: {mesh.across_pools}: {what} (whole nodes, in nvl72 whole racks)"
            )
        dealt.append(pool.model_copy(update={"nodes": pool.nodes // deals}))
    return cluster.model_copy(update={"pools": tuple(dealt) * deals})


def _deals(mesh: "Parallelism") -> int:
    """Into how many like parts the ranks fall that each have a share of every pool."""
    if mesh.across_pools == "data":
        return mesh.pipeline
    if mesh.across_pools == "expert":
        return mesh.pipeline * (mesh.stage_ranks // (mesh.expert * mesh.expert_tensor))
    return 1


def pools_of_ranks(cluster: Cluster, mesh: "Parallelism") -> tuple[int, ...]:
    """The number of the pool of every rank, in `cluster.pools`."""
    numbers = {pool.name: number for number, pool in enumerate(cluster.pools)}
    found: list[int] = []
    for pool in ranked_cluster(cluster, mesh).pools:
        found += [numbers[pool.name]] * (pool.nodes * pool.gpus_per_node)
    return tuple(found[: mesh.world_size])


def kinds_of_pools(cluster: Cluster) -> tuple[int, ...]:
    """The kind of GPU of every pool: the number of the first pool that has it."""
    gpus = [pool.gpu for pool in cluster.pools]
    return tuple(map(gpus.index, gpus))


def specs_of_ranks(cluster: Cluster, mesh: "Parallelism") -> tuple[GpuSpec, ...]:
    """The GPU of every rank."""
    specs = [pool.spec for pool in cluster.pools]
    return tuple(specs[number] for number in pools_of_ranks(cluster, mesh))


def fewest_sms(cluster: Cluster, mesh: "Parallelism", ranks: Sequence[int]) -> int:
    """SMs of the smallest GPU among some ranks."""
    if len(set(kinds_of_pools(cluster))) == 1:
        return cluster.main_pool.spec.sm_count
    pools = pools_of_ranks(cluster, mesh)
    return min(cluster.pools[pool].spec.sm_count for pool in {pools[rank] for rank in ranks})


def rank_counts(cluster: Cluster, mesh: "Parallelism") -> tuple[int, ...]:
    """How many ranks every pool has."""
    if len(cluster.pools) == 1:
        return (mesh.world_size,)
    if _deals(mesh) == 1:
        counts, left = [], mesh.world_size
        for pool in cluster.pools:
            counts.append(min(left, pool.nodes * pool.gpus_per_node))
            left -= counts[-1]
        return tuple(counts)
    pools = pools_of_ranks(cluster, mesh)
    return tuple(pools.count(number) for number in range(len(cluster.pools)))


def is_mixed(cluster: Cluster, mesh: "Parallelism") -> bool:
    """Whether ranks are on GPUs of several kinds."""
    kinds = {pool.gpu for pool, count in zip(cluster.pools, rank_counts(cluster, mesh), strict=True) if count}
    return len(kinds) > 1


def relative_speeds(scenario: "Scenario") -> tuple[float, ...]:
    """Tokens per second of one GPU of each pool through the model's layers, as estimated from data sheets."""
    seconds = []
    for pool in scenario.cluster.pools:
        parts = part_seconds(scenario, pool=pool)
        model = scenario.model
        seconds.append(parts.dense_layer * model.dense_layers + parts.moe_layer * model.moe_layers)
    return tuple(1.0 / each for each in seconds)


def micro_batches_of_pools(scenario: "Scenario") -> tuple[int, ...]:
    """Micro-batches that each data-parallel rank of every pool runs in a step.

    Raises UserError where a share by speed cannot give every rank whole micro-batches.
    """
    mesh, work, cluster = scenario.parallelism, scenario.workload, scenario.cluster
    if mesh.batch_share == "even" or len(cluster.pools) == 1:
        return (work.global_batch // (mesh.data * work.micro_batch),) * len(cluster.pools)
    if isinstance(mesh.batch_share, tuple):
        return mesh.batch_share
    ranks = data_ranks_of_pools(scenario)
    total, left = divmod(work.global_batch, work.micro_batch)
    speeds = relative_speeds(scenario)
    rounded = tuple(round(speed / max(speeds), 6) for speed in speeds)  # the last bits must not move a micro-batch
    found = None if left else _shares(total, ranks, rounded)
    if found is None:
        unit = work.micro_batch * math.gcd(*(count for count in ranks if count))
        remedy = f"use a multiple of {unit} that is large enough, or give parallelism.batch_share as a list"
        what = (
            f"{work.global_batch} sequences do not go into whole micro-batches of {_joined(ranks)} data-parallel ranks"
        )
        raise UserError(f"workload.global_batch: {what} of the pools; {remedy}")
    return found


def _joined(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers))


def data_ranks_of_pools(scenario: "Scenario") -> tuple[int, ...]:
    """Data-parallel ranks on the GPUs of each pool, where data parallelism crosses pools."""
    mesh = scenario.parallelism
    return tuple(count // (mesh.pipeline * mesh.tensor * mesh.context) for count in rank_counts(scenario.cluster, mesh))


@lru_cache(maxsize=256)
def _shares(total: int, ranks: tuple[int, ...], speeds: tuple[float, ...]) -> tuple[int, ...] | None:
    """Micro-batches of a rank of each pool, at least 1, `total` on all ranks together: the slowest takes least long.

    >>> _shares(24, (2, 2), (1.0, 2.0))
    (4, 8)
    """
    pace = total / sum(count * speed for count, speed in zip(ranks, speeds, strict=True))
    best: tuple[float, tuple[int, ...]] | None = None
    for chosen in _choices(total, ranks, tuple(pace * speed for speed in speeds)):
        longest = max(each / speed for each, speed, n in zip(chosen, speeds, ranks, strict=True) if n)
        if best is None or longest < best[0]:
            best = longest, chosen
    return None if best is None else best[1]


def _choices(total: int, ranks: tuple[int, ...], ideal: tuple[float, ...]) -> list[tuple[int, ...]]:
    count, *others = ranks
    if not others:
        exact = count and total >= count and total % count == 0
        return [(total // count,)] if exact else [(0,)] if not count and not total else []
    if not count:
        return [(0, *rest) for rest in _choices(total, tuple(others), ideal[1:])]
    near = range(max(1, int(ideal[0]) - NEAR), min(total // count, int(ideal[0]) + NEAR) + 1)
    return [(each, *rest) for each in near for rest in _choices(total - each * count, tuple(others), ideal[1:])]


def speeds_of_stages(scenario: "Scenario") -> tuple[float, ...]:
    """The speed of every pipeline rank's slowest GPU against the fastest of all; empty where all are alike."""
    cluster, mesh = scenario.cluster, scenario.parallelism
    if not is_mixed(cluster, mesh):
        return ()
    of_pool, pools = relative_speeds(scenario), pools_of_ranks(cluster, mesh)
    slowest = [
        min(of_pool[pool] for pool in set(pools[first : first + mesh.stage_ranks]))
        for first in range(0, mesh.world_size, mesh.stage_ranks)
    ]
    speeds = tuple(round(speed / max(slowest), DIGITS) for speed in slowest)
    return speeds if min(speeds) < 1 else ()
