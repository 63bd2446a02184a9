"""What the spans of a rank group come to, without keeping them: of a large step they would fill gigabytes.

Actions follow each other: no span of an action begins before the last one of the action before ended, so that sums over
actions are sums over the step. A rank group passes each action's spans on when it has ended, and keeps the last, in
whose time collectives between groups may begin. Until then all groups write into the same rows, which so stay in the
cache. Before the sums: which ranks waited for which.

Legend: N spans at hand, S routing samples, W ranks of the world, R ranks of a group, C categories, L labels,
P pipeline ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.results.critical_path import action_seconds
from moesim.results.spans import CATEGORIES, Label, SpanRecorder, SpanTable, Stream, attribute, without_round_off

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


@dataclass(frozen=True, kw_only=True)
class GroupSums:
    """Seconds of a rank group: by category, computing, and from the first to the last span of each action; `waits` of
    sample 0, where they are asked for.
    """

    attribution_CSR: FloatArray
    compute_SR: FloatArray
    busy_SR: FloatArray
    waits: GroupWaits | None

    @classmethod
    def of(cls, table: SpanTable, *, compiled: bool, with_waits: bool) -> "GroupSums":
        """Those of a whole table; `compiled`: by loops compiled by numba."""
        if compiled:
            book = LabelBook(lambda: table.labels)
            sums = SpanSums(table.ranks_R, samples=len(table.step_S), book=book, with_waits=with_waits)
            sums.take(table.label_N, table.start_NSR, table.finish_NSR, table.own_NSR, until_S=table.step_S)
            sums.busy_SR[:] = action_seconds(table)
            return sums.all(table.step_S)
        rows_N = table.rows(Stream.COMPUTE)
        return cls(
            attribution_CSR=attribute(table),
            compute_SR=(table.finish_NSR[rows_N] - table.start_NSR[rows_N]).sum(axis=0),
            busy_SR=action_seconds(table),
            waits=group_waits(table) if with_waits else None,
        )


class LabelFacts(NamedTuple):
    """What the loops ask of labels, by number: `set_LR` is the set of every rank in a transfer."""

    stream_L: NDArray[np.int64]
    category_L: NDArray[np.int64]
    sender_L: NDArray[np.int64]
    set_LR: NDArray[np.int64]

    @classmethod
    def of(cls, labels: Sequence[Label], ranks: int) -> "LabelFacts":
        """Those of some labels in a group of so many ranks."""
        return cls(
            np.array([label.stream for label in labels], dtype=np.int64),
            np.array([CATEGORIES.index(label.category) for label in labels], dtype=np.int64),
            np.array([label.sender for label in labels], dtype=np.int64),
            np.array([label.peers or (0,) * ranks for label in labels], dtype=np.int64).reshape(-1, ranks),
        )


class LabelBook:
    """Facts of the labels seen so far, for all groups; new labels keep coming."""

    def __init__(self, labels: Callable[[], Sequence[Label]]) -> None:
        """`labels()`: all by number."""
        self._labels, self._facts = labels, dict[int, LabelFacts]()

    @property
    def labels(self) -> Sequence[Label]:
        """All by number."""
        return self._labels()

    def facts(self, ranks: int) -> LabelFacts:
        """Their facts in a group of so many ranks."""
        labels, known = self._labels(), self._facts.get(ranks)
        seen = 0 if known is None else len(known.stream_L)
        if seen < len(labels):
            new = LabelFacts.of(labels[seen:], ranks)
            joined = new if known is None else LabelFacts(*map(np.concatenate, zip(known, new, strict=True)))
            known = self._facts[ranks] = joined
        assert known is not None, "there are labels"
        return known


class SpanSums:
    """Adds spans up, some rows after the other."""

    def __init__(self, ranks_R: NDArray[np.int64], *, samples: int, book: LabelBook, with_waits: bool) -> None:
        ranks = len(ranks_R)
        self._book = book
        self._seconds_CSR = np.zeros((len(CATEGORIES), samples, ranks))
        self._compute_SR, self.busy_SR = np.zeros((samples, ranks)), np.zeros((samples, ranks))
        self.since_SR = np.zeros((samples, ranks))  # the end of all spans so far
        self._waits = GroupWaits(ranks_R, np.zeros((ranks, ranks)), {}, {}) if with_waits else None
        self._labels, self._p2p_PR = 0, np.zeros((0, ranks))  # labels known so far, and seconds waited for each sender
        self._never_S = np.full(samples, -np.inf)

    def take(
        self,
        label_N: NDArray[np.int32],
        start_NSR: FloatArray,
        finish_NSR: FloatArray,
        own_NSR: NDArray[np.float32],
        *,
        until_S: FloatArray | None = None,
    ) -> None:
        """Rows behind those taken so far; `until_S`: they are the last ones, and the step ends then."""
        from moesim.results.attribution_loops import add_attribution, add_waits  # numba takes most of a second

        facts, waits, spans = self._book.facts(start_NSR.shape[2]), self._waits, (start_NSR, finish_NSR, own_NSR)
        if waits is not None:
            if self._labels < len(facts.sender_L):  # new ones came
                self._labels = len(facts.sender_L)
                self._p2p_PR = np.zeros((1 + int(facts.sender_L.max(initial=0)), start_NSR.shape[2]))
            among_groups, waited = add_waits(
                *spans, label_N, facts.stream_L, facts.set_LR, facts.sender_L, self.since_SR[0], waits.transfers_RR,
                self._p2p_PR, ROUND_OFF,
            )  # fmt: skip
            if among_groups:
                done_R = self.since_SR[0].copy()
                for name, *times in collective_waits(self._book.labels, label_N, *spans, done_R=done_R):
                    waits.collectives[name] = times[0], times[1]
            if waited:
                for sender in np.flatnonzero(self._p2p_PR.any(axis=1)).tolist():
                    waits.add_p2p(sender, self._p2p_PR[sender].copy())
                self._p2p_PR[:] = 0.0
        until_S = self._never_S if until_S is None else until_S
        add_attribution(
            *spans, label_N, facts.stream_L, facts.category_L, self.since_SR, until_S, self._seconds_CSR,
            self._compute_SR,
        )  # fmt: skip

    def all(self, step_S: FloatArray) -> GroupSums:
        """The sums, once all rows were taken."""
        return GroupSums(
            attribution_CSR=without_round_off(self._seconds_CSR, step_S),
            compute_SR=self._compute_SR,
            busy_SR=self.busy_SR,
            waits=self._waits,
        )


class SummingRecorder(SpanRecorder):
    """Holds the spans of the action at hand, and passes them on to sums.

    `room`: the rows that all groups of so many ranks write into, one action after the other; `rows` of its own take the
    last action and what follows it. `kept`: where the spans of sample 0 are kept whole, too.
    """

    def __init__(self, *, rows: int, sums: SpanSums, room: SpanRecorder, kept: SpanRecorder | None = None) -> None:
        samples, ranks = sums.since_SR.shape
        super().__init__(rows=0, samples=samples, ranks=ranks)
        self._write_into(room)
        self._last = SpanRecorder(rows=rows, samples=samples, ranks=ranks)
        self._sums, self._kept = sums, kept
        self._since_R = np.zeros(ranks)

    def _write_into(self, room: SpanRecorder) -> None:
        self.label_N, self.micro_batch_N = room.label_N, room.micro_batch_N
        self.start_NSR, self.finish_NSR, self.own_NSR = room.start_NSR, room.finish_NSR, room.own_NSR

    def stay(self) -> None:
        """The last action follows."""
        assert not self.count, "all actions before it were passed on"
        self._write_into(self._last)

    def pass_on(self) -> bool:
        """What is here goes on: all that comes begins later."""
        if self.count:
            self._take(None)
            self._since_R = self._sums.since_SR[0].copy()
            self.count = 0
            self.actions.clear()
        return True

    def last(self, step_S: FloatArray) -> GroupSums:
        """The sums of all spans, now that no more come."""
        self._take(step_S)
        return self._sums.all(step_S)

    def table(self, *, labels: tuple[Label, ...], ranks_R: NDArray[np.int64], step_S: FloatArray) -> SpanTable:
        """The spans of sample 0: all of them where they are kept, or those since the last action began."""
        if self._kept is not None:
            return self._kept.table(labels=labels, ranks_R=ranks_R, step_S=step_S[:1])
        table = super().table(labels=labels, ranks_R=ranks_R, step_S=step_S).first_sample()
        return replace(table, since_R=self._since_R)

    def _take(self, step_S: FloatArray | None) -> None:
        from moesim.results.attribution_loops import add_busy

        n = self.count
        start_NSR, finish_NSR = self.start_NSR[:n], self.finish_NSR[:n]
        self._sums.take(self.label_N[:n], start_NSR, finish_NSR, self.own_NSR[:n], until_S=step_S)
        for action in self.actions:
            add_busy(self.micro_batch_N, action.first, action.last, start_NSR, finish_NSR, self._sums.busy_SR)
        if self._kept is not None:
            self._kept.append(self)
