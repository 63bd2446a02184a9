"""The ports of ranks, and how long what comes second takes to pass them.

A port is a link that can be a bottleneck and that the traffic of one rank alone enters or leaves by: an NVLink port or
a NIC, each direction by itself. Links above them are in `moesim.network.contention`.

Legend: K ports of a rank (padded), R ranks of a group, W ranks of the fabric, in sums also windows, S routing samples,
X links, F flows, Q (flow, port) pairs.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.network.fabric import NONE, Fabric
from moesim.network.ports import loops

FloatArray = NDArray[np.float64]
ROUND_OFF = 1e-12  # of a port: what sums leave over


class _Hops(NamedTuple):
    """Which flow passes which port, counted through [K, R], with which share of its bytes."""

    flow_Q: NDArray[np.integer]
    place_Q: NDArray[np.integer]
    share_Q: FloatArray  # over the port's bytes/s


class RankPorts:
    """The ports of the ranks of a group."""

    def __init__(self, fabric: Fabric, ranks_R: NDArray[np.integer]) -> None:
        self.fabric, self.ranks_R = fabric, ranks_R
        self.link_KR = fabric.port_links_KW[:, ranks_R]
        self._place_X = np.full(len(fabric.links) + 1, NONE)
        self._place_X[self.link_KR.ravel()] = np.arange(self.link_KR.size)
        self._place_X[NONE] = NONE
        self._hops: dict[
            tuple[bytes, bytes, bool, int], _Hops
        ] = {}  # by fabric, which keeps those that it is reached as

    def seconds(
        self,
        source_F: NDArray[np.integer],
        target_F: NDArray[np.integer],
        bytes_SF: FloatArray,
        *,
        avoid_nvlink: bool = False,
        reached: Fabric | None = None,
    ) -> FloatArray:
        """How long flows between ranks of the fabric keep each port busy, [S, K, R].

        `reached`: the fabric's links as the flows' software finds them (see Fabric.reached_by).
        """
        hops = self._of_flows(source_F, target_F, avoid_nvlink, reached or self.fabric)
        seconds_SQ = bytes_SF[:, hops.flow_Q] * hops.share_Q
        ports = self.link_KR.size
        busy_SP = np.empty((len(seconds_SQ), ports))
        for sample, seconds_Q in enumerate(seconds_SQ):
            busy_SP[sample] = np.bincount(hops.place_Q, weights=seconds_Q, minlength=ports)
        return busy_SP.reshape(-1, *self.link_KR.shape)

    def of_links(self, values_X: FloatArray) -> FloatArray:
        """What of values of the fabric's links belongs to each port, [K, R]; 0 where a rank has fewer ports."""
        of_port_KR: FloatArray = np.append(values_X, 0.0)[self.link_KR.astype(np.intp)]
        return of_port_KR

    def _of_flows(
        self, source_F: NDArray[np.integer], target_F: NDArray[np.integer], avoid_nvlink: bool, reached: Fabric
    ) -> _Hops:
        key = source_F.tobytes(), target_F.tobytes(), avoid_nvlink, id(reached)
        if key not in self._hops:
            path_FP, flow_F, share_F = self.fabric.split_routes(source_F, target_F, avoid_nvlink=avoid_nvlink)
            place_FP = self._place_X[path_FP]
            on_port_Q = np.nonzero(place_FP != NONE)
            flow_Q, place_Q = on_port_Q[0], place_FP[on_port_Q]
            pace_Q = share_F[flow_Q] / reached.capacity_X[self.link_KR.ravel()[place_Q]]
            self._hops[key] = _Hops(flow_F[flow_Q], place_Q, pace_Q)
        return self._hops[key]


def passed(
    begin_SR: FloatArray,
    work_SR: FloatArray,
    share_R: FloatArray,
    *,
    opens_WSR: FloatArray,
    closes_WSR: FloatArray,
    uses_WSR: FloatArray,
    compiled: bool = False,
) -> FloatArray:
    """When what begins at `begin_SR` has passed a port of each rank that others use, too: [S, R].

    Alone it takes `work_SR` seconds and `share_R` of the port; the others take `uses_WSR` of it in their windows
    and go first. Together they never take more than all of it, and no less while anything is left to do.
    `compiled`: by loops of numba, which give the same.
    """
    if compiled and (compiled_loops := loops()) is not None:
        end_SR: FloatArray = compiled_loops.passed(
            begin_SR, work_SR, share_R, opens_WSR, closes_WSR, uses_WSR, ROUND_OFF
        )
        return end_SR
    windows = len(opens_WSR)
    edges = np.maximum(np.concatenate([opens_WSR, closes_WSR]), begin_SR)
    order = edges.argsort(axis=0, kind="stable")
    change = np.take_along_axis(np.concatenate([uses_WSR, -uses_WSR]), order, axis=0)
    edges = np.concatenate([begin_SR[None], np.take_along_axis(edges, order, axis=0)])
    left = np.clip(1.0 - np.cumsum(change, axis=0), 0.0, 1.0)
    left[left < ROUND_OFF] = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(share_R > 0, np.minimum(1.0, left / share_R), 1.0)
    rate = np.concatenate([np.ones((1, *begin_SR.shape)), rate])
    rate[-1] = 1.0  # behind the last window
    done = np.concatenate([np.zeros((1, *begin_SR.shape)), np.cumsum(rate[:-1] * np.diff(edges, axis=0), axis=0)])
    enough = done[1:] >= work_SR
    last = np.where(enough.any(axis=0), enough.argmax(axis=0), 2 * windows)[None]
    edge, before, pace = (np.take_along_axis(each, last, axis=0)[0] for each in (edges, done, rate))
    return np.asarray(edge + (work_SR - before) / np.where(pace > 0, pace, 1.0))
