"""The ports of each rank that an all-to-all goes through, and the links that several ranks share.

Legend: S routing samples, R ranks, F flows, P hops, X links.
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

    source_F: IntArray
    target_F: IntArray
    seconds_SF: FloatArray  # alone on the link
    level_SF: FloatArray  # seconds after release by which fair sharing ends the flow


@dataclass(frozen=True, kw_only=True, eq=False)
class EndPorts:
    """Pairs by source and target: which port (0, 1, ... of its owner) they use at either end, and seconds alone there.

    `latency_SRR` is -inf where a pair has no traffic.
    """

    send_slot_RR: IntArray
    receive_slot_RR: IntArray
    send_seconds_SRR: FloatArray
    receive_seconds_SRR: FloatArray
    latency_SRR: FloatArray
    shared: tuple[SharedLink, ...]


def end_ports(fabric: Fabric, flows: Flows) -> EndPorts:
    """Sort out each flow's links: the first only its source uses, the last only its target uses, the others."""
    send_F, receive_F = _private_links(flows)
    capacity = np.append(fabric.capacity_X, np.inf)  # index -1: no port, no time
    shape = (len(flows.bytes_SF), flows.num_ranks, flows.num_ranks)

    def dense(values: FloatArray, fill: float) -> FloatArray:
        matrix_SRR = np.full(shape, fill)
        matrix_SRR[:, flows.source_F, flows.target_F] = values
        return matrix_SRR

    return EndPorts(
        send_slot_RR=_slots(flows, send_F, flows.source_F),
        receive_slot_RR=_slots(flows, receive_F, flows.target_F),
        send_seconds_SRR=dense(flows.bytes_SF / capacity[send_F], 0.0),
        receive_seconds_SRR=dense(flows.bytes_SF / capacity[receive_F], 0.0),
        latency_SRR=dense(np.where(flows.bytes_SF > 0, flows.latency_F, -np.inf), -np.inf),
        shared=_shared_links(fabric, flows, send_F, receive_F),
    )


def _private_links(flows: Flows) -> tuple[IntArray, IntArray]:
    """Sending and receiving port of each flow, -1 where it has none."""
    num_links = int(flows.path_FP.max(initial=NONE)) + 1
    of_source_X = _used_by_one(flows.path_FP, flows.source_F, num_links)
    of_target_X = _used_by_one(flows.path_FP, flows.target_F, num_links)
    send_F = np.full(len(flows.source_F), NONE, dtype=np.int32)
    receive_F = send_F.copy()
    for hop in range(flows.path_FP.shape[1]):
        link_F = flows.path_FP[:, hop]
        np.copyto(send_F, link_F, where=of_source_X[link_F] & (send_F == NONE))
    for hop in range(flows.path_FP.shape[1]):
        link_F = flows.path_FP[:, hop]
        np.copyto(receive_F, link_F, where=of_target_X[link_F] & (link_F != send_F))
    return send_F, receive_F


def _used_by_one(path_FP: IntArray, owner_F: IntArray, num_links: int) -> NDArray[np.bool_]:
    """Whether all flows of each link have the same owner; False for "no link" (-1, the last entry)."""
    any_owner_X = np.zeros(num_links + 1, dtype=np.int32)
    for hop in range(path_FP.shape[1]):
        any_owner_X[path_FP[:, hop]] = owner_F
    alike_X = np.ones(num_links + 1, dtype=bool)
    for hop in range(path_FP.shape[1]):
        alike_X[path_FP[any_owner_X[path_FP[:, hop]] != owner_F, hop]] = False
    alike_X[NONE] = False
    return alike_X


def _slots(flows: Flows, port_F: IntArray, owner_F: IntArray) -> IntArray:
    """Number each owner's ports 0, 1, ...; the number of each pair's port [R, R]."""
    owner_of_port_X = np.full(int(port_F.max(initial=NONE)) + 2, NONE, dtype=np.int64)
    owner_of_port_X[port_F] = owner_F
    owner_of_port_X[NONE] = NONE
    ports = np.flatnonzero(owner_of_port_X != NONE)
    ports = ports[np.argsort(owner_of_port_X[ports], kind="stable")]
    owners = owner_of_port_X[ports]
    slot_of_port_X = np.zeros(len(owner_of_port_X), dtype=np.int32)
    slot_of_port_X[ports] = np.arange(len(ports)) - np.searchsorted(owners, owners)
    slot_RR = np.zeros((flows.num_ranks, flows.num_ranks), dtype=np.int32)
    slot_RR[flows.source_F, flows.target_F] = slot_of_port_X[port_F]
    return slot_RR


def _shared_links(fabric: Fabric, flows: Flows, send_F: IntArray, receive_F: IntArray) -> tuple[SharedLink, ...]:
    """Every link that is not one of its flows' end ports."""
    path_FP = np.where((flows.path_FP == send_F[:, None]) | (flows.path_FP == receive_F[:, None]), NONE, flows.path_FP)
    shared = []
    for link in np.unique(path_FP[path_FP != NONE]):
        chosen = np.flatnonzero((flows.path_FP == link).any(axis=1))
        seconds_SF = flows.bytes_SF[:, chosen] / fabric.capacity_X[link]
        ascending_SF = np.sort(seconds_SF, axis=1)
        levels_SF = np.cumsum(ascending_SF, axis=1) + np.arange(len(chosen))[::-1] * ascending_SF
        samples = zip(seconds_SF, ascending_SF, levels_SF, strict=True)
        level_SF = np.stack([np.interp(*sample) for sample in samples])
        shared.append(
            SharedLink(
                source_F=flows.source_F[chosen],
                target_F=flows.target_F[chosen],
                seconds_SF=seconds_SF,
                level_SF=level_SF,
            )
        )
    return tuple(shared)
