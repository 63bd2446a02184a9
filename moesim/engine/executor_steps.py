"""Blocks as the steps that the executor takes: a run of kernels that follow each other is one step.

Kernels of one chain that nothing parts start when the one before ends, so that their ends are the run's start plus the
running sum of their durations: one sum over an array [N, S, R] in the place of N walks through the clocks.

Legend: M micro-batches, N kernels of a step, S routing samples, R ranks (M, S, R: 1 where all are alike).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.engine.segments import FAMILY_NUMBERS, Packed, PackedBlock, pack
from moesim.program.operations import NUM_CHAINS, Block, Kind, Operation, Transfer, interleave
from moesim.results.spans import Label

FloatArray = NDArray[np.float64]


class Step(NamedTuple):
    """What the executor does at once.

    `which` pass of an action it belongs to; `chain` counts over both. `elapsed_MNSR`: seconds from the start of a run
    of kernels to the end of each. `labels_N` are numbers of labels, `families_N` of families (FAMILY_NUMBERS), `layer`
    that of the first kernel.
    """

    kind: Kind
    which: int
    chain: int
    launches: float
    layer: int
    labels_N: NDArray[np.int32]
    families_N: NDArray[np.int32]
    elapsed_MNSR: FloatArray
    transfers_M: tuple[Transfer, ...]


class Labels:
    """The distinct labels of a simulation and their numbers, and its blocks as steps that bear these numbers."""

    def __init__(self) -> None:
        self._number: dict[Label, int] = {}
        self._all: tuple[Label, ...] = ()
        self._steps: dict[tuple[bool, tuple[Block, ...]], tuple[Step, ...]] = {}
        self._packed: dict[tuple[bool, tuple[Block, ...]], Packed] = {}
        self._packed_blocks: dict[tuple[bool, Block], PackedBlock] = {}

    def number(self, label: Label) -> int:
        """The number of a label, new ones in order of first use."""
        return self._number.setdefault(label, len(self._number))

    def all(self) -> tuple[Label, ...]:
        """Labels by number."""
        if len(self._all) < len(self._number):
            self._all = tuple(self._number)
        return self._all

    def steps(self, blocks: tuple[Block, ...], *, runs: bool) -> tuple[Step, ...]:
        """The steps of a pass, or of two that overlap. Without `runs` every kernel is a step of its own."""
        key = (runs, blocks)
        if key not in self._steps:
            self._steps[key] = tuple(self._step(which, part) for which, part in _parts(_order(blocks), runs=runs))
        return self._steps[key]

    def packed(self, blocks: tuple[Block, ...], *, whole: bool) -> Packed:
        """The same for compiled loops; `whole`: these also take transfers in which all ranks meet."""
        if (whole, blocks) not in self._packed:
            for block in blocks:
                if (whole, block) not in self._packed_blocks:
                    self._packed_blocks[whole, block] = PackedBlock(block, whole=whole)
            order = _order(blocks)
            labels = [self.number(o.label) for _, o in order if o.kind in (Kind.COMPUTE, Kind.TRANSFER)]
            packed = [self._packed_blocks[whole, block] for block in blocks]
            self._packed[whole, blocks] = pack(order, packed, np.array(labels, dtype=np.int32))
        return self._packed[whole, blocks]

    def _step(self, which: int, operations: Sequence[Operation]) -> Step:
        first = operations[0]
        return Step(
            kind=first.kind,
            which=which,
            chain=which * NUM_CHAINS + first.chain,
            launches=sum(operation.launches for operation in operations),
            layer=first.label.layer,
            labels_N=np.array([self.number(operation.label) for operation in operations], dtype=np.int32),
            families_N=np.array([FAMILY_NUMBERS[operation.family] for operation in operations], dtype=np.int32),
            elapsed_MNSR=_elapsed(operations),
            transfers_M=first.transfers_M,
        )


def _order(blocks: tuple[Block, ...]) -> tuple[tuple[int, Operation], ...]:
    """(Which pass, operation) in issue order."""
    return interleave(*blocks) if len(blocks) == 2 else tuple((0, operation) for operation in blocks[0].operations)


def _parts(order: Sequence[tuple[int, Operation]], *, runs: bool) -> list[tuple[int, list[Operation]]]:
    parts: list[tuple[int, list[Operation]]] = []
    for which, operation in order:
        if runs and parts and operation.kind is Kind.COMPUTE:
            last_which, (*_, last) = parts[-1]
            if last.kind is Kind.COMPUTE and (last_which, last.chain) == (which, operation.chain):
                parts[-1][1].append(operation)
                continue
        parts.append((which, [operation]))
    return parts


def _elapsed(operations: Sequence[Operation]) -> FloatArray:
    seconds_NMSR = [operation.seconds_MSR for operation in operations if operation.seconds_MSR is not None]
    if not seconds_NMSR:
        return np.zeros((1, 0, 1, 1))
    if len(seconds_NMSR) == 1:
        return seconds_NMSR[0][:, None]
    num, samples, ranks = np.broadcast_shapes(*(seconds_MSR.shape for seconds_MSR in seconds_NMSR))
    each_MNSR = np.empty((num, len(seconds_NMSR), samples, ranks))
    for kernel, seconds_MSR in enumerate(seconds_NMSR):
        each_MNSR[:, kernel] = seconds_MSR
    return np.cumsum(each_MNSR, axis=1)
