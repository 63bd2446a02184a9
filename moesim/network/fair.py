"""`exact` and `fluid`: max-min fair sharing of every link over time.

`exact` shares anew after each flow that ends, `fluid` after windows of time. Flows that share no link, not even through
others, are solved apart, so NVLink parts never wait for the network's events. Latency is added once per flow. Answers
are kept for starts that come again: the same matrices return in every micro-batch.

Legend: S routing samples, R ranks, F flows, C components, X links, P hops, Q entries of the lists of flows per link.
"""

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from moesim.errors import InternalError
from moesim.network.fabric import Fabric
from moesim.network.fair_loops import drain_components, join_links
from moesim.network.flows import Demand, Flows, build_flows
from moesim.network.ladder import NONE

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]

FLUID_WINDOW = 0.01  # a window's share of the time since the first release: rank finish within 1 % of exact
COARSE_WINDOW = 0.02  # within 1.6 %, at half the cost: for more than COARSE_FLOWS, where `exact` is out of reach
COARSE_FLOWS = 2**18


@dataclass(frozen=True, kw_only=True, eq=False)
class Components:
    """Flows in runs that share links with each other, and with no others; links are numbered within each run.

    Component c holds flows `first_flow_C[c] : [c + 1]` of `flows` and as many links of `capacity_X` by `first_link_C`.
    """

    flows: IntArray
    path_FP: IntArray
    capacity_X: FloatArray
    first_flow_C: NDArray[np.int64]
    first_link_C: NDArray[np.int64]

    @cached_property
    def component_F(self) -> NDArray[np.int64]:
        """The component of each flow."""
        return np.repeat(np.arange(len(self.first_flow_C) - 1), np.diff(self.first_flow_C))

    def ends(self, bytes_F: FloatArray, release_F: FloatArray, window_C: FloatArray) -> FloatArray:
        """End of each flow without latency, -inf for flows without bytes; all in the order of `flows`."""
        order_F = np.lexsort((release_F, self.component_F))  # `drain` takes flows in order of release
        first_flow_C = self.first_flow_C
        sends_F = bytes_F[order_F] > 0
        if not sends_F.all():
            order_F = order_F[sends_F]
            first_flow_C = np.searchsorted(self.component_F[order_F], np.arange(len(first_flow_C)))
        finish_F = np.empty(len(order_F))
        ended = drain_components(
            bytes_F[order_F], release_F[order_F], self.path_FP[order_F], self.capacity_X, first_flow_C,
            self.first_link_C, window_C, finish_F,
        )  # fmt: skip
        if not ended or not np.isfinite(finish_F).all():
            raise InternalError("network: flows that share links do not come to their ends")
        ends_F = np.full(len(bytes_F), -np.inf)
        ends_F[order_F] = finish_F
        return ends_F


class FairSharing:
    """Max-min sharing for one set of flows; `window` is 0 for `exact`."""

    def __init__(self, fabric: Fabric, demand: Demand, *, two_sided: bool, window: float) -> None:
        self._flows = flows = build_flows(fabric, demand)
        self._two_sided = two_sided
        self._components = _components(fabric, flows)
        size_C = np.diff(self._components.first_flow_C)
        self._window_C = np.where(size_C > COARSE_FLOWS, max(window, COARSE_WINDOW), window) if window else 0.0 * size_C

    def part(self, samples: slice) -> Self:
        """The same flows in some of the samples."""
        part = copy.copy(self)
        part._flows = replace(self._flows, bytes_SF=self._flows.bytes_SF[samples])
        return part

    def flow_finish(self, start_SR: FloatArray) -> FloatArray:
        """Arrival of each pair's last byte, latency included, [S, R, R]; -inf for pairs without traffic."""
        flows = self._flows
        finish_SRR = np.full((len(start_SR), flows.num_ranks, flows.num_ranks), -np.inf)
        for finish_RR, arrival_F in zip(finish_SRR, self._arrivals(start_SR), strict=True):
            np.maximum.at(finish_RR, (flows.source_F, flows.target_F), arrival_F)
        return finish_SRR

    def finish(self, start_SR: FloatArray) -> FloatArray:
        """When each rank has sent and received all, latency included, [S, R]."""
        finish_SR = np.array(start_SR, dtype=np.float64)
        for sample, arrival_F in enumerate(self._arrivals(start_SR)):
            np.maximum.at(finish_SR[sample], self._flows.source_F, arrival_F)
            np.maximum.at(finish_SR[sample], self._flows.target_F, arrival_F)
        return finish_SR

    def _arrivals(self, start_SR: FloatArray) -> FloatArray:
        flows, parts = self._flows, self._components
        arrival_SF = np.full(flows.bytes_SF.shape, -np.inf)
        for start_R, bytes_F, arrival_F in zip(start_SR, flows.bytes_SF, arrival_SF, strict=True):
            release_F = start_R[flows.source_F]
            if self._two_sided:
                release_F = np.maximum(release_F, start_R[flows.target_F])
            arrival_F[parts.flows] = parts.ends(bytes_F[parts.flows], release_F[parts.flows], self._window_C)
            arrival_F += flows.latency_F
        return arrival_SF


def _components(fabric: Fabric, flows: Flows) -> Components:
    """Split the flows where no link is shared."""
    path_FP = flows.path_FP
    root_F = np.zeros(0, dtype=np.int32)
    if len(path_FP):
        root_F = np.append(join_links(path_FP, len(fabric.links)), NONE)[path_FP].max(axis=1)
        assert root_F.min() >= 0, "a flow without any link that could bind it"
    order_F = np.argsort(root_F, kind="stable").astype(np.int32)
    first_flow_C = np.flatnonzero(np.diff(root_F[order_F], prepend=NONE))
    first_flow_C = np.append(first_flow_C, len(order_F))
    local_FP, capacities = path_FP[order_F], []
    for first, last in pairwise(first_flow_C):
        own_FP = local_FP[first:last]
        used_X = np.zeros(len(fabric.links) + 1, dtype=bool)
        used_X[own_FP] = True
        used_X[NONE] = False
        local_FP[first:last] = np.where(used_X, np.cumsum(used_X) - 1, NONE).astype(np.int32)[own_FP]
        capacities.append(fabric.capacity_X[used_X[:-1]])
    return Components(
        flows=order_F,
        path_FP=np.ascontiguousarray(local_FP),
        capacity_X=np.concatenate([np.zeros(0), *capacities]),
        first_flow_C=first_flow_C,
        first_link_C=np.cumsum([0, *map(len, capacities)]),
    )


KEPT_ANSWERS = 64  # per matrix; the oldest goes first


class Remembered:
    """Solve for starts rounded to `grid` of the transfer's length, each pattern of starts once.

    Finish times are off by no more than the rounding of the starts moves them, about `grid` / 2 of the length. Only
    differences between starts count, so a pattern is known again at a later time.
    """

    def __init__(self, sharing: FairSharing, *, shape: tuple[int, int], grid: float) -> None:
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

    def __init__(self, sharing: FairSharing, *, shape: tuple[int, int], two_sided: bool) -> None:
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
