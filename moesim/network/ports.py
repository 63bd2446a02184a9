"""`ports`: an all-to-all in closed form, from the queues at each rank's ports.

With b the seconds that a flow takes alone at a port, S the ranks' starts and R the flow's release (a two-sided flow:
when both ends are there), a port that shares fairly is done with all its flows at
    queue = max_k (S_(k) + sum of b over flows released at S_(k) or later)
and with one of them at the latest at R + sum_j min(b_j, b). A flow ends when the later of its ports is done with it;
a rank ends with its ports and its flows, so a hot receiver holds its senders back. Links that several ranks share
(an oversubscribed core, a detour) are ports with flows of many ranks.

Legend: S routing samples, R ranks, F flows, C ports (every rank's receiving ports, then the sending ones).
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from moesim.network.endpoints import SharedLink, pair_ports, shared_links
from moesim.network.fabric import Fabric
from moesim.network.flows import Demand

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.integer]

COMPILED_RANKS = 32  # from here on compiled loops pay for loading numba


class Ports:
    """The closed form for one set of flows, all samples at once."""

    def __init__(self, fabric: Fabric, demand: Demand, *, two_sided: bool) -> None:
        ports = pair_ports(fabric, demand)
        self._two_sided = two_sided
        self._shared = shared_links(ports, demand)
        idle_SRR = demand.bytes_SRR == 0
        self._latency_SRR = np.where(idle_SRR, -np.inf, ports.latency_RR)
        num_ranks = len(demand.ranks_R)
        rows, columns = np.indices((num_ranks, num_ranks), dtype=np.int32)
        self._num_receive = num_receive = (int(ports.receive_slot_RR.max()) + 1) * num_ranks
        self._receive_port_RR = ports.receive_slot_RR * num_ranks + columns
        self._send_port_RR = num_receive + ports.send_slot_RR * num_ranks + rows
        num_ports = num_receive + (int(ports.send_slot_RR.max()) + 1) * num_ranks
        self._one_port = num_ports == 2 * num_ranks  # one receiving and one sending port each: ports need no look-up
        # Seconds at each port by the rank at the other end, and the longest latency of a port's flows.
        received_SRR, sent_SRR = demand.bytes_SRR * ports.receive_pace_RR, demand.bytes_SRR * ports.send_pace_RR
        self._seconds_SRC = np.zeros((len(idle_SRR), num_ranks, num_ports))
        self._seconds_SRC[:, rows, self._receive_port_RR] = received_SRR
        self._seconds_SRC[:, columns, self._send_port_RR] = sent_SRR
        self._port_latency_SC = np.full((len(idle_SRR), num_ports), -np.inf)
        for port_RR in (self._receive_port_RR, self._send_port_RR):
            for sample, latency_RR in enumerate(self._latency_SRR):
                np.maximum.at(self._port_latency_SC[sample], port_RR.ravel(), latency_RR.ravel())
        self._totals_SC = self._seconds_SRC.sum(axis=1)
        received_SRR = fair_levels(received_SRR.swapaxes(1, 2), ports.receive_slot_RR.T).swapaxes(1, 2)
        self._receive_level_SRR = np.where(idle_SRR, -np.inf, received_SRR)
        self._send_level_SRR = np.where(idle_SRR, -np.inf, fair_levels(sent_SRR, ports.send_slot_RR))

    def _queues(self, start_SR: FloatArray) -> FloatArray:
        """When each port is done, [S, C]."""
        order_SR = (-start_SR).argsort(axis=1)
        if len(start_SR) == 1:
            later_SRC = self._seconds_SRC[0].take(order_SR[0], axis=0)[None].cumsum(axis=1)
            later_SRC += start_SR[0].take(order_SR[0])[:, None]
        else:
            samples = np.arange(len(start_SR))[:, None]
            later_SRC = self._seconds_SRC[samples, order_SR].cumsum(axis=1)
            later_SRC += start_SR[samples, order_SR][:, :, None]
        queue_SC: FloatArray = np.maximum.reduce(later_SRC, axis=1)
        by_owner = (len(start_SR), -1, start_SR.shape[1])
        own_SC = (self._totals_SC.reshape(by_owner) + start_SR[:, None, :]).reshape(queue_SC.shape)
        if self._two_sided:
            return np.asarray(np.maximum(queue_SC, own_SC))
        queue_SC[:, self._num_receive :] = own_SC[:, self._num_receive :]  # a one-sided sender waits for nobody
        return queue_SC

    def _flow_ends(self, start_SR: FloatArray, queue_SC: FloatArray) -> FloatArray:
        """When each pair's last byte leaves the links, without latency, [S, R, R]; -inf for pairs without traffic."""
        release_SRR = start_SR[:, :, None]
        if self._two_sided:
            release_SRR = np.maximum(release_SRR, start_SR[:, None, :])
        num_ranks = start_SR.shape[1]
        if self._one_port:
            received_SRR, queued_SRR = queue_SC[:, None, :num_ranks], queue_SC[:, num_ranks:, None]
        else:
            received_SRR, queued_SRR = queue_SC[:, self._receive_port_RR], queue_SC[:, self._send_port_RR]
        ends_SRR = release_SRR + self._receive_level_SRR
        np.minimum(ends_SRR, received_SRR, out=ends_SRR)
        sent_SRR = release_SRR + self._send_level_SRR
        np.minimum(sent_SRR, queued_SRR, out=sent_SRR)
        np.maximum(ends_SRR, sent_SRR, out=ends_SRR)
        for link in self._shared:
            _delay(ends_SRR, link, np.broadcast_to(release_SRR, ends_SRR.shape)[:, link.source_F, link.target_F])
        return ends_SRR

    def flow_finish(self, start_SR: FloatArray) -> FloatArray:
        """Arrival of each pair's last byte, latency included, [S, R, R]; -inf for pairs without traffic."""
        return np.asarray(self._flow_ends(start_SR, self._queues(start_SR)) + self._latency_SRR)

    def finish(self, start_SR: FloatArray) -> FloatArray:
        """When each rank is done with all that it sends and receives, latency included, [S, R]."""
        compiled = compiled_finish() if start_SR.shape[1] >= COMPILED_RANKS and not self._shared else None
        if compiled is not None:
            finish_SR = np.empty(start_SR.shape)
            compiled(
                np.ascontiguousarray(start_SR), np.argsort(-start_SR, axis=1),
                self._two_sided, self._num_receive, self._seconds_SRC, self._totals_SC,
                self._port_latency_SC, self._receive_port_RR, self._send_port_RR, self._receive_level_SRR,
                self._send_level_SRR, self._latency_SRR, finish_SR,
            )  # fmt: skip
            return finish_SR
        queue_SC = self._queues(start_SR)
        ends_SRR = self._flow_ends(start_SR, queue_SC)
        ends_SRR += self._latency_SRR
        finish_SR = np.maximum.reduce(np.maximum(ends_SRR, ends_SRR.swapaxes(1, 2)), axis=1)
        queue_SC += self._port_latency_SC
        for first in range(0, queue_SC.shape[1], start_SR.shape[1]):
            np.maximum(finish_SR, queue_SC[:, first : first + start_SR.shape[1]], out=finish_SR)
        return np.asarray(np.maximum(finish_SR, start_SR, out=finish_SR))


