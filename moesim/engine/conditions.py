"""Speeds of ranks and states of links that change while a step runs, on SimPy's clock.

Vectors of times still run ahead of the clock: an action is walked at the speeds known so far, and then its process lets
the clock come as far as the walk. Where a change comes first, the action is walked again from its start with the change
known; so nothing needs to know a change before it happens. A step in which nothing changes has none of this.

Legend: K instants at which anything changed, N kernels, S routing samples, R ranks of a group, W ranks of the world.
"""

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from moesim.program.changes import ChangingTransfer
from moesim.program.step_program import Changes

FloatArray = NDArray[np.float64]
Wait = Generator[simpy.Event, Any, None]


class Conditions:
    """What has happened so far: `known` of the instants of `changes`."""

    def __init__(self, env: simpy.Environment, changes: Changes) -> None:
        self._env, self.changes = env, changes
        self.known = 1
        self._changed = env.event()
        env.process(self._live())

    def _live(self) -> Wait:
        """Let one change after the other happen."""
        for instant in self.changes.instants_K[1:].tolist():
            yield self._env.timeout(instant - self._env.now)
            self.known += 1
            self._changed.succeed()
            self._changed = self._env.event()

    def settle(self, walk: Callable[[], FloatArray], undo: Callable[[], None]) -> Wait:
        """Walk until no change comes before the end of the walk, which `walk` returns, all ranks."""
        while True:
            known, ends = self.known, walk()
            until = float(ends[np.isfinite(ends)].max())
            while self.known == known and self._env.now < until:
                yield self._env.any_of([self._env.timeout(until - self._env.now), self._changed])
            if self.known == known or self.changes.instants_K[known] >= until:
                return
            undo()

    def elapsed(self, start_SR: FloatArray, work_NSR: FloatArray, ranks_R: NDArray[np.int64]) -> FloatArray:
        """Seconds that kernels take from `start_SR` on which take `work_NSR` at the speeds from before the step."""
        rate_KSR = self.changes.speed_KSW[: self.known, :, ranks_R]
        if (rate_KSR == 1.0).all():
            return work_NSR
        work_NSR = np.broadcast_to(work_NSR, (len(work_NSR), *start_SR.shape))
        return _advance(self.changes.instants_K[: self.known], rate_KSR, start_SR, work_NSR) - start_SR

    def transfer(self, transfer: ChangingTransfer, start_SR: FloatArray) -> tuple[FloatArray, FloatArray]:
        """When a transfer is done on every rank, and what of it is its own: it waits as long whatever links do."""
        finish_SR = transfer.finish(start_SR)
        own_SR = np.minimum(transfer.alone_R, finish_SR - start_SR)
        states = np.stack([np.broadcast_to(state.alone_R, own_SR.shape) for state in transfer.states])
        begin_SR = finish_SR - own_SR
        done_SR = begin_SR + own_SR if self._is_as_before else self._slowed(begin_SR, own_SR, states)
        return done_SR, done_SR - begin_SR

    def seconds(self, begin_SW: FloatArray, seconds: Sequence[float], *, share: float = 1.0) -> FloatArray:
        """When a share of what takes `seconds`, by state of the links, is done."""
        states = np.stack([np.full_like(begin_SW, each) for each in seconds])
        if self._is_as_before or len(seconds) == 1:
            return np.asarray(begin_SW + states[0] * share)
        return self._slowed(begin_SW, states[0] * share, states)

    @property
    def _is_as_before(self) -> bool:
        return not self.changes.state_KS[: self.known].any()

    def _slowed(self, begin_SR: FloatArray, own_SR: FloatArray, states: FloatArray) -> FloatArray:
        """The end of what takes `own_SR` on links as before, and in other states longer as `states` [state, S, R]."""
        with np.errstate(divide="ignore", invalid="ignore"):
            slower = np.where(states > 0, states[0] / states, 1.0)
        samples = np.arange(len(begin_SR))
        rate_KSR = np.stack([slower[state_S, samples] for state_S in self.changes.state_KS[: self.known]])
        ends_1SR = _advance(self.changes.instants_K[: self.known], rate_KSR, begin_SR, own_SR[None])
        return np.asarray(ends_1SR[0])


def _advance(instants_K: FloatArray, rate_KSR: FloatArray, start_SR: FloatArray, work_NSR: FloatArray) -> FloatArray:
    """When work from `start_SR` on is done, at a rate that holds from each instant to the next, the last for ever."""
    now_NSR = np.broadcast_to(start_SR, work_NSR.shape).copy()
    left_NSR = work_NSR.copy()
    for k, rate_SR in enumerate(rate_KSR):
        if k == len(instants_K) - 1:
            now_NSR = now_NSR + left_NSR / rate_SR
            break
        room_SR = np.maximum(instants_K[k + 1] - now_NSR, 0.0)
        done_NSR = np.minimum(left_NSR, room_SR * rate_SR)
        all_done_NSR = done_NSR == left_NSR
        passed_NSR = np.where(all_done_NSR, now_NSR + done_NSR / rate_SR, np.maximum(now_NSR, instants_K[k + 1]))
        now_NSR, left_NSR = passed_NSR, left_NSR - done_NSR
    return now_NSR
