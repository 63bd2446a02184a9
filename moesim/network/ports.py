"""`ports`: an all-to-all in closed form, from the queues at each rank's ports.

With b the seconds that a flow takes alone at a port, S the ranks' starts and R the flow's release (a two-sided flow:
when both ends are there), a port that shares fairly is done with all its flows at
    queue = max_k (S_(k) + sum of b over flows released at S_(k) or later)
and with one of them at the latest at R + sum_j min(b_j, b). A flow ends when the later of its ports is done with it;
a rank ends with its ports and its flows, so a hot receiver holds its senders back. Links that several ranks share
(an oversubscribed core, a detour) are ports with flows of many ranks.

Legend: S matrices (routing samples), R ranks, F flows, P ports of one side, T ports of one table, W flows of a port.
"""

import copy
import importlib
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from moesim.network.fabric import Fabric
from moesim.network.flow_ports import PortTable, Side, flow_ports
from moesim.network.flows import Demand
from moesim.network.pair_ports import SharedLink, shared_links

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.integer]

COMPILED_RANKS = 32  # from here on compiled loops pay for loading numba
COMPILED_FLOWS = 64  # of a port: for more of them sorting is faster than comparing each with each


class SideLoads:
    """What the flows cost at the receiving or at the sending ports: `seconds_SF` alone, `level_SF` after release with
    fair sharing (-inf without bytes), and per port the sum of its flows and the longest latency among them."""

    def __init__(self, side: Side, flows_SF4: FloatArray, ports_SP2: FloatArray, *, column: int, first: int) -> None:
        """Views of the numbers of both sides: a flow's from `column` on, those of this side's ports from `first` on."""
        self.side = side
        self._for_loops = flows_SF4, column, ports_SP2, first
        self.seconds_SF, self.level_SF = flows_SF4[..., column], flows_SF4[..., column + 1]
        ports_SP2 = ports_SP2[:, first : first + len(side.owner_P)]
        self.total_SP, self.latency_SP = ports_SP2[..., 0], ports_SP2[..., 1]

    def fill(self, bytes_SF: FloatArray, latency_F: FloatArray, *, compiled: bool) -> None:
        """Work them out from the flows' bytes."""
        widest = max((flow_TW.shape[1] for _, flow_TW, _ in self.side.tables), default=0)
        if compiled and widest <= COMPILED_FLOWS:
            for port_T, flow_TW, _ in self.side.tables:
                loops().fill(bytes_SF, self.side.pace_F, latency_F, port_T, flow_TW, *self._for_loops)
            return
        np.multiply(bytes_SF, self.side.pace_F, out=self.seconds_SF)
        active_SF = bytes_SF > 0
        seconds_SF = _padded(self.seconds_SF, 0.0)
        latency_SF = _padded(np.where(active_SF, latency_F, -np.inf), -np.inf)
        for port_T, flow_TW, _ in self.side.tables:
            seconds_STW = seconds_SF[:, flow_TW]
            self.total_SP[:, port_T] = seconds_STW.sum(axis=2)
            self.latency_SP[:, port_T] = latency_SF[:, flow_TW].max(axis=2)
            real_TW = flow_TW < len(latency_F)
            self.level_SF[:, flow_TW[real_TW]] = fair_levels(seconds_STW)[:, real_TW]
        self.level_SF[~active_SF] = -np.inf

    @cached_property
    def tables(self) -> Sequence[tuple[PortTable, FloatArray, FloatArray, IntArray]]:
        """Per table of ports the seconds of their flows [S, T, W], 0 or (where there is no flow) -inf for each, and
        where in the flattened array a port's flows begin [S, T, 1]."""
        seconds_SF = _padded(self.seconds_SF, 0.0)
        absent_SF = _padded(np.where(np.isinf(self.level_SF), -np.inf, 0.0), -np.inf)
        tables = []
        for table in self.side.tables:
            seconds_STW = np.ascontiguousarray(seconds_SF[:, table.flow_TW])
            samples, ports, width = seconds_STW.shape
            first_ST1 = np.arange(0, seconds_STW.size, width).reshape(samples, ports, 1)
            tables.append((table, seconds_STW, absent_SF[:, table.flow_TW], first_ST1))
        return tables

    def queues(self, start_SR: FloatArray) -> FloatArray:
        """When each port is done if only the flows' other ends are late, [S, P]."""
        queue_SP = np.empty(self.total_SP.shape)
        for table, seconds_STW, absent_STW, first_ST1 in self.tables:
            start_STW = start_SR[:, table.peer_TW] + absent_STW
            order_STW = (-start_STW).argsort(axis=2)
            order_STW += first_ST1
            later_STW = seconds_STW.take(order_STW).cumsum(axis=2)
            later_STW += start_STW.take(order_STW)
            queue_SP[:, table.port_T] = later_STW.max(axis=2)
        return queue_SP

    def own(self, start_SR: FloatArray) -> FloatArray:
        """When each port is done if only its own rank is late, [S, P]."""
        return np.asarray(self.total_SP + start_SR[:, self.side.owner_P])

    def ends(self, release_SF: FloatArray, queue_SP: FloatArray) -> FloatArray:
        """When the port is done with each flow, [S, F]."""
        return np.asarray(np.minimum(queue_SP[:, self.side.port_F], release_SF + self.level_SF))


