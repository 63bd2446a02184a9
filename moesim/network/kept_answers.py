"""Answers kept for starts that come again: the same matrices return in every micro-batch.

Legend: S routing samples, R ranks.
"""

import copy
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

KEPT_ANSWERS = 64  # per matrix; the oldest goes first


class _PairSharing(Protocol):
    def finish(self, start_SR: FloatArray) -> FloatArray: ...

    def flow_finish(self, start_SR: FloatArray) -> FloatArray: ...

    def part(self, samples: slice) -> Self: ...


class Remembered:
    """Solve for starts rounded to `grid` of the transfer's length, each pattern of starts once.

    Finish times are off by no more than the rounding of the starts moves them, about `grid` / 2 of the length. Only
    differences between starts count, so a pattern is known again at a later time.
    """

    def __init__(self, sharing: _PairSharing, *, shape: tuple[int, int], grid: float) -> None:
        self._sharing = sharing
        self._alone_SR = sharing.finish(np.zeros(shape))
        self._seconds_S1 = grid * np.maximum(self._alone_SR.max(axis=1, keepdims=True), 1e-12)
        self._answers: dict[bytes, FloatArray] = {np.zeros(shape).tobytes(): self._alone_SR}

    def part(self, samples: slice) -> Self:
        """The same for some of the samples, with answers of its own."""
        part = copy.copy(self)
        part._sharing = self._sharing.part(samples)
        part._alone_SR, part._seconds_S1 = self._alone_SR[samples], self._seconds_S1[samples]
        part._answers = {np.zeros(part._alone_SR.shape).tobytes(): part._alone_SR}
        return part

    def finish(self, start_SR: FloatArray) -> FloatArray:
        """When each rank has sent and received all, latency included, [S, R]."""
        first_S1 = start_SR.min(axis=1, keepdims=True)
        steps_SR = np.rint((start_SR - first_S1) / self._seconds_S1)
        key = steps_SR.tobytes()
        if key not in self._answers:
            if len(self._answers) >= KEPT_ANSWERS:
                del self._answers[next(iter(self._answers))]
            self._answers[key] = self._sharing.finish(steps_SR * self._seconds_S1)
        return np.asarray(np.maximum(first_S1 + self._answers[key], start_SR))


class CommonStart:
    """Solve once for a common start; later each pair takes as long after its release as it took there.

    A coarse approximation for starts that differ: early flows do not find links emptier. Steps whose starts spread over
    40 % of a transfer come out 4 to 11 % long (the benchmarks of the network print it).
    """

    def __init__(self, sharing: _PairSharing, *, shape: tuple[int, int], two_sided: bool) -> None:
        self._seconds_SRR = sharing.flow_finish(np.zeros(shape))
        self._two_sided = two_sided

    def part(self, samples: slice) -> Self:
        """The same for some of the samples."""
        part = copy.copy(self)
        part._seconds_SRR = self._seconds_SRR[samples]
        return part

    def finish(self, start_SR: FloatArray) -> FloatArray:
        """When each rank has sent and received all, latency included, [S, R]."""
        release_SRR = start_SR[:, :, None]
        if self._two_sided:
            release_SRR = np.maximum(release_SRR, start_SR[:, None, :])
        finish_SRR = release_SRR + self._seconds_SRR
        return np.asarray(np.maximum(start_SR, np.maximum(finish_SRR.max(axis=1), finish_SRR.max(axis=2))))
