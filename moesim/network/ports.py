"""`ports`: an all-to-all in closed form, from the queues at each rank's ports.

With b the seconds that a flow takes alone at a port, S the ranks' starts and R the flow's release (a two-sided flow:
when both ends are there), a port that shares fairly is done with all its flows at
    queue = max_k (S_(k) + sum of b over flows released at S_(k) or later)
and with one of them at the latest at R + sum_j min(b_j, b). A flow ends when the later of its ports is done with it;
a rank ends with its ports and its flows, so a hot receiver holds its senders back. Links that several ranks share
(an oversubscribed core, a detour) are ports with flows of many ranks.

Legend: S routing samples, R ranks, D the same ranks as targets, F flows, T ports of one rank, X shared links.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.network.fabric import NONE, Fabric
from moesim.network.flows import Flows

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.integer]


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedLink:
    """A link with flows of several sources and several targets."""

    flows: IntArray
    seconds_SF: FloatArray  # alone on the link
    level_SF: FloatArray  # seconds after release by which fair sharing ends the flow


class Ports:
    """The closed form for one set of flows, all samples at once."""

    def __init__(self, fabric: Fabric, flows: Flows, *, two_sided: bool) -> None:
        self._two_sided = two_sided
        self._flows = flows
        num_ranks, num_samples = flows.num_ranks, len(flows.bytes_SF)
        self._shape = (num_samples, num_ranks, num_ranks)
        send_F, receive_F = _end_ports(flows)
        capacity = np.append(fabric.capacity_X, np.inf)  # index -1: no port, no time
        self._send_slot_RR, send_TSRR = self._stack(send_F, flows.source_F, flows.bytes_SF / capacity[send_F])
        self._receive_slot_RR, receive_TSRR = self._stack(
            receive_F, flows.target_F, flows.bytes_SF / capacity[receive_F]
        )
        self._latency_SRR = np.where(self._dense(flows.bytes_SF) > 0, self._dense(flows.latency_F), -np.inf)
        idle = self._dense(flows.bytes_SF) == 0
        # Queues, [S, other rank, columns]: the columns are every receiving port (T, D), then every sending port (T, R).
        self._columns_SRC = np.concatenate(
            [
                np.moveaxis(receive_TSRR, 0, 2).reshape(num_samples, num_ranks, -1),
                np.moveaxis(send_TSRR.swapaxes(2, 3), 0, 2).reshape(num_samples, num_ranks, -1),
            ],
            axis=2,
        )
        self._totals_SC = self._columns_SRC.sum(axis=1)
        self._owner_C = np.tile(np.arange(num_ranks), self._columns_SRC.shape[2] // num_ranks)
        self._num_receive = receive_TSRR.shape[0] * num_ranks
        latency_SRC = self._column_latency(self._latency_SRR)
        self._port_latency_SC = np.where(self._columns_SRC > 0, latency_SRC, -np.inf).max(axis=1)
        self._receive_level_SRR = np.where(idle, -np.inf, _fair_levels(receive_TSRR, axis=1).sum(axis=0))
        self._send_level_SRR = np.where(idle, -np.inf, _fair_levels(send_TSRR, axis=2).sum(axis=0))
        rows, columns = np.indices((num_ranks, num_ranks))
        self._receive_column_RR = self._receive_slot_RR * num_ranks + columns
        self._send_column_RR = self._num_receive + self._send_slot_RR * num_ranks + rows
        self._shared = _shared_links(fabric, flows, send_F, receive_F)

    def _dense(self, values: FloatArray) -> FloatArray:
        dense = np.zeros(self._shape)
        dense[:, self._flows.source_F, self._flows.target_F] = values
        return dense

    def _stack(self, port_F: IntArray, owner_F: IntArray, seconds_SF: FloatArray) -> tuple[IntArray, FloatArray]:
        """Number each owner's ports 0, 1, ...: the slot of each pair, and seconds per slot [T, S, R, R]."""
        pairs = np.unique(np.stack([owner_F, port_F], axis=1), axis=0)
        first = np.searchsorted(pairs[:, 0], pairs[:, 0])
        slot_of_pair = np.arange(len(pairs)) - first
        index_F = np.searchsorted(pairs[:, 0] * 2**32 + pairs[:, 1], owner_F.astype(np.int64) * 2**32 + port_F)
        slot_RR = np.zeros(self._shape[1:], dtype=np.int64)
        slot_RR[self._flows.source_F, self._flows.target_F] = slot_of_pair[index_F]
        num_slots = int(slot_of_pair.max(initial=0)) + 1
        dense = self._dense(seconds_SF)
        return slot_RR, np.stack([np.where(slot_RR == slot, dense, 0.0) for slot in range(num_slots)])

    def _column_latency(self, latency_SRD: FloatArray) -> FloatArray:
        receiving = self._num_receive // self._shape[1]
        sending = self._columns_SRC.shape[2] // self._shape[1] - receiving
        return np.concatenate([latency_SRD] * receiving + [latency_SRD.swapaxes(1, 2)] * sending, axis=2)

    def _queues(self, start_SR: FloatArray) -> FloatArray:
        """When each port is done, [S, C]."""
        order_SR = np.argsort(-start_SR, axis=1)
        samples = np.arange(len(start_SR))[:, None]
        later_SRC = np.cumsum(self._columns_SRC[samples, order_SR], axis=1)
        later_SRC += start_SR[samples, order_SR][:, :, None]
        own_SC = start_SR[:, self._owner_C] + self._totals_SC
        if not self._two_sided:  # a one-sided sender waits for nobody
            own_SC[:, : self._num_receive] = -np.inf
            later_SRC[:, :, self._num_receive :] = -np.inf
        return np.asarray(np.maximum(later_SRC.max(axis=1), own_SC))

    def _flow_ends(self, start_SR: FloatArray, queue_SC: FloatArray) -> FloatArray:
        """When each pair's last byte leaves the links, without latency, [S, R, R]; -inf for pairs without traffic."""
        release_SRR = np.broadcast_to(start_SR[:, :, None], self._shape)
        if self._two_sided:
            release_SRR = np.maximum(release_SRR, start_SR[:, None, :])
        ends_SRR = np.minimum(queue_SC[:, self._receive_column_RR], release_SRR + self._receive_level_SRR)
        np.maximum(
            ends_SRR,
            np.minimum(queue_SC[:, self._send_column_RR], release_SRR + self._send_level_SRR),
            out=ends_SRR,
        )
        source_F, target_F = self._flows.source_F, self._flows.target_F
        for link in self._shared:
            s, d = source_F[link.flows], target_F[link.flows]
            release_SF = release_SRR[:, s, d]
            order_SF = np.argsort(-release_SF, axis=1)
            later_SF = np.cumsum(np.take_along_axis(link.seconds_SF, order_SF, axis=1), axis=1)
            queue_S = (later_SF + np.take_along_axis(release_SF, order_SF, axis=1)).max(axis=1)
            shared_SF = np.minimum(queue_S[:, None], release_SF + link.level_SF)
            ends_SRR[:, s, d] = np.maximum(ends_SRR[:, s, d], shared_SF)
        return ends_SRR

    def flow_finish(self, start_SR: FloatArray) -> FloatArray:
        """Arrival of each pair's last byte, latency included, [S, R, R]; -inf for pairs without traffic."""
        return np.asarray(self._flow_ends(start_SR, self._queues(start_SR)) + np.maximum(self._latency_SRR, 0.0))

    def finish(self, start_SR: FloatArray) -> FloatArray:
        """When each rank is done with all that it sends and receives, latency included, [S, R]."""
        queue_SC = self._queues(start_SR)
        ends_SRR = self._flow_ends(start_SR, queue_SC)
        ends_SRR += self._latency_SRR
        finish_SR = np.maximum(ends_SRR.max(axis=1), ends_SRR.max(axis=2))
        ports_SC = queue_SC + self._port_latency_SC
        np.maximum(finish_SR, ports_SC.reshape(len(start_SR), -1, self._shape[1]).max(axis=1), out=finish_SR)
        return np.asarray(np.maximum(finish_SR, start_SR, out=finish_SR))


