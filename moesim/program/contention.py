"""What transfers of a step share: links that they can fill together, with what each puts there, and ranks' ports.

Links: only those above the ports of single GPUs count (leaves, spines, links of custom fabrics), and of these only
those whose users' largest demands add up to more than the link carries: transfers over them share these. All others
cannot slow each other and are simulated without. Dispatches and combines, p2p sends between stages and the collectives
at the end of the step take part; collectives inside layers do not.

Ports are shared by all traffic of a rank. Transfers on a token's way go one behind the other and first. p2p sends,
collectives on gradients and parameters and those of ZeRO 2 and 3 can be open beside them, and pass a port in what these
leave of it (`moesim.engine.ports_in_use`).

Legend: S routing samples, R ranks of a group, C common links of the fabric, L overloaded ones of them, X links,
K ports of a rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import BesideSend
from moesim.network import Fabric, PreparedTransfer, RankPorts, ring_seconds, ring_shares
from moesim.network.collectives import ring_use
from moesim.network.contention import TOLERANCE, LinkUse, common_use, path_rates
from moesim.program.changes import ChangingTransfer
from moesim.program.collectives import PeerCollective, Reduction, SideBySide
from moesim.program.operations import Block, Kind, Operation, Transfer
from moesim.program.step_program import Contention, Crossing, GroupProgram, Place, SharedPart, SharedPorts, StepProgram

FloatArray = NDArray[np.float64]
Parts = tuple[SharedPart, ...]
TINY = 1e-30  # seconds


def find_contention(
    fabric: Fabric, groups: Sequence[GroupProgram], collectives: Sequence[Reduction]
) -> Contention | None:
    """The contention among these groups; None where no link can be overloaded."""
    if not len(fabric.common_links_X):
        return None
    transfers = {group.place: _transfer_uses(group) for group in groups}
    p2ps = _p2p_uses(fabric, groups)
    rings = [ring_use(fabric, collective.members, collective.seconds) for collective in collectives]
    capacity_C = fabric.capacity_X[fabric.common_links_X]
    over_C = _overloaded(capacity_C, groups, transfers, p2ps, list(zip(collectives, rings, strict=True)))
    if not over_C.any():
        return None
    chosen = {
        place: {transfer: _on(over_C, parts) for transfer, parts in of_group.items()}
        for place, of_group in transfers.items()
    }
    return Contention(
        capacity_L=capacity_C[over_C],
        transfers={
            place: {transfer: parts for transfer, parts in of_group.items() if parts}
            for place, of_group in chosen.items()
            if any(of_group.values())
        },
        p2ps={key: use for key, (_, whole) in p2ps.items() if (use := whole.on(over_C))},
        collectives=tuple(use.on(over_C) for use in rings),
    )


def _overloaded(
    capacity_C: FloatArray,
    groups: Sequence[GroupProgram],
    transfers: Mapping[Place, Mapping[Transfer, Parts]],
    p2ps: Mapping[tuple[Place, int], tuple[float, LinkUse]],
    collectives: Sequence[tuple[Reduction, LinkUse]],
) -> NDArray[np.bool_]:
    """Whether the largest demands of all users of each common link add up to more than it carries."""
    none_C = np.zeros(capacity_C.shape)
    most: dict[Place, FloatArray] = {}
    for place, uses in transfers.items():
        demands = [
            sum((np.minimum(_demand(part.use, _length(part.transfer)), capacity_C) for part in parts), start=none_C)
            for parts in uses.values()
        ]
        most[place] = np.max([none_C, *demands], axis=0)
    for (place, _), (seconds, use) in p2ps.items():
        most[place] = most[place] + _demand(use, np.array([seconds]))
    total_C = sum(most.values(), start=none_C)
    for collective, use in collectives:
        # Groups that attend it with no task left do nothing else meanwhile: it can only meet the others.
        others = [
            most[group.place]
            for group in groups
            if not collective.ranks & set(group.ranks_R.tolist())
            or group.begins_behind(collective) < len(group.tasks) - 1
        ]
        total_C = total_C + _demand(use, np.array([collective.seconds])) * (sum(others, start=none_C) > 0)
    return np.asarray(total_C > capacity_C * (1 + TOLERANCE))


def _demand(use: LinkUse, seconds_S: FloatArray) -> FloatArray:
    """Bytes/s while alone on each link, in the sample with the most."""
    return np.asarray((use.bytes_SX / np.maximum(seconds_S, TINY)[:, None]).max(axis=0))


def _length(transfer: PreparedTransfer) -> FloatArray:
    """Seconds that its bytes take alone, [S]."""
    return np.asarray(transfer.window(np.zeros_like(transfer.alone_R)).work_SR.max(axis=1))


def _transfer_uses(group: GroupProgram) -> dict[Transfer, Parts]:
    """What every transfer of the group puts on the common links."""
    blocks = dict.fromkeys(run.block for task in group.tasks for run in task.runs)
    transfers = dict.fromkeys(t for block in blocks for operation in block.operations for t in operation.transfers_M)
    places_R = np.arange(len(group.ranks_R))
    return {transfer: tuple(_parts(transfer, places_R, group.ranks_R)) for transfer in transfers}


def _parts(transfer: Transfer, places_R: NDArray[np.integer], ranks_R: NDArray[np.integer]) -> Iterator[SharedPart]:
    if isinstance(transfer, SideBySide):
        for part, members in zip(transfer.parts, transfer.places, strict=True):
            yield from _parts(part, places_R[members], ranks_R)
    elif isinstance(transfer, PreparedTransfer):
        yield SharedPart(places_R, transfer, transfer.common_use(ranks_R[places_R]))


def _on(over_C: NDArray[np.bool_], parts: Parts) -> Parts:
    """Those that use overloaded links, and what of these."""
    return tuple(part._replace(use=use) for part in parts if (use := part.use.on(over_C)))


def _p2p_uses(fabric: Fabric, groups: Sequence[GroupProgram]) -> dict[tuple[Place, int], tuple[float, LinkUse]]:
    """Seconds and use of each group's p2p sends to another pipeline rank: one message from every rank."""
    ranks_of = {group.place: group.ranks_R for group in groups}
    efficiency = fabric.parameters.point_to_point.efficiency
    uses = {}
    for group in groups:
        sent = {sent.p2p.target: sent.seconds for task in group.tasks for sent in task.sends}
        for target, seconds in sent.items():
            if target != group.pipeline_rank:
                there_R = ranks_of[target, group.number]
                bytes_R = seconds * efficiency * path_rates(fabric, group.ranks_R, there_R)
                uses[group.place, target] = seconds, common_use(fabric, group.ranks_R, there_R, bytes_R[None])
    return uses


