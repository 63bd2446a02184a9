"""How much later than by its own work the last of several ranks comes to a transfer: the mean over their jitter.

Nothing is drawn: groups of ranks that do the same stay the same, and are walked once. Of ranks that would come at
t_1 ... t_R and are late by normal numbers of standard deviation s, the last comes at about b log sum exp(t_r / b) with
b = s m(R) / log R, where m(R) is the mean of the largest of R standard normal numbers: right where all t are equal, and
the latest t where one of them is far behind the others (for two ranks within 0.02 s of the exact mean in between).

Legend: S routing samples, R ranks of a group, N members of a set.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.kernels.jitter import Jitter, expected_most, spread_of_most
from moesim.program.changes import ChangingTransfer
from moesim.program.collectives import PeerCollective, RingHop, SideBySide
from moesim.program.operations import Transfer

FloatArray = NDArray[np.float64]


def num_meeting(transfer: Transfer, ranks: int) -> int:
    """How many ranks of a group of `ranks` wait for each other, the largest set."""
    if isinstance(transfer, ChangingTransfer):
        return num_meeting(transfer.states[0], ranks)
    if isinstance(transfer, SideBySide):
        return max(
            num_meeting(part, len(members)) for part, members in zip(transfer.parts, transfer.places, strict=True)
        )
    return transfer.peers.size if isinstance(transfer, PeerCollective) else ranks


def late(transfer: Transfer, at_SR: FloatArray, spread_SR: FloatArray) -> FloatArray:
    """Seconds by which the transfer begins later than its last rank comes by its own work, [S, R].

    `at_SR`: when ranks come, but for jitter; `spread_SR`: the standard deviation of that in seconds.
    """
    if isinstance(transfer, ChangingTransfer):
        return late(transfer.states[0], at_SR, spread_SR)
    if isinstance(transfer, SideBySide):
        late_SR = np.zeros_like(at_SR)
        for part, members in zip(transfer.parts, transfer.places, strict=True):
            late_SR[:, members] = late(part, at_SR[:, members], spread_SR[:, members])
        return late_SR
    if isinstance(transfer, PeerCollective):
        ranks = min(transfer.peers.size, 3) if isinstance(transfer, RingHop) else transfer.peers.size
        split = transfer.peers.split
        at_SGNI = split(at_SR)
        late_SG1I = _last(at_SGNI, split(spread_SR), axis=2, ranks=ranks)
        return np.broadcast_to(late_SG1I, at_SGNI.shape).reshape(at_SR.shape)
    return np.broadcast_to(_last(at_SR, spread_SR, axis=1, ranks=at_SR.shape[1]), at_SR.shape)


def _last(at: FloatArray, spread: FloatArray, *, axis: int, ranks: int) -> FloatArray:
    if ranks == 1:
        return np.zeros_like(at)
    scale = spread.max(axis=axis, keepdims=True) * (expected_most(ranks) / math.log(ranks))
    before = at - at.max(axis=axis, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.exp(before / scale)
    found: FloatArray = scale * np.log(share.sum(axis=axis, keepdims=True) * (ranks / at.shape[axis]))
    return np.where(scale > 0.0, found, 0.0)


class Among(NamedTuple):
    """All ranks of a step, and the groups that they are in: who meets in collectives between groups."""

    ranks: int
    groups: int


ALONE = Among(1, 1)


class Work(NamedTuple):
    """Seconds of work of every rank, [S, R]: its own, and what the host set the pace of."""

    own_SR: FloatArray
    hosted_SR: FloatArray

    def constant(self, jitter: Jitter) -> FloatArray:
        """The standard deviation that is the same in every segment, in seconds."""
        return np.asarray(np.hypot(jitter.constant * self.own_SR, jitter.host * self.hosted_SR))

    def white(self, jitter: Jitter) -> FloatArray:
        """The variance that is independent from segment to segment, in seconds squared."""
        return jitter.white * self.own_SR + jitter.host_white * self.hosted_SR


class Lateness:
    """What one rank group has waited for jitter, and the work since its ranks last met.

    `total_SR`: seconds by which all meetings so far began later, hidden behind other work or not.
    """

    def __init__(self, jitter: Jitter, *, clocks_4SR: FloatArray) -> None:
        """`clocks_4SR`: where this keeps what compiled loops move on, too (MET and what follows in `segments`)."""
        self.jitter = jitter
        self.met_SR, self.total_SR, self._unmet_SR, self._waited_SR = clocks_4SR
        self.ranks = self.met_SR.shape[1]
        self.paced_SR = np.zeros_like(self.met_SR)  # when the device last had to wait for the host
        self._hosted_SR = np.zeros_like(self.met_SR)  # of the work before meetings, what the host set the pace of
        self._met_ranks = 1
        factor = expected_most(self.ranks) / math.log(self.ranks) if self.ranks > 1 else 0.0
        self.loops = np.array([jitter.constant, jitter.white, factor])

    def saved(self) -> Callable[[], None]:
        """What brings all but the clocks back to now."""
        paced_SR, hosted_SR, met_ranks = self.paced_SR, self._hosted_SR.copy(), self._met_ranks

        def restore() -> None:  # once or several times
            self.paced_SR, self._hosted_SR[:], self._met_ranks = paced_SR, hosted_SR, met_ranks

        return restore

    def all_have_met(self) -> None:
        """In a compiled loop."""
        self._met_ranks = self.ranks

    def _since(self, at_SR: FloatArray) -> Work:
        """Work until then; the host set its pace up to the last operation that the device had to wait for."""
        work_SR = np.maximum(at_SR - self.met_SR, 0.0)
        hosted_SR = np.clip(self.paced_SR - self.met_SR, 0.0, work_SR)
        return Work(work_SR - hosted_SR, hosted_SR)

    def at_transfer(self, transfer: Transfer, start_SR: FloatArray) -> FloatArray:
        """Seconds by which a transfer in the group begins later than `start_SR` says of each rank."""
        work, met_ranks = self._since(start_SR), num_meeting(transfer, self.ranks)
        constant_SR = work.constant(self.jitter)
        found_SR = late(transfer, start_SR, np.sqrt(constant_SR**2 + work.white(self.jitter)))
        self._unmet_SR += work.own_SR
        self._hosted_SR += work.hosted_SR
        self._waited_SR += expected_most(met_ranks) * constant_SR
        self._met_ranks = max(self._met_ranks, met_ranks)
        self.total_SR += found_SR
        return found_SR

    def among_groups(self, done_SR: FloatArray, among: Among) -> FloatArray:
        """Seconds by which groups that are alike wait for the slowest of all, beyond what each has waited inside.

        The slowest chip of all is slower than that of each group; and there is what is left by chance of each one's
        work. All of it is waited for once: the next call begins with no work.
        """
        tail = self._since(done_SR)
        whole = Work(self._unmet_SR + tail.own_SR, self._hosted_SR + tail.hosted_SR)
        slowest_SR = expected_most(among.ranks) * whole.constant(self.jitter)
        late_SR = np.maximum(slowest_SR - self._waited_SR, 0.0)
        chance = expected_most(among.groups) * spread_of_most(self._met_ranks)
        inside = expected_most(self._met_ranks)
        late_SR = late_SR + chance * np.sqrt(whole.white(self.jitter)) + inside * np.sqrt(tail.white(self.jitter))
        np.maximum(self.met_SR, done_SR, out=self.met_SR)
        for clock_SR in (self._unmet_SR, self._waited_SR, self._hosted_SR):
            clock_SR[:] = 0.0
        self.total_SR += late_SR
        return np.asarray(late_SR)
