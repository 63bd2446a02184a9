"""Collectives: among some of the ranks of a rank group (also ring hops, and several side by side), and among groups.

A rank group's ranks are consecutive; `Peers(size, stride)` cuts them into sets of `size` ranks, `stride` apart: tensor
ranks have stride 1, context ranks that of the tensor axis, ranks with the same experts that of the expert block. Those
on gradients and parameters among ranks of several groups (`Reduction`) are there once per step.

Legend: S routing samples, R ranks of a rank group, W ranks of the world, G runs of sets, N peers of a set, I sets that
interleave (stride).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.network import (
    CollectiveEstimate,
    Fabric,
    all_gather_seconds,
    all_reduce_seconds,
    reduce_scatter_seconds,
    send_recv_seconds,
)
from moesim.network.nccl import ring_bytes
from moesim.network.parameters import Evidence
from moesim.program.operations import Transfer
from moesim.results.spans import Collective, Part

FloatArray = NDArray[np.float64]
Ranks = NDArray[np.int64]


class Peers(NamedTuple):
    """How the places of a rank group are cut into sets that meet each other."""

    size: int
    stride: int = 1

    def split(self, values_XR: FloatArray) -> FloatArray:
        """[X, R] as [X, G, N, I]: the members of a set along the third axis."""
        return values_XR.reshape(len(values_XR), -1, self.size, self.stride)

    def places(self, ranks: int) -> NDArray[np.int64]:
        """The places of every set of a group of `ranks`: [sets, N]."""
        return np.arange(ranks).reshape(-1, self.size, self.stride).swapaxes(1, 2).reshape(-1, self.size)

    def set_of_place(self, ranks: int) -> tuple[int, ...]:
        """The number of every place's set."""
        return set_of_place(list(self.places(ranks)), ranks)


def set_of_place(places: Sequence[NDArray[np.integer]], ranks: int) -> tuple[int, ...]:
    """The number of the set that each place of a group is in."""
    number_R = np.zeros(ranks, dtype=np.int64)
    for number, members in enumerate(places):
        number_R[members] = number
    return tuple(number_R.tolist())


class PeerCollective:
    """A collective in every set of peers: its ranks are done `seconds_R` after the last of them has come.

    `sent_bytes`: what each rank puts on the wire; `source`: where the seconds come from. The same for all `samples`.
    """

    def __init__(
        self,
        peers: Peers,
        seconds_R: FloatArray,
        *,
        sent_bytes: float,
        samples: int = 1,
        source: str = "",
        evidence: Evidence = Evidence.NONE,
    ) -> None:
        self.peers, self.source, self.evidence = peers, source, evidence
        self.sent_bytes = sent_bytes
        self.alone_R = np.repeat(seconds_R[None], samples, axis=0)
        self._seconds_1GNI = peers.split(self.alone_R[:1])

    @property
    def moved_bytes(self) -> float:
        """Bytes that all ranks of the group send."""
        return float(self.sent_bytes * self.alone_R.shape[1])

    @cached_property
    def of_one_sample(self) -> "PeerCollective":
        """The same for a sample alone."""
        return type(self)(
            self.peers, self.alone_R[0], sent_bytes=self.sent_bytes, source=self.source, evidence=self.evidence
        )

    def finish(self, start_R: FloatArray) -> FloatArray:
        """See Transfer."""
        last_SG1I = self.peers.split(start_R).max(axis=2, keepdims=True)
        return np.asarray((last_SG1I + self._seconds_1GNI).reshape(start_R.shape))


class RingHop(PeerCollective):
    """A message from every rank to the next of its set, around: done when the ranks on both sides are there, too."""

    def finish(self, start_R: FloatArray) -> FloatArray:
        """See Transfer."""
        start_SGNI = self.peers.split(start_R)
        both_SGNI = np.maximum(np.roll(start_SGNI, 1, axis=2), np.roll(start_SGNI, -1, axis=2))
        return np.asarray((np.maximum(start_SGNI, both_SGNI) + self._seconds_1GNI).reshape(start_R.shape))