class Ports:
    """The closed form for one set of flows, all samples at once.

    `compiled`: whether loops compiled by numba work it out where they can (no links are shared), and not numpy; by
    default for large groups, which pay for loading numba.
    """

    def __init__(self, fabric: Fabric, demand: Demand, *, two_sided: bool, compiled: bool | None = None) -> None:
        self._flows = flows = flow_ports(fabric, demand)
        self._two_sided = two_sided
        self._shared = shared_links(flows.shared, demand)
        many = flows.num_ranks >= COMPILED_RANKS if compiled is None else compiled
        self.is_compiled = many and not self._shared and loops() is not None
        bytes_SF = demand.bytes_SRR[:, flows.source_F, flows.target_F]
        if self.is_compiled:
            bytes_SF = np.ascontiguousarray(bytes_SF)
        self._layout = (
            two_sided, len(flows.receive.owner_P), flows.ends_F4, flows.latency_F, flows.first_of_source_R,
            flows.first_of_target_R, flows.by_target_F, flows.owner_P,
        )  # fmt: skip
        # Side by side in memory, for the compiled loops: a flow's seconds and levels at both of its ports.
        self._flows_SF4 = np.empty((*bytes_SF.shape, 4))
        self._ports_SP2 = np.empty((len(bytes_SF), len(flows.owner_P), 2))
        for loads in (self._receive, self._send):
            loads.fill(bytes_SF, flows.latency_F, compiled=self.is_compiled)

    def part(self, samples: slice) -> Self:
        """The closed form for some of the matrices."""
        part = copy.copy(self)
        part.__dict__.pop("_receive", None)
        part.__dict__.pop("_send", None)
        part._flows_SF4, part._ports_SP2 = self._flows_SF4[samples], self._ports_SP2[samples]
        part._shared = tuple(link.part(samples) for link in self._shared)
        return part

    @cached_property
    def _receive(self) -> SideLoads:
        return SideLoads(self._flows.receive, self._flows_SF4, self._ports_SP2, column=0, first=0)

    @cached_property
    def _send(self) -> SideLoads:
        first = len(self._flows.receive.owner_P)
        return SideLoads(self._flows.send, self._flows_SF4, self._ports_SP2, column=2, first=first)

    def _queues(self, start_SR: FloatArray) -> tuple[FloatArray, FloatArray]:
        """When each receiving and each sending port is done, [S, P]."""
        received_SP, sent_SP = self._receive.queues(start_SR), self._send.own(start_SR)
        if self._two_sided:  # a one-sided sender waits for nobody, and its receiver need not have come
            np.maximum(received_SP, self._receive.own(start_SR), out=received_SP)
            np.maximum(sent_SP, self._send.queues(start_SR), out=sent_SP)
        return received_SP, sent_SP

    def _arrivals(self, start_SR: FloatArray, received_SP: FloatArray, sent_SP: FloatArray) -> FloatArray:
        """Arrival of each flow's last byte, latency included, [S, F]; -inf for flows without bytes."""
        flows = self._flows
        release_SF = start_SR[:, flows.source_F]
        if self._two_sided:
            release_SF = np.maximum(release_SF, start_SR[:, flows.target_F])
        ends_SF = np.maximum(self._receive.ends(release_SF, received_SP), self._send.ends(release_SF, sent_SP))
        if self._shared:
            ends_SRR, release_SRR = self._dense(ends_SF), self._dense(release_SF)
            for link in self._shared:
                _delay(ends_SRR, link, release_SRR[:, link.source_F, link.target_F])
            ends_SF = ends_SRR[:, flows.source_F, flows.target_F]
        return np.asarray(ends_SF + flows.latency_F)

    def _dense(self, values_SF: FloatArray) -> FloatArray:
        flows = self._flows
        values_SRR = np.full((len(values_SF), flows.num_ranks, flows.num_ranks), -np.inf)
        values_SRR[:, flows.source_F, flows.target_F] = values_SF
        return values_SRR

    def flow_finish(self, start_SR: FloatArray) -> FloatArray:
        """Arrival of each pair's last byte, latency included, [S, R, R]; -inf for pairs without traffic."""
        return self._dense(self._arrivals(start_SR, *self._queues(start_SR)))

    def finish(self, start_SR: FloatArray) -> FloatArray:
        """When each rank is done with all that it sends and receives, latency included, [S, R]."""
        if self.is_compiled:
            finish_SR: FloatArray = loops().finish(np.ascontiguousarray(start_SR), *self.for_loops)
            return finish_SR
        received_SP, sent_SP = self._queues(start_SR)
        arrival_SF = self._arrivals(start_SR, received_SP, sent_SP)
        finish_SR = np.array(start_SR, dtype=np.float64)
        arrival_of_flow_SF = _padded(arrival_SF, -np.inf)
        for loads, queue_SP in ((self._receive, received_SP), (self._send, sent_SP)):
            done_SP = queue_SP + loads.latency_SP
            for port_T, flow_TW, _ in loads.side.tables:
                last_ST = np.maximum(arrival_of_flow_SF[:, flow_TW].max(axis=2), done_SP[:, port_T])
                owner_T = loads.side.owner_P[port_T]
                finish_SR[:, owner_T] = np.maximum(finish_SR[:, owner_T], last_ST)
        return finish_SR

    @property
    def for_loops(self) -> tuple[Any, ...]:
        """What `ports_loops` needs beside the starts."""
        return *self._layout, self._flows_SF4, self._ports_SP2


