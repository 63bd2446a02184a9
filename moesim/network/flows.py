"""What a transfer has to carry, and the flows that it makes: who sends how much to whom over which links.

Legend: S routing samples in lockstep, R ranks of the group, F flows (source-target pairs), P hops, X links,
B ranks, then switches of one tier (leaves, spines).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.errors import UserError
from moesim.network.fabric import Fabric
from moesim.network.ladder import NONE
from moesim.network.parameters import Protocol

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]
Ranks = Sequence[int] | NDArray[np.integer] | None

_CHUNK = 2**18  # flows routed at a time: bounds the memory of large groups


@dataclass(frozen=True, kw_only=True, eq=False)
class Demand:
    """Bytes between the ranks of a group, [S, R, R] by source and target; `ranks_R` are ranks of the fabric.

    `avoid_nvlink` sends over NICs inside a node too. The diagonal is 0 unless own rows pass through the rank's ports.
    """

    ranks_R: NDArray[np.int64]
    bytes_SRR: FloatArray
    avoid_nvlink: bool = False

    def __add__(self, other: "Demand") -> "Demand":
        """Both at once, among the same ranks over the same kinds of link."""
        assert self.avoid_nvlink == other.avoid_nvlink and (self.ranks_R == other.ranks_R).all()
        return dataclasses.replace(self, bytes_SRR=self.bytes_SRR + other.bytes_SRR)

    def slowed(self, protocol: Protocol) -> "Demand":
        """The demand of software that reaches a share of what the links achieve: more bytes' worth of time.

        Of an exchange (`Protocol.one_way`) each rank has a share of its own, by how much it sends and receives; a pair
        has that of the end that takes longer.
        """
        if protocol.one_way is None:
            efficiency = protocol.efficiency
            return self if efficiency == 1.0 else dataclasses.replace(self, bytes_SRR=self.bytes_SRR / efficiency)
        sent_SR, received_SR = self.bytes_SRR.sum(axis=2), self.bytes_SRR.sum(axis=1)
        busier_SR = np.maximum(sent_SR, received_SR)
        busy_SR = port_bytes(busier_SR, (sent_SR + received_SR) / 2, protocol)
        slower_SR = np.divide(busy_SR, busier_SR, out=np.zeros_like(busy_SR), where=busier_SR > 0)
        leads_SRR = busy_SR[:, :, None] >= busy_SR[:, None, :]
        slower_SRR = np.where(leads_SRR, slower_SR[:, :, None], slower_SR[:, None, :])
        return dataclasses.replace(self, bytes_SRR=self.bytes_SRR * slower_SRR)


def port_bytes(busier_N: FloatArray, mean_N: FloatArray, protocol: Protocol) -> FloatArray:
    """Bytes' worth of time of a rank's port in an exchange, by its busier direction and the mean of both."""
    return np.asarray(np.maximum(busier_N / (protocol.one_way or 1.0), mean_N / protocol.efficiency))


def as_ranks(fabric: Fabric, ranks: Ranks) -> NDArray[np.int64]:
    """Ranks of the fabric as an array; None means all. Raises UserError for ranks that are not there."""
    if ranks is None:
        return np.arange(fabric.num_ranks)
    chosen = np.asarray(ranks)
    whole = chosen.dtype.kind in "iu" and chosen.ndim == 1 and len(chosen) > 0
    if not whole or chosen.min() < 0 or chosen.max() >= fabric.num_ranks:
        raise UserError(f"ranks: {ranks} are no list of ranks of the fabric; use some of 0 to {fabric.num_ranks - 1}")
    return chosen.astype(np.int64, copy=False)


def as_numbers(values: ArrayLike, what: str) -> FloatArray:
    """An array of float64. Raises UserError for what is no array of real numbers."""
    try:
        found = np.asarray(values)
    except ValueError:  # rows of unequal length
        found = np.asarray("")
    if found.dtype.kind not in "biuf":
        raise UserError(f"{what}: needs an array of real numbers")
    return found.astype(np.float64, copy=False)


def checked_bytes(num_bytes: float) -> float:
    """`num_bytes` itself. Raises UserError unless it is a finite number that is not negative."""
    if isinstance(num_bytes, str) or not 0 <= num_bytes < np.inf:
        raise UserError(f"bytes: {num_bytes!r} must be a finite number that is not negative")
    return num_bytes


def make_demand(
    fabric: Fabric, bytes_RR: FloatArray, *, ranks: Ranks, avoid_nvlink: bool = False, loopback: bool = False
) -> Demand:
    """The demand of matrices [R, R] or [S, R, R]. Own rows (the diagonal) are no traffic unless `loopback` is set.

    Raises UserError for another shape, and for bytes that are negative or not finite.
    """
    chosen = as_ranks(fabric, ranks)
    if ranks is not None and len(np.unique(chosen)) < len(chosen):
        raise UserError(f"ranks: {np.bincount(chosen).argmax()} is there twice; name each rank of the group once")
    bytes_SRR, size = as_numbers(bytes_RR, "bytes"), len(chosen)
    if bytes_SRR.ndim not in (2, 3) or bytes_SRR.shape[-2:] != (size, size) or not len(bytes_SRR):
        raise UserError(f"bytes: the shape {bytes_SRR.shape} does not fit {size} ranks; use ({size}, {size})")
    bytes_SRR = bytes_SRR.reshape(-1, size, size)
    if not (bytes_SRR.min() >= 0 and np.isfinite(bytes_SRR.sum())):
        wrong = np.argwhere(~((bytes_SRR >= 0) & np.isfinite(bytes_SRR)))
        sample, source, target = wrong[0] if len(wrong) else np.unravel_index(bytes_SRR.argmax(), bytes_SRR.shape)
        found = bytes_SRR[sample, source, target]
        raise UserError(f"bytes[{source}, {target}]: {found} must be a finite number that is not negative")
    own_rows = np.arange(len(chosen))
    if not loopback and bytes_SRR[:, own_rows, own_rows].any():
        bytes_SRR = bytes_SRR.copy()
        bytes_SRR[:, own_rows, own_rows] = 0.0
    return Demand(ranks_R=chosen, bytes_SRR=bytes_SRR, avoid_nvlink=avoid_nvlink)


@dataclass(frozen=True, kw_only=True, eq=False)
class Flows:
    """The pairs with traffic in at least one sample, in row-major order of (source, target); a pair whose bytes take
    several routes has a flow for each.

    `source_F` and `target_F` count within the group. `path_FP` holds the links that can be a bottleneck (links of the
    fabric, -1 for none, in no particular order); `latency_F` counts every link. `bytes_SF` may be 0 in some samples.
    """

    num_ranks: int
    source_F: IntArray
    target_F: IntArray
    bytes_SF: FloatArray
    path_FP: IntArray
    latency_F: FloatArray


def build_flows(fabric: Fabric, demand: Demand) -> Flows:
    """One flow for each pair with bytes, with its route."""
    source_F, target_F = (i.astype(np.int32) for i in np.nonzero((demand.bytes_SRR > 0).any(axis=0)))
    bytes_SF = demand.bytes_SRR[:, source_F, target_F]
    if fabric.multipath:
        return _spread_flows(fabric, demand.ranks_R, source_F, target_F, bytes_SF)
    path_FP, latency_F = route_pairs(fabric, demand.ranks_R, source_F, target_F, avoid_nvlink=demand.avoid_nvlink)
    return Flows(
        num_ranks=len(demand.ranks_R),
        source_F=source_F,
        target_F=target_F,
        bytes_SF=bytes_SF,
        path_FP=path_FP,
        latency_F=latency_F,
    )


def _spread_flows(
    fabric: Fabric, ranks_R: NDArray[np.int64], source_F: IntArray, target_F: IntArray, bytes_SF: FloatArray
) -> Flows:
    """One flow for every route of a pair, with its share of the bytes."""
    path_QP, flow_Q, share_Q = fabric.split_routes(ranks_R[source_F], ranks_R[target_F])
    binding_X = np.append(np.where(fabric.redundant_X, NONE, np.arange(len(fabric.links))), NONE).astype(np.int32)
    return Flows(
        num_ranks=len(ranks_R),
        source_F=source_F[flow_Q],
        target_F=target_F[flow_Q],
        bytes_SF=bytes_SF[:, flow_Q] * share_Q,
        path_FP=_packed(binding_X[path_QP]),
        latency_F=fabric.path_latency(path_QP),
    )


def route_pairs(
    fabric: Fabric,
    ranks_R: NDArray[np.int64],
    source_F: NDArray[np.integer],
    target_F: NDArray[np.integer],
    *,
    avoid_nvlink: bool,
) -> tuple[IntArray, FloatArray]:
    """Links that can be a bottleneck [F, P] and latency of the whole route [F], for pairs of the group."""
    binding_X = np.append(np.where(fabric.redundant_X, NONE, np.arange(len(fabric.links))), NONE).astype(np.int32)
    latency_F = np.empty(len(source_F))
    paths: list[IntArray] = []
    for first in range(0, len(source_F), _CHUNK):
        part = slice(first, first + _CHUNK)
        whole_FP = fabric.routes(ranks_R[source_F[part]], ranks_R[target_F[part]], avoid_nvlink=avoid_nvlink)
        latency_F[part] = fabric.path_latency(whole_FP)
        paths.append(_packed(binding_X[whole_FP]))
    width = max((path.shape[1] for path in paths), default=0)
    path_FP = np.full((len(source_F), width), NONE, dtype=np.int32)
    for index, path in enumerate(paths):
        path_FP[index * _CHUNK : index * _CHUNK + len(path), : path.shape[1]] = path
    return path_FP, latency_F


def _packed(path_FP: IntArray) -> IntArray:
    """The same links in as few columns as their gaps allow: columns that are never used together become one."""
    columns: list[IntArray] = []
    for hop in range(path_FP.shape[1]):
        link_F = path_FP[:, hop]
        used_F = link_F != NONE
        if not used_F.any():
            continue
        for column in columns:
            if not (used_F & (column != NONE)).any():
                np.copyto(column, link_F, where=used_F)
                break
        else:
            columns.append(link_F.copy())
    return np.stack(columns, axis=1) if columns else path_FP[:, :0]


def link_bytes(fabric: Fabric, flows: Flows) -> FloatArray:
    """Bytes over each link that can be a bottleneck, mean of the samples, float64 [X]."""
    bytes_F = flows.bytes_SF.mean(axis=0)
    totals_X = np.zeros(len(fabric.links) + 1)
    for hop in range(flows.path_FP.shape[1]):
        totals_X += np.bincount(flows.path_FP[:, hop] + 1, weights=bytes_F, minlength=len(totals_X))
    return np.asarray(totals_X[1:])


def ladder_link_bytes(fabric: Fabric, demand: Demand) -> FloatArray | None:
    """The same of a whole demand, from sums over its matrix without a route of each pair; None where routes leave the
    ladder or forward inside nodes.

    Rows and columns of the matrix are the ports' loads; its sums over leaves and over spines those of the tiers above.
    """
    ladder, ranks_R = fabric.ladder, demand.ranks_R
    if ladder is None or ladder.any_failed or fabric.pxn or demand.avoid_nvlink:
        return None
    if (ladder.plane_R[ranks_R] != ladder.plane_R[ranks_R[0]]).any():
        return None
    far_RR = demand.bytes_SRR[0].copy() if len(demand.bytes_SRR) == 1 else demand.bytes_SRR.mean(axis=0)
    loads_X = np.zeros(len(fabric.links) + 1)  # the last entry takes what has no link
    domain_R = ladder.domain_R[ranks_R]
    by_domain_R = np.argsort(domain_R, kind="stable")
    for members in np.split(by_domain_R, np.flatnonzero(np.diff(domain_R[by_domain_R])) + 1):
        block = np.ix_(members, members)
        near = far_RR[block]
        np.add.at(loads_X, ladder.nvlink_up_R[ranks_R[members]], near.sum(axis=1))
        np.add.at(loads_X, ladder.nvlink_down_R[ranks_R[members]], near.sum(axis=0))
        far_RR[block] = 0.0
    redundant_X = np.append(fabric.redundant_X, True)  # index -1: no link
    sent_R, received_R = far_RR.sum(axis=1), far_RR.sum(axis=0)
    for hop in range(2):
        np.add.at(loads_X, ladder.nic_up_R2[ranks_R, hop], sent_R)
        np.add.at(loads_X, ladder.nic_down_R2[ranks_R, hop], received_R)
    tiers = (
        (ladder.leaf_R, ladder.leaf_up_R, ladder.leaf_down_R),
        (ladder.spine_R, ladder.spine_up_R, ladder.spine_down_R),
    )
    between_BB, first_B = far_RR, ranks_R  # a rank of each switch, and the bytes from switch to switch
    for of_R, up_R, down_R in tiers:
        _, first, switch = np.unique(of_R[first_B], return_index=True, return_inverse=True)
        if len(first) == 1 or all(redundant_X[links[ranks_R]].all() for _, *above in tiers for links in above):
            break
        below = [np.flatnonzero(switch == number) for number in range(len(first))]
        rows = np.stack([between_BB[own].sum(axis=0) for own in below])
        between_BB = np.stack([rows[:, own].sum(axis=1) for own in below], axis=1)
        first_B = first_B[first]
        if not (redundant_X[up_R[ranks_R]].all() and redundant_X[down_R[ranks_R]].all()):
            crossing_BB = between_BB * (1 - np.eye(len(first)))
            np.add.at(loads_X, up_R[first_B], crossing_BB.sum(axis=1))
            np.add.at(loads_X, down_R[first_B], crossing_BB.sum(axis=0))
    return np.where(fabric.redundant_X, 0.0, loads_X[:-1])
