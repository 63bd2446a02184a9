"""Transfers of several groups that are open at once and share links.

A transfer that is alone moves its bytes at a steady pace over its links: that is its demand. Beside others it slows
down where the demands exceed a link's capacity; its progress per second is 1 while alone.

Legend: K open transfers, X links (of the fabric, or some of them), S routing samples, R ranks, F flows, P hops,
C common links of the fabric, Q (flow, common link) pairs or routes, U their hops, Y (flow, link) pairs, O overloaded
links.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InternalError
from moesim.network.fabric import Fabric
from moesim.network.ladder import NONE

FloatArray = NDArray[np.float64]

TINY = 1e-30  # flows: fewer than any
SHARINGS_PER_LINK = 10
TOLERANCE = 1e-9  # a link counts as overloaded from this share above its capacity on


@dataclass(frozen=True, kw_only=True, eq=False)
class LinkUse:
    """What one transfer puts on links, and in how many flows."""

    bytes_SX: FloatArray
    flows_SX: FloatArray

    def __add__(self, other: "LinkUse") -> "LinkUse":
        return LinkUse(bytes_SX=self.bytes_SX + other.bytes_SX, flows_SX=self.flows_SX + other.flows_SX)

    def on(self, chosen_X: NDArray[np.bool_]) -> "LinkUse | None":
        """What of it is on some of the links; None where nothing is."""
        if not self.bytes_SX[:, chosen_X].any():
            return None
        return LinkUse(bytes_SX=self.bytes_SX[:, chosen_X], flows_SX=self.flows_SX[:, chosen_X])

    def of_sample(self, sample: int) -> "LinkUse":
        """One of the samples."""
        if len(self.bytes_SX) == 1:
            return self
        chosen = slice(sample, sample + 1)
        return LinkUse(bytes_SX=self.bytes_SX[chosen], flows_SX=self.flows_SX[chosen])


def progress_rates(capacity_X: FloatArray, demands_KX: FloatArray, flows_KX: FloatArray) -> FloatArray:
    """Progress per second, [K]: max-min fair between the flows on every link, a transfer as slow as its slowest link.

    An overloaded link lets each flow have its level, the bytes/s at which the flows that want more and those that want
    less fill it together. The link with the least level comes first: what its transfers no longer send elsewhere is
    there for others. Afterwards no link carries more than its capacity.
    """
    rate_K = np.ones(len(demands_KX))
    enough_X = capacity_X * (1 + TOLERANCE)
    over_X = np.flatnonzero(demands_KX.sum(axis=0) > enough_X)
    for _ in range(SHARINGS_PER_LINK * len(over_X) + 1):  # each one settles a link, but for round-off
        if not len(over_X):
            return rate_K
        flows_KO, demands_KO = flows_KX[:, over_X], demands_KX[:, over_X]
        each_KO = demands_KO * rate_K[:, None] / np.maximum(flows_KO, TINY)
        level_O = _levels(capacity_X[over_X], each_KO, flows_KO)
        link = int(level_O.argmin())
        rate_K *= np.minimum(1.0, level_O[link] / np.maximum(each_KO[:, link], TINY))
        over_X = over_X[rate_K @ demands_KO > enough_X[over_X]]
    raise InternalError("network: transfers that share links find no rates that these can carry")


def _levels(capacity_X: FloatArray, each_KX: FloatArray, flows_KX: FloatArray) -> FloatArray:
    """Of overloaded links the bytes/s at which flows are cut off, so that sum(flows * min(each, level)) = capacity."""
    order_KX, link_X = each_KX.argsort(axis=0), np.arange(each_KX.shape[1])
    each_KX, flows_KX = each_KX[order_KX, link_X], flows_KX[order_KX, link_X]
    before_KX = np.cumsum(each_KX * flows_KX, axis=0)
    before_KX[1:], before_KX[0] = before_KX[:-1].copy(), 0.0
    behind_KX = flows_KX[::-1].cumsum(axis=0)[::-1]
    level_KX = (capacity_X - before_KX) / np.maximum(behind_KX, TINY)  # if the flows from here on were cut off
    first_X = (level_KX <= each_KX).argmax(axis=0)
    return np.asarray(level_KX[first_X, link_X])


class Window(NamedTuple):
    """When a transfer moves its bytes: the time of its alone length in which it moves them at its steady pace.

    `opens_S` is on the clock of the starts. Each rank takes part for the first `work_SR` seconds of it, and its
    software needs `after_SR` more than that of the quickest.
    """

    opens_S: FloatArray
    work_SR: FloatArray
    after_SR: FloatArray


def opening(start_SR: FloatArray, seconds_S: FloatArray, *, two_sided: bool, synchronised: bool = False) -> FloatArray:
    """When the window opens of a transfer whose ranks start at `start_SR`, `seconds_S` long from a common start: [S].

    Ranks that come at different times release their bytes as they come (of a two-sided transfer, what they exchange
    with those that are there). Served in that order at the steady pace, half of all bytes have moved at some instant;
    the window lies evenly around it. So neither one early rank nor one straggler moves it, and with a common start it
    begins there. Pairs count alike.
    """
    if synchronised:
        return np.asarray(start_SR.max(axis=1))
    ranks = start_SR.shape[1]
    place_R = np.arange(ranks)
    released_R = place_R / ranks  # share of the bytes that is released before the rank at this place comes
    if two_sided and ranks > 1:
        released_R = place_R * (place_R - 1) / (ranks * (ranks - 1))
    half_SR = np.sort(start_SR, axis=1) + np.maximum(0.5 - released_R, 0.0) * seconds_S[:, None]
    half_SR[:, released_R >= 0.5] = -np.inf
    if two_sided and ranks > 1:
        half_SR[:, 0] = -np.inf  # the first rank finds nobody to exchange with
    return np.asarray(half_SR.max(axis=1) - 0.5 * seconds_S)


def common_use(
    fabric: Fabric,
    source_F: NDArray[np.integer],
    target_F: NDArray[np.integer],
    bytes_SF: FloatArray,
    *,
    avoid_nvlink: bool = False,
) -> LinkUse:
    """What flows of `bytes_SF` between ranks of the fabric put on its common links."""
    flow_Q, link_Q, share_Q = _common_hops(fabric, source_F, target_F, avoid_nvlink=avoid_nvlink)
    num_links = len(fabric.common_links_X)
    bytes_SQ = bytes_SF[:, flow_Q] * share_Q
    return LinkUse(
        bytes_SX=np.stack([np.bincount(link_Q, weights=bytes_Q, minlength=num_links) for bytes_Q in bytes_SQ]),
        flows_SX=np.stack([np.bincount(link_Q, weights=bytes_Q > 0, minlength=num_links) for bytes_Q in bytes_SQ]),
    )


def _common_hops(
    fabric: Fabric, source_F: NDArray[np.integer], target_F: NDArray[np.integer], *, avoid_nvlink: bool
) -> tuple[NDArray[np.integer], NDArray[np.integer], FloatArray]:
    """The (flow, common link) pairs of flows between ranks of the fabric, with the share of the flow's bytes that goes
    there; a group sends many matrices over the same."""
    key = (source_F.tobytes(), target_F.tobytes(), bytes([avoid_nvlink]))
    if key not in fabric.common_hops:
        number = np.full(len(fabric.links) + 1, NONE)
        number[fabric.common_links_X] = np.arange(len(fabric.common_links_X))
        path_FP, flow_F, share_F = fabric.split_routes(source_F, target_F, avoid_nvlink=avoid_nvlink)
        link_FP = number[path_FP]
        on_link_Q = np.nonzero(link_FP != NONE)
        fabric.common_hops[key] = flow_F[on_link_Q[0]], link_FP[on_link_Q], share_F[on_link_Q[0]]
    return fabric.common_hops[key]


def path_rates(fabric: Fabric, source_F: NDArray[np.integer], target_F: NDArray[np.integer]) -> FloatArray:
    """Bytes/s of each flow if it were alone: what the slowest link of its route can carry."""
    path_QP, flow_Q, share_Q = fabric.split_routes(source_F, target_F)
    route_U, hop_U = np.nonzero(path_QP != NONE)
    link_U, flow_U = path_QP[route_U, hop_U], flow_Q[route_U]
    pair_Y, place_U = np.unique(flow_U * len(fabric.links) + link_U, return_inverse=True)
    share_Y = np.bincount(place_U, weights=share_Q[route_U], minlength=len(pair_Y))
    flow_Y, link_Y = np.divmod(pair_Y, len(fabric.links))
    rate_F = np.full(len(source_F), np.inf)
    np.minimum.at(rate_F, flow_Y, fabric.capacity_X[link_Y] / share_Y)
    return rate_F