@cache
def loops(name: str = "ports_loops") -> Any:
    """The module of compiled loops where numba is installed; without it (None) numpy computes the same."""
    try:
        return importlib.import_module(f"moesim.network.{name}")
    except ImportError:
        return None


def _padded(values_SF: FloatArray, value: float) -> FloatArray:
    """With a last entry for the flows that are not there."""
    return np.concatenate([values_SF, np.full((len(values_SF), 1), value)], axis=1)


def _delay(ends_SRR: FloatArray, link: SharedLink, release_SF: FloatArray) -> None:
    """Flows over a shared link end no sooner than its queue and its fair share let them."""
    sample_S1 = np.arange(len(release_SF))[:, None]
    order_SF = (-release_SF).argsort(axis=1)
    later_SF = link.seconds_SF[sample_S1, order_SF].cumsum(axis=1)
    later_SF += release_SF[sample_S1, order_SF]
    queue_S = later_SF.max(axis=1)
    shared_SF = np.minimum(queue_S[:, None], release_SF + link.level_SF)
    ends_SF = ends_SRR[:, link.source_F, link.target_F]
    ends_SRR[:, link.source_F, link.target_F] = np.maximum(ends_SF, shared_SF)


def fair_levels(seconds_STW: FloatArray) -> FloatArray:
    """sum_j min(b_j, b) over the flows of a port, the last axis; flows that are not there are 0 seconds long."""
    order_STW = np.argsort(seconds_STW, axis=2)
    ascending_STW = np.take_along_axis(seconds_STW, order_STW, axis=2)
    levels_STW = np.cumsum(ascending_STW, axis=2)
    levels_STW += np.arange(seconds_STW.shape[2])[::-1] * ascending_STW
    np.put_along_axis(ascending_STW, order_STW, levels_STW, axis=2)
    return ascending_STW
