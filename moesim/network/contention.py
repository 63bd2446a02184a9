"""Transfers of several groups that are open at once and share links, and a cheap answer for late starters.

Legend: S routing samples, R ranks, K open transfers, X links.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.network.fabric import Fabric

FloatArray = NDArray[np.float64]


def slow_downs(fabric: Fabric, demands_KX: Sequence[FloatArray]) -> FloatArray:
    """Progress per second of each open transfer, [K], 1 where its links have capacity to spare.

    `demands_KX`: bytes/s that each transfer puts on each link while alone (`PreparedTransfer.demand_X`). A transfer
    runs at the least capacity / total demand over the links that it uses.
    """
    demands = np.asarray(demands_KX, dtype=np.float64).reshape(-1, len(fabric.links))
    total_X = demands.sum(axis=0)
    share_X = np.minimum(1.0, fabric.capacity_X / np.maximum(total_X, fabric.capacity_X))
    return np.asarray(np.where(demands > 0, share_X, 1.0).min(axis=1, initial=1.0))


class _PairFinish(Protocol):
    def flow_finish(self, start_SR: FloatArray) -> FloatArray: ...


class CommonStart:
    """Solve once for a common start; later each pair takes as long after its release as it took there.

    An approximation for starts that differ: it leaves out that early flows find links emptier and late flows fuller.
    """

    def __init__(self, sharing: _PairFinish, *, shape: tuple[int, int], two_sided: bool) -> None:
        self._seconds_SRR = sharing.flow_finish(np.zeros(shape))
        self._two_sided = two_sided

    def flow_finish(self, start_SR: FloatArray) -> FloatArray:
        """Arrival of each pair's last byte, latency included, [S, R, R]; -inf for pairs without traffic."""
        release_SRR = start_SR[:, :, None]
        if self._two_sided:
            release_SRR = np.maximum(release_SRR, start_SR[:, None, :])
        return np.asarray(release_SRR + self._seconds_SRR)

    def finish(self, start_SR: FloatArray) -> FloatArray:
        """When each rank has sent and received all, latency included, [S, R]."""
        finish_SRR = self.flow_finish(start_SR)
        return np.asarray(np.maximum(start_SR, np.maximum(finish_SRR.max(axis=1), finish_SRR.max(axis=2))))