def _end_ports(flows: Flows) -> tuple[IntArray, IntArray]:
    """Each flow's sending and receiving port: the first link that only its source uses, the last only its target uses.

    -1 where a flow has none.
    """
    num_links = int(flows.path_FP.max(initial=NONE)) + 1
    private_source_X = _private(flows.path_FP, flows.source_F, num_links)
    private_target_X = _private(flows.path_FP, flows.target_F, num_links)
    send_F = np.full(len(flows.source_F), NONE, dtype=np.int64)
    receive_F = send_F.copy()
    for hop in range(flows.path_FP.shape[1]):
        link_F = flows.path_FP[:, hop]
        mine_F = (link_F != NONE) & private_source_X[link_F] & (send_F == NONE)
        send_F[mine_F] = link_F[mine_F]
    for hop in range(flows.path_FP.shape[1]):
        link_F = flows.path_FP[:, hop]
        mine_F = (link_F != NONE) & private_target_X[link_F] & (link_F != send_F)
        receive_F[mine_F] = link_F[mine_F]
    return send_F, receive_F


def _private(path_FP: IntArray, owner_F: IntArray, num_links: int) -> NDArray[np.bool_]:
    lowest, highest = np.full(num_links + 1, 2**31), np.full(num_links + 1, -1)
    for hop in range(path_FP.shape[1]):
        np.minimum.at(lowest, path_FP[:, hop], owner_F)
        np.maximum.at(highest, path_FP[:, hop], owner_F)
    return np.asarray(lowest == highest)


def _fair_levels(seconds_TSRR: FloatArray, *, axis: int) -> FloatArray:
    """sum_j min(b_j, b) over the flows of each port, which lie along `axis` of each [S, R, R]; 0 where b is 0."""
    axis += 1
    order = np.argsort(seconds_TSRR, axis=axis)
    ascending = np.take_along_axis(seconds_TSRR, order, axis=axis)
    shape = [1] * seconds_TSRR.ndim
    shape[axis] = -1
    larger = np.arange(seconds_TSRR.shape[axis])[::-1].reshape(shape)
    levels = np.empty_like(seconds_TSRR)
    np.put_along_axis(levels, order, np.cumsum(ascending, axis=axis) + larger * ascending, axis=axis)
    return levels


def _shared_links(fabric: Fabric, flows: Flows, send_F: IntArray, receive_F: IntArray) -> tuple[SharedLink, ...]:
    """Every link that is not one of its flows' end ports."""
    path_FP = np.where((flows.path_FP == send_F[:, None]) | (flows.path_FP == receive_F[:, None]), NONE, flows.path_FP)
    shared = []
    for link in np.unique(path_FP[path_FP != NONE]):
        chosen = np.flatnonzero((flows.path_FP == link).any(axis=1))
        seconds_SF = flows.bytes_SF[:, chosen] / fabric.capacity_X[link]
        level_SF = _fair_levels(seconds_SF[None, :, :, None], axis=1)[0, :, :, 0]
        shared.append(SharedLink(flows=chosen, seconds_SF=seconds_SF, level_SF=level_SF))
    return tuple(shared)
