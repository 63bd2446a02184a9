"""Actions as segments for compiled loops: the kernels up to the next transfer, packed into arrays.

One call per segment moves all clocks of a group on, in the place of several numpy calls per run of kernels. Only where
the host never limits: then every kernel and every transfer is one span, and reading back costs nothing.

Legend: M micro-batches, N steps of a segment, C columns of one, G spans of an action, S routing samples, R ranks, Q
packed durations.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.kernels.families import FAMILIES
from moesim.program.operations import NUM_CHAINS, Block, Kind, Operation, Transfer

FloatArray = NDArray[np.float64]

# Columns of a table of steps, for kernels all of them. FIRST: a run of kernels starts here. Durations begin at OFFSET
# of those of pass WHICH; LENGTH micro-batches take turns, and strides are 0 where all samples or ranks are alike.
# FAMILY: its place in FAMILY_NUMBERS.
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
NUM_CLOCKS = NUM_CHAIN_CLOCKS + 7


class Segment(NamedTuple):
    """Steps without a transfer, and the transfer behind them: that of pass `which`; `chain` counts over both passes.

    At the end of an action there may be none (`chain` is NO_TRANSFER). `spans`: how many kernels the steps have.
    """

    steps_NC: NDArray[np.int64]
    spans: int
    chain: int
    which: int
    transfers_M: tuple[Transfer, ...]


class Packed(NamedTuple):
    """An action: its segments, and the durations of the kernels of its (one or two) passes.

    `labels_G` are the numbers of its spans' labels and `which_G` their passes, in issue order.
    """

    segments: tuple[Segment, ...]
    seconds_Q: tuple[FloatArray, FloatArray]
    labels_G: NDArray[np.int32]
    which_G: NDArray[np.intp]


class PackedBlock:
    """The durations of a block's kernels one behind the other, and where each operation's begin."""

    def __init__(self, block: Block) -> None:
        kernels = {id(o): o.seconds_MSR for o in block.operations if o.seconds_MSR is not None}
        sizes = [seconds_MSR.size for seconds_MSR in kernels.values()]
        self.offset = dict(zip(kernels, np.cumsum([0, *sizes]).tolist(), strict=False))  # by identity
        self.seconds_Q = np.concatenate([np.empty(0), *(seconds_MSR.ravel() for seconds_MSR in kernels.values())])

    def step(self, operation: Operation, *, which: int, first: bool) -> tuple[int, ...]:
        """The row of a kernel in a table of steps."""
        assert operation.seconds_MSR is not None
        length, samples, ranks = operation.seconds_MSR.shape
        stride_s, stride_r = (ranks if samples > 1 else 0), (1 if ranks > 1 else 0)
        chain = which * NUM_CHAINS + operation.chain
        return (
            Kind.COMPUTE, chain, first, which, self.offset[id(operation)], length, samples * ranks, stride_s, stride_r,
            FAMILY_NUMBERS[operation.family],
        )  # fmt: skip


def pack(order: Sequence[tuple[int, Operation]], blocks: Sequence[PackedBlock], labels_G: NDArray[np.int32]) -> Packed:
    """The segments of (which pass, operation) in issue order; `labels_G` as in `Packed`."""
    segments: list[Segment] = []
    steps: list[tuple[int, ...]] = []
    spans, last = 0, -1  # the chain of the run of kernels that goes on
    for which, operation in order:
        chain = which * NUM_CHAINS + operation.chain
        if operation.kind is Kind.COMPUTE:
            steps.append(blocks[which].step(operation, which=which, first=chain != last))
            spans, last = spans + 1, chain
            continue
        last = -1
        if operation.kind is Kind.TRANSFER:
            segments.append(Segment(_table(steps), spans, chain, which, operation.transfers_M))
            steps, spans = [], 0
        elif operation.kind in (Kind.FORK, Kind.JOIN):
            steps.append((operation.kind, chain, *(0,) * (FAMILY - CHAIN)))
        else:
            assert operation.kind is Kind.READBACK, operation.kind
    if steps:
        segments.append(Segment(_table(steps), spans, NO_TRANSFER, 0, ()))
    which_G = [which for which, operation in order if operation.kind in (Kind.COMPUTE, Kind.TRANSFER)]
    seconds_Q = blocks[0].seconds_Q, blocks[-1].seconds_Q
    return Packed(tuple(segments), seconds_Q, labels_G, np.array(which_G, dtype=np.intp))


def _table(steps: Sequence[tuple[int, ...]]) -> NDArray[np.int64]:
    return np.array(steps, dtype=np.int64).reshape(-1, FAMILY + 1)