def samples_of(program: StepProgram) -> Iterator[StepProgram]:
    """The program in one routing sample after the other: with contention each has an order of events of its own."""
    whole = program.contention
    assert whole is not None
    kept: dict[PreparedTransfer, tuple[PreparedTransfer, ...]] = {}
    for sample in range(program.samples):
        cut = _Cut(sample, program.samples, kept)
        groups = tuple(cut.group(group) for group in program.groups)
        transfers = {
            place: {cut.transfer(transfer): tuple(map(cut.part, parts)) for transfer, parts in of_group.items()}
            for place, of_group in whole.transfers.items()
        }
        yield replace(program, groups=groups, samples=1, contention=replace(whole, transfers=transfers))


class _Cut:
    """One of the samples of what a program is made of; `kept` holds transfers in all their samples."""

    def __init__(self, sample: int, samples: int, kept: dict[PreparedTransfer, tuple[PreparedTransfer, ...]]) -> None:
        self._one, self._samples, self._kept = slice(sample, sample + 1), samples, kept
        self._blocks: dict[Block, Block] = {}
        self._joined: dict[SideBySide, SideBySide] = {}

    def group(self, group: GroupProgram) -> GroupProgram:
        tasks = tuple(
            replace(task, runs=tuple(run._replace(block=self._block(run.block)) for run in task.runs))
            for task in group.tasks
        )
        return replace(group, tasks=tasks, optimizer=self._block(group.optimizer))

    def _block(self, block: Block) -> Block:
        if block not in self._blocks:
            self._blocks[block] = Block(block.name, tuple(map(self._operation, block.operations)))
        return self._blocks[block]

    def _operation(self, operation: Operation) -> Operation:
        seconds_MSR = operation.seconds_MSR
        if seconds_MSR is not None and seconds_MSR.shape[1] > 1:
            return replace(operation, seconds_MSR=seconds_MSR[:, self._one])
        if operation.transfers_M:
            return replace(operation, transfers_M=tuple(map(self.transfer, operation.transfers_M)))
        return operation

    def transfer(self, transfer: Transfer) -> Transfer:
        """Those of equal shares are the same in every sample."""
        if isinstance(transfer, PreparedTransfer):
            return self._prepared(transfer)
        if isinstance(transfer, PeerCollective):
            return transfer.of_one_sample
        if not isinstance(transfer, SideBySide):
            return transfer
        if transfer not in self._joined:
            self._joined[transfer] = SideBySide([self.transfer(part) for part in transfer.parts], transfer.places)
        return self._joined[transfer]

    def part(self, part: SharedPart) -> SharedPart:
        return part._replace(transfer=self._prepared(part.transfer), use=part.use.of_sample(self._one.start))

    def _prepared(self, transfer: PreparedTransfer) -> PreparedTransfer:
        if transfer not in self._kept:
            self._kept[transfer] = transfer.parts(self._samples)
        return self._kept[transfer][self._one.start]


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
