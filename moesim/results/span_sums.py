"""What the spans of a rank group come to, without keeping them: of a large step they would fill gigabytes.

Actions follow each other: no span of an action begins before the last one of the action before ended, so that sums over
actions are sums over the step. A rank group passes each action's spans on when it has ended, and keeps the last, in
whose time collectives between groups may begin. Until then all groups write into the same rows, which so stay in the
cache.

Legend: N spans at hand, S routing samples, R ranks of a group, C categories, L labels, P pipeline ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.results.attribution import attribute, without_round_off
from moesim.results.critical_path import action_seconds
from moesim.results.spans import CATEGORIES, Label, SpanRecorder, SpanTable, Stream
from moesim.results.waits import ROUND_OFF, GroupWaits, collective_waits, group_waits

FloatArray = NDArray[np.float64]


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
