"""Actions as segments for compiled loops: the kernels up to the next transfer, packed into arrays.

One call per segment moves all clocks of a group on, in the place of several numpy calls per run of kernels. Transfers
in which all ranks meet end no segment: they are as good as kernels. Only where the host never limits: then every
kernel and every transfer is one span, and reading back costs nothing.

Legend: M micro-batches, N steps of a segment, C columns of one, G spans of an action, S routing samples, R ranks, Q
packed durations.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.kernels.families import FAMILIES
from moesim.network import PreparedTransfer
from moesim.program.operations import NUM_CHAINS, Block, Kind, Operation, Transfer

FloatArray = NDArray[np.float64]

# Columns of a table of steps, for kernels all of them. FIRST: a run of kernels starts here. Durations (of a transfer in
# which all ranks meet: its seconds alone) begin at OFFSET of those of pass WHICH; LENGTH micro-batches take turns, and
# strides are 0 where all samples or ranks are alike. FAMILY: its place in FAMILY_NUMBERS.
KIND, CHAIN, FIRST, WHICH, OFFSET, LENGTH, STRIDE_M, STRIDE_S, STRIDE_R, FAMILY = range(10)
FAMILY_NUMBERS = {family: number for number, family in enumerate(FAMILIES)}
NO_TRANSFER = -1

# The clocks of a group: the chains of both passes first.
MAX_RUNS = 2  # passes that overlap in one action
NUM_CHAIN_CLOCKS = MAX_RUNS * NUM_CHAINS
COMPUTE, COMMUNICATION = NUM_CHAIN_CLOCKS, NUM_CHAIN_CLOCKS + 1
OPEN_FROM, OPEN_UNTIL = NUM_CHAIN_CLOCKS + 2, NUM_CHAIN_CLOCKS + 3  # the latest transfer, which slows compute
# Of the run of kernels that goes on: its start, work done, and seconds lost beside the open transfer.
RUN_START, RUN_WORK, RUN_LOST = range(NUM_CHAIN_CLOCKS + 4, NUM_CHAIN_CLOCKS + 7)
# Of jitter (`moesim.engine.lateness`): when ranks last met, how much later meetings began in all, and, since groups
# last met, the work before meetings and what was waited in them for slow chips.
MET, LATE, UNMET, WAITED = range(NUM_CHAIN_CLOCKS + 7, NUM_CHAIN_CLOCKS + 11)
NUM_CLOCKS = NUM_CHAIN_CLOCKS + 11


class Segment(NamedTuple):
    """Steps, and the transfer behind them: that of pass `which`; `chain` counts over both passes.

    At the end of an action there may be none (`chain` is NO_TRANSFER). `spans`: how many rows of spans the steps write.
    """

    steps_NC: NDArray[np.int64]
    spans: int
    chain: int
    which: int
    transfers_M: tuple[Transfer, ...]


class Packed(NamedTuple):
    """An action: its segments, and the durations of the steps of its (one or two) passes.

    `alike_S`: whether they are the same for all ranks; one entry may stand for all samples.
    `labels_G` are the numbers of its spans' labels and `which_G` their passes, in issue order.
    """

    segments: tuple[Segment, ...]
    seconds_Q: tuple[FloatArray, FloatArray]
    alike_S: NDArray[np.bool_]
    labels_G: NDArray[np.int32]
    which_G: NDArray[np.intp]


class PackedBlock:
    """The durations of a block's steps one behind the other, and where each operation's begin.

    `whole`: transfers in which all ranks meet are steps, too.
    """

    def __init__(self, block: Block, *, whole: bool) -> None:
        found = ((id(operation), _seconds(operation, whole=whole)) for operation in block.operations)
        self._seconds = {key: seconds_MSR for key, seconds_MSR in found if seconds_MSR is not None}  # by identity
        each = list(self._seconds.values())
        self._offset = dict(zip(self._seconds, np.cumsum([0, *(one.size for one in each)]).tolist(), strict=False))
        self.seconds_Q = np.concatenate([np.empty(0), *(seconds_MSR.ravel() for seconds_MSR in each)])
        self.alike_S = np.ones(1, dtype=bool)
        for seconds_MSR in each:
            if seconds_MSR.shape[2] > 1:
                self.alike_S = self.alike_S & (seconds_MSR == seconds_MSR[:, :, :1]).all(axis=(0, 2))

    def is_step(self, operation: Operation) -> bool:
        """Whether it is no transfer that ends a segment."""
        return operation.kind is not Kind.TRANSFER or id(operation) in self._offset

    def step(self, operation: Operation, *, which: int, first: bool) -> tuple[int, ...]:
        """The row of a kernel, or of a transfer in which all meet, in a table of steps."""
        length, samples, ranks = self._seconds[id(operation)].shape
        stride_s, stride_r = (ranks if samples > 1 else 0), (1 if ranks > 1 else 0)
        chain = which * NUM_CHAINS + operation.chain
        return (
            operation.kind, chain, first, which, self._offset[id(operation)], length, samples * ranks, stride_s,
            stride_r, FAMILY_NUMBERS[operation.family],
        )  # fmt: skip


def _seconds(operation: Operation, *, whole: bool) -> FloatArray | None:
    """The durations [M, S, R] of what is a step."""
    if operation.kind is not Kind.TRANSFER:
        return operation.seconds_MSR
    if not whole or not all(isinstance(t, PreparedTransfer) and t.is_synchronised for t in operation.transfers_M):
        return None
    return np.stack([prepared.alone_R for prepared in operation.transfers_M])


def pack(order: Sequence[tuple[int, Operation]], blocks: Sequence[PackedBlock], labels_G: NDArray[np.int32]) -> Packed:
    """The segments of (which pass, operation) in issue order; `labels_G` as in `Packed`."""
    segments: list[Segment] = []
    steps: list[tuple[int, ...]] = []
    spans, last = 0, -1  # the chain of the run of kernels that goes on
    for which, operation in order:
        chain = which * NUM_CHAINS + operation.chain
        if not blocks[which].is_step(operation):
            segments.append(Segment(_table(steps), spans, chain, which, operation.transfers_M))
            steps, spans, last = [], 0, -1
        elif operation.kind in (Kind.COMPUTE, Kind.TRANSFER):
            steps.append(blocks[which].step(operation, which=which, first=chain != last))
            spans, last = spans + 1, chain if operation.kind is Kind.COMPUTE else -1
        elif operation.kind in (Kind.FORK, Kind.JOIN):
            steps.append((operation.kind, chain, *(0,) * (FAMILY - CHAIN)))
            last = -1
        else:
            assert operation.kind is Kind.READBACK, operation.kind
            last = -1
    if steps:
        segments.append(Segment(_table(steps), spans, NO_TRANSFER, 0, ()))
    which_G = [which for which, operation in order if operation.kind in (Kind.COMPUTE, Kind.TRANSFER)]
    return Packed(
        tuple(segments),
        (blocks[0].seconds_Q, blocks[-1].seconds_Q),
        blocks[0].alike_S & blocks[-1].alike_S,
        labels_G,
        np.array(which_G, dtype=np.intp),
    )


def _table(steps: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
    return np.array(steps, dtype=np.int64).reshape(-1, FAMILY + 1)
