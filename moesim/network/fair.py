"""`exact` and `fluid`: max-min fair sharing of every link over time.

`exact` shares anew after each flow that ends, `fluid` after windows of time. Flows that share no link, not even through
others, are solved apart, so NVLink parts never wait for the network's events. Latency is added once per flow.

Legend: S routing samples, R ranks, F flows, C components, X links, P hops, Q entries of the lists of flows per link.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.network.fabric import NONE, Fabric
from moesim.network.filling import drain
from moesim.network.flows import Demand, Flows, build_flows

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]

FLUID_WINDOW = 0.01  # a window's share of the time since the first release


@dataclass(frozen=True, kw_only=True, eq=False)
class Component:
    """Flows that share links with each other, and with no others; links are numbered within it."""

    flows: IntArray
    path_FP: IntArray
    capacity_X: FloatArray


class FairSharing:
    """Max-min sharing for one set of flows; `window` is 0 for `exact`."""

    def __init__(self, fabric: Fabric, demand: Demand, *, two_sided: bool, window: float) -> None:
        self._flows = flows = build_flows(fabric, demand)
        self._two_sided = two_sided
        self._window = window
        self._components = _components(fabric, flows)

    def flow_finish(self, start_SR: FloatArray) -> FloatArray:
        """Arrival of each pair's last byte, latency included, [S, R, R]; -inf for pairs without traffic."""
        flows = self._flows
        finish_SRR = np.full((len(start_SR), flows.num_ranks, flows.num_ranks), -np.inf)
        finish_SRR[:, flows.source_F, flows.target_F] = self._arrivals(start_SR)
        return finish_SRR

    def finish(self, start_SR: FloatArray) -> FloatArray:
        """When each rank has sent and received all, latency included, [S, R]."""
        finish_SR = np.array(start_SR, dtype=np.float64)
        for sample, arrival_F in enumerate(self._arrivals(start_SR)):
            np.maximum.at(finish_SR[sample], self._flows.source_F, arrival_F)
            np.maximum.at(finish_SR[sample], self._flows.target_F, arrival_F)
        return finish_SR

    def _arrivals(self, start_SR: FloatArray) -> FloatArray:
        flows = self._flows
        arrival_SF = np.full(flows.bytes_SF.shape, -np.inf)
        for start_R, bytes_F, arrival_F in zip(start_SR, flows.bytes_SF, arrival_SF, strict=True):
            release_F = start_R[flows.source_F]
            if self._two_sided:
                release_F = np.maximum(release_F, start_R[flows.target_F])
            for component in self._components:
                chosen = component.flows[bytes_F[component.flows] > 0]
                path_FP = component.path_FP[bytes_F[component.flows] > 0]
                ends_F = _solve(bytes_F[chosen], release_F[chosen], path_FP, component.capacity_X, window=self._window)
                arrival_F[chosen] = ends_F + flows.latency_F[chosen]
        return arrival_SF


def _solve(
    bytes_F: FloatArray, release_F: FloatArray, path_FP: IntArray, capacity_X: FloatArray, *, window: float
) -> FloatArray:
    """End of each flow without latency. Flows are put in order of release first; ties keep their order."""
    if not len(bytes_F):
        return np.zeros(0)
    order_F = np.argsort(release_F, kind="stable")
    path_FP = np.ascontiguousarray(path_FP[order_F])
    bytes_F, release_F = bytes_F[order_F], release_F[order_F]
    scale = 0.0
    if window:
        load_X = np.zeros(len(capacity_X))
        for hop in range(path_FP.shape[1]):
            used = path_FP[:, hop] != NONE
            load_X += np.bincount(path_FP[used, hop], weights=bytes_F[used], minlength=len(capacity_X))
        scale = float((load_X / capacity_X).max())
    first_X, list_Q = _flows_per_link(path_FP, len(capacity_X))
    finish_F = np.empty(len(bytes_F))
    drain(bytes_F, release_F, path_FP, capacity_X, first_X, list_Q, window, scale, finish_F)
    ends_F = np.empty(len(bytes_F))
    ends_F[order_F] = finish_F
    return ends_F


def _flows_per_link(path_FP: IntArray, num_links: int) -> tuple[NDArray[np.int64], IntArray]:
    """For each link where its flows start in the list [X + 1], and the list of flows [Q]."""
    flow_Q, hop_Q = np.nonzero(path_FP != NONE)
    link_Q = path_FP[flow_Q, hop_Q]
    order_Q = np.argsort(link_Q, kind="stable")
    first_X = np.zeros(num_links + 1, dtype=np.int64)
    np.cumsum(np.bincount(link_Q, minlength=num_links), out=first_X[1:])
    return first_X, flow_Q[order_Q].astype(np.int32)


def _components(fabric: Fabric, flows: Flows) -> tuple[Component, ...]:
    """Split the flows where no link is shared: links of a route take the least number among them until none changes."""
    path_FP = flows.path_FP
    num_links = len(fabric.links)
    label_X = np.arange(num_links + 1)  # the last entry stands for "no link"
    while True:
        least_F = label_X[path_FP].min(axis=1, initial=num_links)
        new_X = label_X.copy()
        for hop in range(path_FP.shape[1]):
            np.minimum.at(new_X, path_FP[:, hop], least_F)
        new_X[-1] = num_links
        new_X[:-1] = np.minimum(new_X[:-1], new_X[new_X[:-1]])
        if (new_X == label_X).all():
            break
        label_X = new_X
    assert not len(least_F) or least_F.max() < num_links, "a flow without any link that could bind it"
    components = []
    for label in np.unique(least_F):
        chosen = np.flatnonzero(least_F == label).astype(np.int32)
        links = np.unique(path_FP[chosen])
        links = links[links != NONE]
        local_X = np.full(num_links + 1, NONE, dtype=np.int32)
        local_X[links] = np.arange(len(links), dtype=np.int32)
        components.append(
            Component(flows=chosen, path_FP=local_X[path_FP[chosen]], capacity_X=fabric.capacity_X[links])
        )
    return tuple(components)
