"""Which links the transfers of a step can fill together, and what each of them puts there.

Only links above the ports of single GPUs count (leaves, spines, links of custom fabrics), and of these only those whose
users' largest demands add up to more than the link carries: transfers over them share these. All others cannot slow
each other and are simulated without. Dispatches and combines, p2p sends between stages and the collectives at the
end of the step take part; collectives inside layers do not.

Legend: S routing samples, R ranks, C common links of the fabric, L overloaded ones of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moesim.network import Fabric, PreparedTransfer
from moesim.network.collectives import ring_use
from moesim.network.contention import TOLERANCE, LinkUse, common_use, path_rates
from moesim.program.group_collectives import PeerCollective, SideBySide
from moesim.program.operations import Block, Operation, Transfer
from moesim.program.reductions import Reduction
from moesim.program.step_program import Contention, GroupProgram, Place, SharedPart, StepProgram

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
