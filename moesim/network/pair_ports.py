"""The ports that each pair of ranks goes through, and the links that several ranks share.

Legend: S routing samples, R ranks, F flows, P hops, X links.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.network.fabric import Fabric
from moesim.network.flows import Demand, route_pairs
from moesim.network.ladder import NONE, Ladder

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.integer]


class PairsOfLink(NamedTuple):
    """A link that is not an end port of its pairs, and those pairs."""

    capacity: float
    source_F: IntArray
    target_F: IntArray


@dataclass(frozen=True, kw_only=True, eq=False)
class PairPorts:
    """For every pair of a group: which port (0, 1, ... of its owner) it uses at either end; seconds per byte there."""

    send_slot_RR: IntArray
    receive_slot_RR: IntArray
    send_pace_RR: FloatArray
    receive_pace_RR: FloatArray
    latency_RR: FloatArray
    shared: tuple[PairsOfLink, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedLink:
    """A link with flows of several sources and several targets."""

    source_F: IntArray
    target_F: IntArray
    seconds_SF: FloatArray  # alone on the link
    level_SF: FloatArray  # seconds after release by which fair sharing ends the flow

    def part(self, samples: slice) -> "SharedLink":
        """The flows in some of the samples."""
        return replace(self, seconds_SF=self.seconds_SF[samples], level_SF=self.level_SF[samples])


def shared_links(links: tuple[PairsOfLink, ...], demand: Demand) -> tuple[SharedLink, ...]:
    """The links between the end ports that this demand uses."""
    shared = []
    for link in links:
        seconds_SF = demand.bytes_SRR[:, link.source_F, link.target_F] / link.capacity
        used_F = (seconds_SF > 0).any(axis=0)
        if not used_F.any():
            continue
        seconds_SF = seconds_SF[:, used_F]
        ascending_SF = np.sort(seconds_SF, axis=1)
        levels_SF = np.cumsum(ascending_SF, axis=1) + np.arange(used_F.sum())[::-1] * ascending_SF
        samples = zip(seconds_SF, ascending_SF, levels_SF, strict=True)
        shared.append(
            SharedLink(
                source_F=link.source_F[used_F],
                target_F=link.target_F[used_F],
                seconds_SF=seconds_SF,
                level_SF=np.stack([np.interp(*sample) for sample in samples]),
            )
        )
    return tuple(shared)


def pair_ports(fabric: Fabric, demand: Demand) -> PairPorts:
    """The ports of all pairs of a group; kept with the fabric, for a group sends many matrices.

    Custom and damaged fabrics may lack routes that nobody needs: there only pairs with bytes are routed, each time.
    """
    ranks_R = demand.ranks_R
    if fabric.ladder is None or fabric.ladder.any_failed:
        active_F = np.nonzero((demand.bytes_SRR > 0).any(axis=0))
        return _sorted_ports(fabric, ranks_R, *active_F, avoid_nvlink=demand.avoid_nvlink)
    key = (ranks_R.tobytes(), demand.avoid_nvlink)
    ports = fabric.pair_ports.get(key) or _plain_ports(fabric, fabric.ladder, demand)
    if ports is None:
        every_F = np.nonzero(np.ones((len(ranks_R),) * 2, dtype=bool))
        ports = _sorted_ports(fabric, ranks_R, *every_F, avoid_nvlink=demand.avoid_nvlink)
    assert isinstance(ports, PairPorts)
    fabric.pair_ports[key] = ports
    return ports


def _plain_ports(fabric: Fabric, ladder: Ladder, demand: Demand) -> PairPorts | None:
    """Straight from the ladder where only NVLink and NIC ports can bind; None where more than those can."""
    ranks_R, avoid_nvlink = demand.ranks_R, demand.avoid_nvlink
    if fabric.pxn or ladder.shares_nics or (ladder.plane_R[ranks_R] != ladder.plane_R[ranks_R[0]]).any():
        return None
    if not fabric.upper_links_are_redundant:
        return None
    capacity = np.append(fabric.capacity_X, np.inf)
    latency = np.append(fabric.latency_X, 0.0)
    has_nics = bool((ladder.nic_up_R2[ranks_R] != NONE).any())
    domain_R, leaf_R, spine_R = ladder.domain_R[ranks_R], ladder.leaf_R[ranks_R], ladder.spine_R[ranks_R]
    near_RR = domain_R[:, None] == domain_R if not (avoid_nvlink and has_nics) else np.zeros((len(ranks_R),) * 2, bool)
    slot_RR = np.where(near_RR, 0, 1 if near_RR.any() else 0).astype(np.int32)

    def outer(up_R: FloatArray, down_R: FloatArray) -> FloatArray:
        return np.asarray(up_R[:, None] + down_R)

    # Of these ranks alone: a large fabric has a hundred thousand links, and a step hundreds of groups.
    nic_up_R2, nic_down_R2 = ladder.nic_up_R2[ranks_R], ladder.nic_down_R2[ranks_R]
    near_latency = outer(latency[ladder.nvlink_up_R[ranks_R]], latency[ladder.nvlink_down_R[ranks_R]])
    far_latency = outer(latency[nic_up_R2].sum(axis=1), latency[nic_down_R2].sum(axis=1))
    leaf_latency = outer(latency[ladder.leaf_up_R[ranks_R]], latency[ladder.leaf_down_R[ranks_R]])
    spine_latency = outer(latency[ladder.spine_up_R[ranks_R]], latency[ladder.spine_down_R[ranks_R]])
    far_latency += np.where(leaf_R[:, None] != leaf_R, leaf_latency, 0.0)
    far_latency += np.where(spine_R[:, None] != spine_R, spine_latency, 0.0)
    nic_up_R, nic_down_R = (capacity[ids_R2].min(axis=1) for ids_R2 in (nic_up_R2, nic_down_R2))
    nvlink_up_R, nvlink_down_R = (capacity[ids_R[ranks_R]] for ids_R in (ladder.nvlink_up_R, ladder.nvlink_down_R))
    return PairPorts(
        send_slot_RR=slot_RR,
        receive_slot_RR=slot_RR,
        send_pace_RR=np.where(near_RR, 1 / nvlink_up_R[:, None], 1 / nic_up_R[:, None]),
        receive_pace_RR=np.where(near_RR, 1 / nvlink_down_R, 1 / nic_down_R),
        latency_RR=np.where(near_RR, near_latency, far_latency),
        shared=(),
    )


def _sorted_ports(
    fabric: Fabric, ranks_R: NDArray[np.int64], source_F: IntArray, target_F: IntArray, *, avoid_nvlink: bool
) -> PairPorts:
    """Sort out the links of the pairs: a port that only its source uses, one that only its target uses, the others."""
    num_ranks = len(ranks_R)
    path_FP, latency_F = route_pairs(fabric, ranks_R, source_F, target_F, avoid_nvlink=avoid_nvlink)
    of_source_X, of_target_X = (_used_by_one(path_FP, owner_F, len(fabric.links)) for owner_F in (source_F, target_F))
    send_F = np.full(len(source_F), NONE, dtype=np.int32)
    receive_F = send_F.copy()
    for link_F in path_FP.T:
        np.copyto(send_F, link_F, where=of_source_X[link_F] & (send_F == NONE))
    for link_F in path_FP.T:
        np.copyto(receive_F, link_F, where=of_target_X[link_F] & (link_F != send_F))

    def dense(values_F: NDArray[Any]) -> NDArray[Any]:
        matrix_RR = np.zeros((num_ranks, num_ranks), dtype=values_F.dtype)
        matrix_RR[source_F, target_F] = values_F
        return matrix_RR

    pace = np.append(1 / fabric.capacity_X, 0.0)  # index -1: no port, no time
    between_FP = np.where((path_FP == send_F[:, None]) | (path_FP == receive_F[:, None]), NONE, path_FP)
    shared = []
    for link in np.unique(between_FP[between_FP != NONE]):
        on_F = (path_FP == link).any(axis=1)
        shared.append(PairsOfLink(float(fabric.capacity_X[link]), source_F[on_F], target_F[on_F]))
    return PairPorts(
        send_slot_RR=dense(_slots(send_F, source_F)),
        receive_slot_RR=dense(_slots(receive_F, target_F)),
        send_pace_RR=dense(pace[send_F]),
        receive_pace_RR=dense(pace[receive_F]),
        latency_RR=dense(latency_F),
        shared=tuple(shared),
    )


def _used_by_one(path_FP: IntArray, owner_F: IntArray, num_links: int) -> NDArray[np.bool_]:
    """Whether all flows of each link have the same owner; False for "no link" (-1, the last entry)."""
    any_owner_X = np.zeros(num_links + 1, dtype=np.int32)
    for link_F in path_FP.T:
        any_owner_X[link_F] = owner_F
    alike_X = np.ones(num_links + 1, dtype=bool)
    for link_F in path_FP.T:
        alike_X[link_F[any_owner_X[link_F] != owner_F]] = False
    alike_X[NONE] = False
    return alike_X


def _slots(port_F: IntArray, owner_F: IntArray) -> IntArray:
    """Number each owner's ports 0, 1, ...; the number of each flow's port."""
    owner_of_port_X = np.full(int(port_F.max(initial=NONE)) + 2, NONE, dtype=np.int64)
    owner_of_port_X[port_F] = owner_F
    owner_of_port_X[NONE] = NONE
    ports = np.flatnonzero(owner_of_port_X != NONE)
    ports = ports[np.argsort(owner_of_port_X[ports], kind="stable")]
    owners = owner_of_port_X[ports]
    slot_of_port_X = np.zeros(len(owner_of_port_X), dtype=np.int32)
    slot_of_port_X[ports] = np.arange(len(ports)) - np.searchsorted(owners, owners)
    return slot_of_port_X[port_F]