class SideBySide:
    """Transfers of several parts of a rank group, each among its own ranks; `moved_bytes` where they are known."""

    def __init__(
        self, parts: Sequence[Transfer], places: Sequence[NDArray[np.integer]], *, moved_bytes: float = 0.0
    ) -> None:
        self.parts, self.places, self.moved_bytes = parts, places, moved_bytes
        self.source: str = getattr(parts[0], "source", "")
        self.evidence: Evidence = getattr(parts[0], "evidence", Evidence.NONE)
        first = parts[0].alone_R
        self.alone_R = np.empty((len(first), sum(map(len, places))))
        for part, members in zip(parts, places, strict=True):
            self.alone_R[:, members] = part.alone_R

    def finish(self, start_R: FloatArray) -> FloatArray:
        """See Transfer."""
        finish_SR = np.empty_like(start_R)
        for part, members in zip(self.parts, self.places, strict=True):
            finish_SR[:, members] = part.finish(start_R.take(members, axis=1))
        return finish_SR


class GroupLinks:
    """What collectives among the peers of one rank group cost, `samples` in lockstep; each size is looked up once."""

    def __init__(self, fabric: Fabric, ranks_R: Ranks, *, samples: int = 1) -> None:
        self.fabric, self.ranks_R, self.samples = fabric, ranks_R, samples
        self._known: dict[tuple[str, Peers, float], PeerCollective] = {}

    def gather(self, peers: Peers, num_bytes: float) -> PeerCollective:
        """All-gather: `num_bytes` on every rank afterwards."""
        return self._collective("all_gather", all_gather_seconds, peers, num_bytes)

    def scatter(self, peers: Peers, num_bytes: float) -> PeerCollective:
        """Reduce-scatter: `num_bytes` on every rank before."""
        return self._collective("reduce_scatter", reduce_scatter_seconds, peers, num_bytes)

    def reduce(self, peers: Peers, num_bytes: float) -> PeerCollective:
        """All-reduce of `num_bytes` on every rank."""
        return self._collective("all_reduce", all_reduce_seconds, peers, num_bytes)

    def hop(self, peers: Peers, num_bytes: float) -> PeerCollective:
        """`num_bytes` from every rank to the next of its ring; the slower of its two hops counts for a rank."""
        key = ("hop", peers, num_bytes)
        if key not in self._known:
            seconds_R = np.empty(len(self.ranks_R))
            for places in peers.places(len(self.ranks_R)):
                ring = self.ranks_R[places]
                hops = [
                    send_recv_seconds(self.fabric, int(source), int(target), num_bytes).seconds
                    for source, target in zip(ring, np.roll(ring, -1), strict=True)
                ]
                seconds_R[places] = np.maximum(hops, np.roll(hops, 1))
            self._known[key] = RingHop(peers, seconds_R, sent_bytes=num_bytes, samples=self.samples)
        return self._known[key]

    def _collective(
        self,
        name: str,
        estimate: Callable[[Fabric, Ranks, float], CollectiveEstimate],
        peers: Peers,
        num_bytes: float,
    ) -> PeerCollective:
        key = (name, peers, num_bytes)
        if key not in self._known:
            seconds_R = np.empty(len(self.ranks_R))
            for places in peers.places(len(self.ranks_R)):
                found = estimate(self.fabric, self.ranks_R[places], num_bytes)
                seconds_R[places] = found.seconds
            self._known[key] = PeerCollective(
                peers,
                seconds_R,
                sent_bytes=ring_bytes(name, num_bytes, ranks=peers.size),
                samples=self.samples,
                source=found.source,
                evidence=found.evidence,
            )
        return self._known[key]


Members = tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class Reduction:
    """One collective among each of `members` (lists of global ranks): nobody is done before the last has come.

    `buckets` is how many parts it is cut into that may begin while the last backward pass still makes gradients; 0: it
    begins when all gradients are there. `stage`: whose gradients they are; -1: of no single stage.
    `rests_on`: where its seconds come from, `evidence`: what rows tell of their error. `part`: gradients, or the
    parameters that the optimizer has updated.
    `sent_bytes`: what each rank puts on the wire, 0 where nobody asks.
    """

    name: str
    members: Members
    seconds: float
    source: str
    buckets: int = 0
    stage: int = -1
    collective: Collective = Collective.ALL_REDUCE
    part: Part = Part.GRADIENTS
    rests_on: str = ""
    sent_bytes: float = 0.0
    evidence: Evidence = Evidence.NONE

    @cached_property
    def ranks(self) -> frozenset[int]:
        """All ranks that take part."""
        return frozenset(int(rank) for ranks in self.members for rank in ranks)


def last_arrivals(members: Members, ready_SW: FloatArray) -> FloatArray:
    """[S, W]: when the last member of each rank's collective is there."""
    last_SW = ready_SW.copy()
    for ranks in members:
        last_SW[:, ranks] = ready_SW[:, ranks].max(axis=1, keepdims=True)
    return last_SW
