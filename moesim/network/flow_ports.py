"""The flows of a group and the ports that each of them passes, laid out for the closed form of `ports`.

A group sends many matrices over the same pairs; what does not depend on the bytes is kept with the fabric.

Legend: S matrices, R ranks, F flows, P ports of one side, T ports of one table, W flows of a port (padded).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.network.fabric import Fabric
from moesim.network.flows import Demand
from moesim.network.pair_ports import PairsOfLink, pair_ports

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.integer]


class PortTable(NamedTuple):
    """Ports of different owners and their flows; `flow_TW` is F where a port has fewer, `peer_TW` the other end."""

    port_T: IntArray
    flow_TW: IntArray
    peer_TW: IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """The receiving or the sending ports: that of each flow, each one's rank, and seconds per byte there."""

    port_F: NDArray[np.int32]
    owner_P: NDArray[np.int32]
    pace_F: FloatArray
    tables: tuple[PortTable, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class FlowPorts:
    """Flows in row-major order of (source, target). Those of source r are `first_of_source_R[r] : [r + 1]`;
    `by_target_F` lists them by target, `first_of_target_R` likewise."""

    num_ranks: int
    source_F: NDArray[np.int32]
    target_F: NDArray[np.int32]
    latency_F: FloatArray
    receive: Side
    send: Side
    first_of_source_R: NDArray[np.int64]
    first_of_target_R: NDArray[np.int64]
    by_target_F: NDArray[np.int32]
    shared: tuple[PairsOfLink, ...]

    @cached_property
    def ends_F4(self) -> NDArray[np.int32]:
        """Source, target, receiving port and sending port of each flow; ports count on from side to side."""
        send_F = self.send.port_F + np.int32(len(self.receive.owner_P))
        return np.stack([self.source_F, self.target_F, self.receive.port_F, send_F], axis=1)

    @cached_property
    def owner_P(self) -> NDArray[np.int32]:
        """The ranks of the receiving and then of the sending ports."""
        return np.concatenate([self.receive.owner_P, self.send.owner_P])


def flow_ports(fabric: Fabric, demand: Demand) -> FlowPorts:
    """The flows of the pairs that have bytes in at least one of the matrices."""
    active_RR: NDArray[np.bool_] = np.any(demand.bytes_SRR > 0, axis=0)
    key = (demand.ranks_R.tobytes(), demand.avoid_nvlink, np.packbits(active_RR).tobytes())
    found = fabric.flow_ports.get(key)
    if found is None:
        found = fabric.flow_ports[key] = _lay_out(fabric, demand, active_RR)
    assert isinstance(found, FlowPorts)
    return found


def _lay_out(fabric: Fabric, demand: Demand, active_RR: NDArray[np.bool_]) -> FlowPorts:
    ports = pair_ports(fabric, demand)
    source_F, target_F = (ends.astype(np.int32) for ends in np.nonzero(active_RR))
    ranks = np.arange(len(demand.ranks_R) + 1)
    by_target_F = np.argsort(target_F, kind="stable").astype(np.int32)
    pairs = source_F, target_F
    return FlowPorts(
        num_ranks=len(demand.ranks_R),
        source_F=source_F,
        target_F=target_F,
        latency_F=ports.latency_RR[pairs],
        receive=_side(ports.receive_slot_RR[pairs], target_F, source_F, ports.receive_pace_RR[pairs]),
        send=_side(ports.send_slot_RR[pairs], source_F, target_F, ports.send_pace_RR[pairs]),
        first_of_source_R=np.searchsorted(source_F, ranks),
        first_of_target_R=np.searchsorted(target_F[by_target_F], ranks),
        by_target_F=by_target_F,
        shared=ports.shared,
    )


def _side(slot_F: IntArray, owner_F: IntArray, peer_F: IntArray, pace_F: FloatArray) -> Side:
    """Number the ports by (slot, owner): those of one slot make a table."""
    num_owners = int(owner_F.max(initial=0)) + 1
    ids_P, port_F = np.unique(slot_F.astype(np.int64) * num_owners + owner_F, return_inverse=True)
    slot_P = ids_P // num_owners
    by_port_F = np.argsort(port_F, kind="stable")
    count_P = np.bincount(port_F, minlength=len(ids_P))
    first_P = np.cumsum(count_P) - count_P
    padded_F = np.append(by_port_F, len(port_F))
    peer_of_flow_F = np.append(peer_F, 0)
    tables = []
    for slot in np.unique(slot_P):
        port_T = np.flatnonzero(slot_P == slot)
        place_W = np.arange(int(count_P[port_T].max()))
        place_TW = np.where(place_W < count_P[port_T, None], first_P[port_T, None] + place_W, len(port_F))
        flow_TW = padded_F[place_TW]
        tables.append(PortTable(port_T, flow_TW, peer_of_flow_F[flow_TW]))
    return Side(
        port_F=port_F.astype(np.int32),
        owner_P=(ids_P % num_owners).astype(np.int32),
        pace_F=pace_F,
        tables=tuple(tables),
    )