@cache
def compiled_finish() -> Callable[..., None] | None:
    """The loops of `ports_loops` where numba is installed; without it numpy computes the same."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return None
    from moesim.network.ports_loops import finish

    return finish


def _delay(ends_SRR: FloatArray, link: SharedLink, release_SF: FloatArray) -> None:
    """Flows over a shared link end no sooner than its queue and its fair share let them."""
    order_SF = np.argsort(-release_SF, axis=1)
    later_SF = np.cumsum(np.take_along_axis(link.seconds_SF, order_SF, axis=1), axis=1)
    queue_S = (later_SF + np.take_along_axis(release_SF, order_SF, axis=1)).max(axis=1)
    shared_SF = np.minimum(queue_S[:, None], release_SF + link.level_SF)
    ends_SF = ends_SRR[:, link.source_F, link.target_F]
    ends_SRR[:, link.source_F, link.target_F] = np.maximum(ends_SF, shared_SF)


def fair_levels(seconds_SRN: FloatArray, slot_RN: IntArray) -> FloatArray:
    """sum_j min(b_j, b) over the flows of the same port: port `slot_RN` of row r, in a row of N flows."""
    num_slots = int(slot_RN.max()) + 1
    # One sort by (slot, seconds); the key's rounding can only swap flows that are alike to 1e-15.
    order_SRN = np.argsort(seconds_SRN + slot_RN * (2 * seconds_SRN.max(initial=0.0) + 1e-30), axis=2)
    ascending_SRN = np.take_along_axis(seconds_SRN, order_SRN, axis=2)
    sums_SRN = np.cumsum(ascending_SRN, axis=2)
    larger_RN = np.broadcast_to(np.arange(slot_RN.shape[1])[::-1], slot_RN.shape)
    if num_slots > 1:
        sorted_slot_RN = np.sort(slot_RN, axis=1)
        counts_RT = np.stack([(slot_RN <= slot).sum(axis=1) for slot in range(num_slots)], axis=1)
        larger_RN = np.take_along_axis(counts_RT, sorted_slot_RN, axis=1) - 1 - np.arange(slot_RN.shape[1])
        padded = np.concatenate([np.zeros_like(sums_SRN[:, :, :1]), sums_SRN], axis=2)
        before_RT = np.concatenate([np.zeros_like(counts_RT[:, :1]), counts_RT[:, :-1]], axis=1)
        start_of_slot_SRT = np.take_along_axis(
            padded, np.broadcast_to(before_RT, (len(padded), *before_RT.shape)), axis=2
        )
        sums_SRN -= np.take_along_axis(start_of_slot_SRT, np.broadcast_to(sorted_slot_RN, sums_SRN.shape), axis=2)
    sums_SRN += larger_RN * ascending_SRN
    np.put_along_axis(ascending_SRN, order_SRN, sums_SRN, axis=2)
    return np.asarray(ascending_SRN)
