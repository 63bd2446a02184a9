"""`exact` and `fluid`: max-min fair sharing of every link over time.

`exact` shares anew after each flow that ends, `fluid` after windows of time. Flows that share no link, not even through
others, are solved apart, so NVLink parts never wait for the network's events. Latency is added once per flow.

Legend: S routing samples, R ranks, F flows, C components, X links, P hops, Q entries of the lists of flows per link.
"""

import copy
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from moesim.network.fabric import NONE, Fabric
from moesim.network.filling import drain, join_links, list_flows
from moesim.network.flows import Demand, Flows, build_flows

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]

FLUID_WINDOW = 0.01  # a window's share of the time since the first release: rank finish within 1 % of exact
COARSE_WINDOW = 0.02  # within 1.6 %, at half the cost: for more than COARSE_FLOWS, where `exact` is out of reach
COARSE_FLOWS = 2**18


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

    def part(self, samples: slice) -> Self:
        """The same flows in some of the samples."""
        part = copy.copy(self)
        part._flows = replace(self._flows, bytes_SF=self._flows.bytes_SF[samples])
        return part

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
                chosen, path_FP = component.flows, component.path_FP
                sends_F = bytes_F[chosen] > 0
                if not sends_F.all():
                    chosen, path_FP = chosen[sends_F], path_FP[sends_F]
                ends_F = _solve(bytes_F[chosen], release_F[chosen], path_FP, component.capacity_X, window=self._window)
                arrival_F[chosen] = ends_F + flows.latency_F[chosen]
        return arrival_SF


def _solve(
    bytes_F: FloatArray, release_F: FloatArray, path_FP: IntArray, capacity_X: FloatArray, *, window: float
) -> FloatArray:
    """End of each flow without latency. Flows are put in order of release first; ties keep their order."""
    if not len(bytes_F):
        return np.zeros(0)
    order_F = None
    if (np.diff(release_F) < 0).any():
        order_F = np.argsort(release_F, kind="stable")
        path_FP, bytes_F, release_F = path_FP[order_F], bytes_F[order_F], release_F[order_F]
    scale = 0.0
    if window and len(bytes_F) > COARSE_FLOWS:
        window = COARSE_WINDOW
    if window:
        load_X = np.zeros(len(capacity_X))
        for link_F in path_FP.T:
            load_X += np.bincount(link_F + 1, weights=bytes_F, minlength=len(capacity_X) + 1)[1:]
        scale = float((load_X / capacity_X).max())
    first_X = np.zeros(len(capacity_X) + 1, dtype=np.int64)
    list_Q = np.empty(np.count_nonzero(path_FP != NONE), dtype=np.int32)
    list_flows(path_FP, len(capacity_X), first_X, list_Q)
    finish_F = np.empty(len(bytes_F))
    drain(bytes_F, release_F, path_FP, capacity_X, first_X, list_Q, window, scale, finish_F)
    if order_F is None:
        return finish_F
    ends_F = np.empty(len(bytes_F))
    ends_F[order_F] = finish_F
    return ends_F


def _components(fabric: Fabric, flows: Flows) -> tuple[Component, ...]:
    """Split the flows where no link is shared."""
    path_FP = flows.path_FP
    if not len(path_FP):
        return ()
    root_X = np.append(join_links(path_FP, len(fabric.links)), NONE)
    root_F = root_X[path_FP].max(axis=1)
    assert root_F.min() >= 0, "a flow without any link that could bind it"
    order_F = np.argsort(root_F, kind="stable").astype(np.int32)
    components = []
    for chosen in np.split(order_F, np.flatnonzero(np.diff(root_F[order_F])) + 1):
        own_FP = path_FP[chosen]
        used_X = np.zeros(len(fabric.links) + 1, dtype=bool)
        used_X[own_FP] = True
        used_X[NONE] = False
        local_X = np.where(used_X, np.cumsum(used_X) - 1, NONE).astype(np.int32)
        capacity_X = fabric.capacity_X[used_X[:-1]]
        components.append(Component(flows=chosen, path_FP=local_X[own_FP], capacity_X=capacity_X))
    return tuple(components)
