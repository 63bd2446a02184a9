"""What the transfers of a step do to the ports of single ranks, which all traffic of a rank shares.

Transfers on a token's way go one behind the other and first. p2p sends, collectives on gradients and parameters and
those of ZeRO 2 and 3 can be open beside them, and pass a port in what these leave of it (`moesim.engine.ports_in_use`).

Legend: S routing samples, K ports of a rank, R ranks of a group, X links.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import BesideSend
from moesim.network import Fabric, PreparedTransfer, RankPorts, ring_seconds, ring_shares
from moesim.network.contention import path_rates
from moesim.program.changes import ChangingTransfer
from moesim.program.group_collectives import PeerCollective, SideBySide
from moesim.program.operations import Kind, Transfer
from moesim.program.reductions import Reduction
from moesim.program.step_program import Crossing, GroupProgram, SharedPorts

FloatArray = NDArray[np.float64]


def shared_ports(
    fabric: Fabric,
    groups: Sequence[GroupProgram],
    collectives: Sequence[Reduction],
    *,
    sends: Mapping[str, BesideSend],
    compiled: bool = False,
) -> SharedPorts | None:
    """The ports of all groups; None where nothing is ever open beside a transfer. `sends`: see `SharedPorts`.

    `compiled`: sums are worked out by compiled loops.
    """
    of_group = {group.place: RankPorts(fabric, group.ranks_R, compiled=compiled) for group in groups}
    crossings = {}
    for group in groups:
        sent = {sent.p2p.target: sent.num_bytes for task in group.tasks for sent in task.sends}
        for target, num_bytes in sent.items():
            if num_bytes and target != group.pipeline_rank:
                there = of_group[target, group.number]
                crossings[group.place, target] = _crossing(fabric, of_group[group.place], there, num_bytes)
    beside = any(collective.buckets for collective in collectives)
    if not crossings and not beside and not any(_has_collectives(group) for group in groups):
        return None
    shares_CX = tuple(ring_shares(fabric, collective.members) for collective in collectives)
    return SharedPorts(of_group=of_group, crossings=crossings, shares_CX=shares_CX, sends=sends)


def _has_collectives(group: GroupProgram) -> bool:
    blocks = dict.fromkeys(run.block for task in group.tasks for run in task.runs)
    return any(operation.kind is Kind.COLLECTIVE for block in blocks for operation in block.operations)


def _crossing(fabric: Fabric, here: RankPorts, there: RankPorts, num_bytes: float) -> Crossing:
    """One message from every rank of a group to the same of another."""
    bytes_R = np.full(len(here.ranks_R), num_bytes)
    work_R = bytes_R / path_rates(fabric, here.ranks_R, there.ranks_R)
    sends_KR, receives_KR = (
        ports.seconds(here.ranks_R, there.ranks_R, bytes_R[None])[0] / work_R for ports in (here, there)
    )
    return Crossing(work_R, sends_KR, receives_KR)


def port_seconds(transfer: Transfer, ports: RankPorts) -> FloatArray:
    """How long a transfer among the ranks of a group keeps each of their ports busy, [S, K, R] (S: 1 if all alike)."""
    return _port_seconds(transfer, ports, ports.ranks_R)


def each_port_seconds(transfers_M: Sequence[Transfer], ports: RankPorts) -> Sequence[FloatArray]:
    """The same of several transfers; in one go of those that were prepared together."""
    first = transfers_M[0]
    if isinstance(first, PreparedTransfer):
        parts = [transfer for transfer in transfers_M if isinstance(transfer, PreparedTransfer)]
        found = first.port_seconds_of_parts(parts, ports, ports.ranks_R)
        if found is not None and len(parts) == len(transfers_M):
            return list(found)
    return [port_seconds(transfer, ports) for transfer in transfers_M]


def _port_seconds(transfer: Transfer, ports: RankPorts, ranks_R: NDArray[np.integer]) -> FloatArray:
    if isinstance(transfer, ChangingTransfer):
        return _port_seconds(transfer.states[0], ports, ranks_R)
    if isinstance(transfer, SideBySide):
        parts = zip(transfer.parts, transfer.places, strict=True)
        return np.asarray(sum(_port_seconds(part, ports, ranks_R[places]) for part, places in parts))
    if isinstance(transfer, PeerCollective):
        return ports.of_links(_ring_seconds(transfer, ports.fabric, ranks_R))[None]
    assert isinstance(transfer, PreparedTransfer), transfer
    return transfer.port_seconds(ports, ranks_R)


def port_shares(collective: PeerCollective, ports: RankPorts) -> FloatArray:
    """What of each port [K, R] the rings of a collective take while their slowest link is full."""
    sets = collective.peers.places(len(ports.ranks_R))
    return ports.of_links(ring_shares(ports.fabric, [ports.ranks_R[places] for places in sets]))


def _ring_seconds(collective: PeerCollective, fabric: Fabric, ranks_R: NDArray[np.integer]) -> FloatArray:
    """Every rank sends `sent_bytes` to the next of its ring, and of a hop it is one message."""
    sets = [ranks_R[places] for places in collective.peers.places(len(ranks_R))]
    return ring_seconds(fabric, sets, collective.sent_bytes)
