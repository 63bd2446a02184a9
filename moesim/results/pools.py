"""What each pool of a cluster does in a step and costs, and which ranks waited for which.

Legend: S routing samples, W ranks of the world, C categories, R ranks of a group, N spans.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.memory import MemoryReport
from moesim.results.metrics import SECONDS_PER_HOUR
from moesim.results.spans import Label, SpanTable, Stream
from moesim.scenario import Scenario
from moesim.scenario.stages import pools_of_ranks, rank_counts

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


class GroupWaits(NamedTuple):
    """Seconds of sample 0 that the ranks of a group waited: in transfers [for whom, who] by place in the group; by
    pipeline rank for its p2p sends; and by the name of a collective when each came to it, and how long then.
    """

    ranks_R: NDArray[np.int64]
    transfers_RR: FloatArray
    p2p_R: dict[int, FloatArray]
    collectives: dict[str, tuple[FloatArray, FloatArray]]

    def add_p2p(self, sender: int, seconds_R: FloatArray) -> None:
        """Seconds waited for a pipeline rank."""
        self.p2p_R[sender] = self.p2p_R[sender] + seconds_R if sender in self.p2p_R else seconds_R


def group_waits(table: SpanTable) -> GroupWaits:
    """Those of a whole table. What a rank waits in a transfer counts whether or not it computes beside it."""
    found = GroupWaits(table.ranks_R, _transfer_waits(table), {}, {})
    done_NR = np.maximum.accumulate(table.finish_NSR[:, 0], axis=0)
    for row in table.rows(Stream.PIPELINE).tolist():
        # Before a p2p send's span a rank stood idle from the end of what it did before.
        wait_R = table.finish_NSR[row, 0] - (done_NR[row - 1] if row else 0.0)
        found.add_p2p(table.labels[table.label_N[row]].sender, np.where(wait_R > ROUND_OFF, wait_R, 0.0))
    spans = table.start_NSR, table.finish_NSR, table.own_NSR
    for name, begin_R, wait_R in collective_waits(
        table.labels, table.label_N, *spans, done_R=np.zeros(len(table.ranks_R))
    ):
        found.collectives[name] = begin_R, wait_R
    return found


def waits(groups: Sequence[GroupWaits], places: Sequence[tuple[int, int]], collectives: Sequence[Collective]) -> Waits:
    """Seconds that ranks waited for others in sample 0, by (who waits, for whom).

    In a transfer or a collective the last one to come is waited for; at a p2p send the neighbour in the pipeline.
    `places`: pipeline rank and number of every group. Of groups that do the same one stands for all.
    """
    found: Seconds = defaultdict(float)
    ranks_of = {place: group.ranks_R for place, group in zip(places, groups, strict=True)}
    for group, (_, number) in zip(groups, places, strict=True):
        whom, who = np.nonzero(group.transfers_RR > 0)
        _add(found, group.ranks_R[who], group.ranks_R[whom], group.transfers_RR[whom, who])
        for sender, seconds_R in group.p2p_R.items():
            _add(found, group.ranks_R, ranks_of[sender, number], seconds_R)
    _add_collectives(found, groups, collectives)
    return dict(found)


def _add(found: Seconds, ranks_R: NDArray[np.int64], whom_R: NDArray[np.int64], s_R: FloatArray) -> None:
    for rank, whom, seconds in zip(ranks_R.tolist(), whom_R.tolist(), s_R.tolist(), strict=True):
        if rank != whom and seconds > ROUND_OFF:
            found[rank, whom] += seconds


def _transfer_waits(table: SpanTable) -> FloatArray:
    rows_N = table.rows(Stream.COMMUNICATION)
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
            np.add.at(seconds_RR, last_N, _columns(wait_NM, at_R, len(seconds_RR)))
    return seconds_RR


def _columns(wait_NM: FloatArray, at_R: NDArray[np.intp], ranks: int) -> FloatArray:
    """The waits of the ranks `at_R`, 0 for the others."""
    kept_NR = np.zeros((len(wait_NM), ranks))
    kept_NR[:, at_R] = np.maximum(wait_NM, 0.0)
    return kept_NR


def collective_waits(
    labels: Sequence[Label],
    label_N: NDArray[np.int32],
    start_NSR: FloatArray,
    finish_NSR: FloatArray,
    own_NSR: NDArray[np.float32],
    *,
    done_R: FloatArray,
) -> Iterator[tuple[str, FloatArray, FloatArray]]:
    """Of every collective among the rows its name, when ranks came to it and how long they then waited in sample 0.

    A rank waits from when it has nothing else to do; `done_R`: the end of what lies before the rows.
    """
    streams_L = np.array([label.stream for label in labels])
    rows_N = np.flatnonzero(streams_L[label_N] == Stream.REDUCTION)
    if not len(rows_N):
        return
    done_NR = np.maximum(np.maximum.accumulate(finish_NSR[:, 0], axis=0), done_R)
    for row in rows_N.tolist():
        begin_R = np.maximum(start_NSR[row, 0], done_NR[row - 1] if row else done_R)
        yield labels[label_N[row]].name, begin_R, finish_NSR[row, 0] - own_NSR[row, 0] - begin_R


def _add_collectives(found: Seconds, groups: Sequence[GroupWaits], collectives: Sequence[Collective]) -> None:
    ready: dict[tuple[str, int], tuple[float, float]] = {}  # when a rank came, and how long it waited
    for group in groups:
        for name, (begin_R, wait_R) in group.collectives.items():
            for rank, begin, wait in zip(group.ranks_R.tolist(), begin_R.tolist(), wait_R.tolist(), strict=True):
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
