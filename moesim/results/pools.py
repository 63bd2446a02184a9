"""What each pool of a cluster does in a step and costs, and which ranks waited for which.

Legend: S routing samples, W ranks of the world, C categories, R ranks of a group, N spans.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.memory import MemoryReport
from moesim.results.metrics import SECONDS_PER_HOUR
from moesim.results.spans import SpanTable, Stream
from moesim.scenario import Scenario
from moesim.scenario.mixed import pools_of_ranks, rank_counts

FloatArray = NDArray[np.float64]
MOST_PAIRS = 10  # of ranks that are told
ROUND_OFF = 1e-9  # seconds that are none
Seconds = defaultdict[tuple[int, int], float]
Waits = Mapping[tuple[int, int], float]
Collective = tuple[str, Sequence[NDArray[np.int64]]]  # of gradients or parameters: its name, and the ranks of every set


def pool_facts(
    scenario: Scenario, memory: MemoryReport, *, step_s: float, compute_time_SW: FloatArray
) -> list[dict[str, Any]]:
    """The section `pools` of a result: one entry per pool."""
    cluster, mesh = scenario.cluster, scenario.parallelism
    counts = rank_counts(cluster, mesh)
    pool_W = np.array(pools_of_ranks(cluster, mesh) if len(cluster.pools) > 1 else (0,) * mesh.world_size)
    speed_W = cluster.speeds.of_ranks(mesh.world_size, seed=scenario.seed)
    by_name = {pool.name: pool for pool in memory.pools}
    facts = []
    for number, pool in enumerate(cluster.pools):
        of_pool_W, used = pool_W == number, by_name.get(pool.name)
        hourly = pool.usd_per_gpu_hour * pool.nodes * pool.gpus_per_node
        facts.append(
            {
                "name": pool.name,
                "gpu": pool.gpu_name,
                "gpus": pool.nodes * pool.gpus_per_node,
                "ranks": counts[number],
                "micro_batches": scenario.micro_batches_of_pools[number],
                "compute_s": float(compute_time_SW[:, of_pool_W].mean()) if used else None,
                "slowest_speed": 1.0 if speed_W is None or not used else float(speed_W[of_pool_W].min()),
                "peak_bytes": used.peak_bytes if used else None,
                "capacity_bytes": pool.spec.memory_bytes,
                "fits_share": float(np.mean(used.fits_S)) if used else None,
                "usd_per_gpu_hour": pool.usd_per_gpu_hour,
                "usd_per_step": hourly * step_s / SECONDS_PER_HOUR,
                "price_source": pool.price_source,
            }
        )
    return facts


def waits(tables: Sequence[SpanTable], places: Sequence[tuple[int, int]], collectives: Sequence[Collective]) -> Waits:
    """Seconds that ranks waited for others in sample 0, by (who waits, for whom).

    In a transfer or a collective the last one to come is waited for; at a p2p send the neighbour in the pipeline.
    `places`: pipeline rank and number of the group of every table. Of groups that do the same one stands for all. What
    a rank waits in a transfer counts whether or not it computes beside it.
    """
    found: Seconds = defaultdict(float)
    neighbours = {place: table.ranks_R for place, table in zip(places, tables, strict=True)}
    for table, (_, number) in zip(tables, places, strict=True):
        _add_transfers(found, table)
        _add_p2p(found, table, {rank: ranks for (rank, other), ranks in neighbours.items() if other == number})
    _add_collectives(found, tables, collectives)
    return dict(found)


def _add(found: Seconds, ranks_R: NDArray[np.int64], whom_R: NDArray[np.int64], s_R: FloatArray) -> None:
    for rank, whom, seconds in zip(ranks_R.tolist(), whom_R.tolist(), s_R.tolist(), strict=True):
        if rank != whom and seconds > ROUND_OFF:
            found[rank, whom] += seconds


def _add_transfers(found: Seconds, table: SpanTable) -> None:
    rows_N = table.rows(Stream.COMMUNICATION)
    if not len(rows_N):
        return
    start_NR = table.start_NSR[rows_N, 0]
    wait_NR = table.finish_NSR[rows_N, 0] - start_NR - table.own_NSR[rows_N, 0]
    seconds_RR = np.zeros((start_NR.shape[1],) * 2)
    labels = table.label_N[rows_N]
    for peers in {table.labels[label].peers for label in np.unique(labels).tolist()}:
        of_label = np.array([table.labels[label].peers == peers for label in range(len(table.labels))])
        chosen_N = np.flatnonzero(of_label[labels])
        set_R = np.array(peers, dtype=np.int64) if peers else np.zeros(start_NR.shape[1], dtype=np.int64)
        for one in np.unique(set_R):
            at_R = np.flatnonzero(set_R == one)
            start_NM = start_NR[np.ix_(chosen_N, at_R)]
            last_N = at_R[start_NM.argmax(axis=1)]
            earlier_NM = start_NM < start_NM.max(axis=1, keepdims=True)  # others wait for chance alone
            wait_NM = np.where(earlier_NM, wait_NR[np.ix_(chosen_N, at_R)], 0.0)
            np.add.at(seconds_RR.T, last_N, _columns(wait_NM, at_R, len(seconds_RR)))
    whom, who = np.nonzero(seconds_RR.T > 0)
    _add(found, table.ranks_R[who], table.ranks_R[whom], seconds_RR[who, whom])


def _columns(wait_NM: FloatArray, at_R: NDArray[np.intp], ranks: int) -> FloatArray:
    """The waits of the ranks `at_R`, 0 for the others."""
    kept_NR = np.zeros((len(wait_NM), ranks))
    kept_NR[:, at_R] = np.maximum(wait_NM, 0.0)
    return kept_NR


def _add_p2p(found: Seconds, table: SpanTable, ranks_of: Mapping[int, NDArray[np.int64]]) -> None:
    rows_N = table.rows(Stream.PIPELINE)
    if not len(rows_N):
        return
    # Before a p2p send's span a rank stood idle from the end of what it did before.
    done_NR = np.maximum.accumulate(table.finish_NSR[:, 0], axis=0)
    for row in rows_N.tolist():
        source = table.labels[table.label_N[row]].sender
        before_R = done_NR[row - 1] if row else np.zeros_like(done_NR[0])
        _add(found, table.ranks_R, ranks_of[source], table.finish_NSR[row, 0] - before_R)


def _add_collectives(found: Seconds, tables: Sequence[SpanTable], collectives: Sequence[Collective]) -> None:
    """A rank waits from when it has nothing else to do."""
    ready: dict[tuple[str, int], tuple[float, float]] = {}  # and how long it waits
    for table in tables:
        rows_N = table.rows(Stream.REDUCTION)
        done_NR = np.maximum.accumulate(table.finish_NSR[:, 0], axis=0)
        for row in rows_N.tolist():
            begin_R = np.maximum(table.start_NSR[row, 0], done_NR[row - 1] if row else 0.0)
            wait_R = table.finish_NSR[row, 0] - table.own_NSR[row, 0] - begin_R
            name = table.labels[table.label_N[row]].name
            for rank, begin, wait in zip(table.ranks_R.tolist(), begin_R.tolist(), wait_R.tolist(), strict=True):
                ready[name, rank] = begin, wait
    for name, members in collectives:
        for ranks in members:
            there = [rank for rank in ranks.tolist() if (name, rank) in ready]
            last = max(there, key=lambda rank: ready[name, rank][0], default=-1)
            for rank in there:
                if rank != last and ready[name, rank][1] > ROUND_OFF:
                    found[rank, last] += ready[name, rank][1]


def waiting_facts(found: Waits, *, jitter_s: float) -> dict[str, Any]:
    """The section `waiting` of a result: the pairs with most seconds, the ranks that were waited for most, and what of
    the waiting is for jitter.
    """
    for_rank: defaultdict[int, float] = defaultdict(float)
    for (_, whom), seconds in found.items():
        for_rank[whom] += seconds
    pairs = sorted(found.items(), key=lambda pair: (-pair[1], pair[0]))[:MOST_PAIRS]
    return {
        "jitter_s": jitter_s,
        "pairs": [{"rank": who, "waits_for": whom, "seconds": seconds} for (who, whom), seconds in pairs],
        "waited_for": [
            {"rank": rank, "seconds_of_others": seconds}
            for rank, seconds in sorted(for_rank.items(), key=lambda item: (-item[1], item[0]))[:MOST_PAIRS]
        ],
    }
