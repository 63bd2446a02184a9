"""Links that several groups fill together, in simulated time.

They know every open transfer, its demand on the links and how far it has come on a clock of its own. Whenever one opens
or closes, all rates are shared out anew (`moesim.network.contention`); a transfer closes when its clock has run through
its window.

Legend: S samples (one), L overloaded links, K open transfers, R ranks.
"""

from collections.abc import Generator
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.network.contention import LinkUse, Window, opening, progress_rates

FloatArray = NDArray[np.float64]
Carried = Generator[simpy.Event, Any, FloatArray]

TIE = 1e-9  # transfers with this share of their window left close together: round-off


class _Passage:
    """A transfer that is under way; `rate` is its progress per second."""

    def __init__(self, closed: simpy.Event, window: Window, use: LinkUse, capacity_L: FloatArray, now: float) -> None:
        self.closed = closed
        self.window = window
        self.opens = float(window.opens_S[0])
        self.seconds = float(window.work_SR.max())
        self.demand_L = np.minimum(use.bytes_SX[0] / self.seconds, capacity_L)
        self.flows_L = use.flows_SX[0]
        # What lies before this instant was not slowed: ranks far ahead of others of their group may have begun before.
        self.work = max(0.0, now - self.opens)
        self.rate = 1.0
        self.is_slowed = False
        self._work_done = [self.work]
        self._instants = [self.work]

    def advance(self, seconds: float, now: float) -> None:
        """Go on at the present rate."""
        self.work += self.rate * seconds
        if now - self.opens > self._instants[-1]:
            self._work_done.append(self.work)
            self._instants.append(now - self.opens)

    @property
    def seconds_left(self) -> float:
        """At the present rate."""
        return max(0.0, self.seconds - self.work) / self.rate

    def finish(self, finish_SR: FloatArray) -> FloatArray:
        """Ends of the ranks that would be done at `finish_SR` alone.

        Waiting for ranks that come late absorbs what the others lose.
        """
        if not self.is_slowed:
            return finish_SR
        alone_SR = finish_SR - self.window.after_SR - self.opens
        work_SR = np.minimum(self.window.work_SR, alone_SR)
        passed_SR = np.interp(work_SR, self._work_done, self._instants)
        passed_SR = np.where(work_SR > self._work_done[0], passed_SR, work_SR)
        return np.asarray(finish_SR + np.maximum(passed_SR - alone_SR, 0.0))


class SharedLinks:
    """The overloaded links of one simulated step, of `capacity_L` bytes/s."""

    def __init__(self, env: simpy.Environment, capacity_L: FloatArray) -> None:
        self._env = env
        self._capacity_L = capacity_L
        self._open: list[_Passage] = []
        self._now = 0.0
        self._turn = 0  # counts sharings: a timer set before the last one is void

    def carry(self, window: Window, use: LinkUse, finish_SR: FloatArray) -> Carried:
        """Carry a transfer (of one sample) that would end at `finish_SR` alone; returns when its ranks are done."""
        opens, seconds = float(window.opens_S[0]), float(window.work_SR.max())
        if not use.bytes_SX.any():
            return finish_SR
        if opens > self._env.now:
            yield self._env.timeout(opens - self._env.now)
        if self._env.now - opens >= seconds * (1 - TIE):
            return finish_SR
        passage = _Passage(self._env.event(), window, use, self._capacity_L, self._env.now)
        self._advance()
        self._open.append(passage)
        self._share()
        yield passage.closed
        return passage.finish(finish_SR)

    def carry_equal(self, finish_SR: FloatArray, seconds: float, use: LinkUse) -> Carried:
        """Carry what takes `seconds` on every rank and is done at `finish_SR` alone; returns when it is done."""
        opens_S = opening(finish_SR - seconds, np.array([seconds]), two_sided=False)
        window = Window(opens_S, np.full_like(finish_SR, seconds), np.zeros_like(finish_SR))
        return (yield from self.carry(window, use, finish_SR))

    def _advance(self) -> None:
        """Bring all open transfers up to now."""
        now = self._env.now
        if now > self._now:
            for passage in self._open:
                passage.advance(now - self._now, now)
        self._now = now

    def _share(self) -> None:
        """Share the links out, and wait for the transfer that closes next if no other opens before."""
        self._turn += 1
        if not self._open:
            return
        demands_KL = np.stack([passage.demand_L for passage in self._open])
        flows_KL = np.stack([passage.flows_L for passage in self._open])
        rate_K = progress_rates(self._capacity_L, demands_KL, flows_KL)
        for passage, rate in zip(self._open, rate_K.tolist(), strict=True):
            passage.rate = rate
            passage.is_slowed |= rate < 1.0
        due = min(self._open, key=lambda passage: passage.seconds_left)
        timer = self._env.timeout(due.seconds_left, value=(self._turn, due))
        assert timer.callbacks is not None
        timer.callbacks.append(self._close)

    def _close(self, timer: simpy.Event) -> None:
        assert timer.value is not None
        turn, due = timer.value
        if turn != self._turn:
            return
        self._advance()
        still_open = []
        for passage in self._open:
            if passage is due or passage.seconds - passage.work <= TIE * passage.seconds:
                passage.closed.succeed()
            else:
                still_open.append(passage)
        self._open = still_open
        self._share()
