"""Which ranks waited for which in sample 0, and how long.

Legend: N spans at hand, R ranks of a group.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.results.spans import Label, SpanTable, Stream

FloatArray = NDArray[np.float64]
MOST_PAIRS = 10  # of ranks that are told
ROUND_OFF = 1e-9  # seconds that are none
Collective = tuple[str, Sequence[NDArray[np.int64]]]  # of gradients or parameters: its name, and the ranks of every set


class Waits(NamedTuple):
    """Seconds that ranks waited for others: who, for whom, how long. Arrays, for a large step has a million pairs."""

    who_N: NDArray[np.int64]
    whom_N: NDArray[np.int64]
    seconds_N: FloatArray

    @classmethod
    def none(cls) -> "Waits":
        """Nobody waited."""
        return cls(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), np.zeros(0))

    def summed(self) -> "Waits":
        """Every pair once, in the order of its first seconds; what is round-off, and a rank's own time, left out."""
        kept_N = (self.who_N != self.whom_N) & (self.seconds_N > ROUND_OFF)
        if not kept_N.any():
            return self.none()
        who_N, whom_N, seconds_N = (values_N[kept_N] for values_N in self)
        pair_N = who_N * (1 + whom_N.max()) + whom_N
        _, first, of_pair_N = np.unique(pair_N, return_index=True, return_inverse=True)
        order = np.argsort(first)
        sums_N = np.asarray(np.bincount(of_pair_N, weights=seconds_N), dtype=np.float64)
        return Waits(who_N[first[order]], whom_N[first[order]], sums_N[order])


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
    """Seconds that ranks waited for others in sample 0.

    In a transfer or a collective the last one to come is waited for; at a p2p send the neighbour in the pipeline.
    `places`: pipeline rank and number of every group. Of groups that do the same one stands for all.
    """
    found = []
    ranks_of = {place: group.ranks_R for place, group in zip(places, groups, strict=True)}
    for group, (_, number) in zip(groups, places, strict=True):
        whom, who = np.nonzero(group.transfers_RR > 0)
        found.append(Waits(group.ranks_R[who], group.ranks_R[whom], group.transfers_RR[whom, who]))
        for sender, seconds_R in group.p2p_R.items():
            found.append(Waits(group.ranks_R, ranks_of[sender, number], seconds_R))
    found.append(_collective_waits(groups, collectives))
    return Waits(*map(np.concatenate, zip(*found, strict=True))).summed()


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


def _collective_waits(groups: Sequence[GroupWaits], collectives: Sequence[Collective]) -> Waits:
    ready: dict[tuple[str, int], tuple[float, float]] = {}  # when a rank came, and how long it waited
    for group in groups:
        for name, (begin_R, wait_R) in group.collectives.items():
            for rank, begin, wait in zip(group.ranks_R.tolist(), begin_R.tolist(), wait_R.tolist(), strict=True):
                ready[name, rank] = begin, wait
    found: list[tuple[int, int, float]] = []
    for name, members in collectives:
        for ranks in members:
            there = [rank for rank in ranks.tolist() if (name, rank) in ready]
            last = max(there, key=lambda rank: ready[name, rank][0], default=-1)
            found.extend((rank, last, ready[name, rank][1]) for rank in there)
    who, whom, seconds = zip(*found, strict=True) if found else ((), (), ())
    return Waits(np.array(who, dtype=np.int64), np.array(whom, dtype=np.int64), np.array(seconds, dtype=np.float64))


def waiting_facts(found: Waits, *, jitter_s: float) -> dict[str, Any]:
    """The section `waiting` of a result: the pairs with most seconds, the ranks that were waited for most, and what of
    the waiting is for jitter.
    """
    whom_N, seconds_N = found.whom_N, found.seconds_N
    most = np.lexsort((whom_N, found.who_N, -seconds_N))[:MOST_PAIRS]
    seconds_W = np.bincount(whom_N, weights=seconds_N)
    ranks = np.unique(whom_N)
    ranks = ranks[np.lexsort((ranks, -seconds_W[ranks]))[:MOST_PAIRS]]
    return {
        "jitter_s": jitter_s,
        "pairs": [
            {"rank": int(found.who_N[pair]), "waits_for": int(whom_N[pair]), "seconds": float(seconds_N[pair])}
            for pair in most
        ],
        "waited_for": [{"rank": int(rank), "seconds_of_others": float(seconds_W[rank])} for rank in ranks],
    }
