"""Operations and blocks: what a rank group executes, as data.

All ranks of a group run the same operations; only durations differ. A block is the list of operations of one
micro-batch and direction, in issue order. Durations hold every micro-batch and routing sample, so that one block
serves the whole step.

Legend: M micro-batches (1 where all are alike), S routing samples (1 where all are alike), R ranks (likewise).
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.results.spans import Collective, Label, Part, Phase, Stream

FloatArray = NDArray[np.float64]

MAIN, SIDE = 0, 1  # chains: the token's way through the layer, and what runs beside it (shared experts)
NUM_CHAINS = 2


class Kind(IntEnum):
    """How the executor advances the clocks."""

    COMPUTE = 0
    TRANSFER = 1
    READBACK = 2  # the host waits for the stream
    FORK = 3  # the side chain starts here
    JOIN = 4  # the main chain goes on when the side chain is done
    COLLECTIVE = 5  # on gradients or parameters: one after the other on a stream of their own
    AWAIT = 6  # the chain goes on when all of these listed so far are done


class Transfer(Protocol):
    """A prepared transfer among the ranks of a group, for all samples in lockstep."""

    @property
    def alone_R(self) -> FloatArray:
        """Seconds until each rank is done when all start at 0, [S, R]."""

    def finish(self, start_R: FloatArray) -> FloatArray:
        """When each rank is done, given when each is ready, [S, R]; seconds on the same clock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation of a block; `seconds_MSR` for compute, `transfers_M` for communication.

    `launches` is how many kernels of middling cost the host issues for it. `source` says what the duration rests on,
    `family` which kernels of `moesim.kernels` it belongs to, `error_family` whose errors it shares.
    `again`: the words of workload.recompute that repeat it in the backward pass.
    """

    kind: Kind
    label: Label
    chain: int = MAIN
    seconds_MSR: FloatArray | None = None
    transfers_M: tuple[Transfer, ...] = ()
    launches: float = 1
    source: str = ""
    again: tuple[str, ...] = ()
    family: str = "memory_bound"
    error_family: str = "memory_bound"

    @property
    def phase(self) -> Phase:
        """What of a step it belongs to."""
        return self.label.phase

    @property
    def part(self) -> Part:
        """Which part of the model it works for."""
        return self.label.part

    def of_layer(self, layer: int, *, index: int, layers: int) -> "Operation":
        """The part of one layer, where the operation holds `layers` of them one behind the other along M."""
        if layers == 1 and layer == self.label.layer:
            return self
        seconds_MSR, transfers_M = self.seconds_MSR, self.transfers_M
        if seconds_MSR is not None and len(seconds_MSR) > 1:
            each = len(seconds_MSR) // layers
            seconds_MSR = seconds_MSR[index * each : (index + 1) * each]
        if len(transfers_M) > 1:
            each = len(transfers_M) // layers
            transfers_M = transfers_M[index * each : (index + 1) * each]
        return Operation(  # `replace` takes three times as long
            kind=self.kind,
            label=self.label.of_layer(layer),
            chain=self.chain,
            seconds_MSR=seconds_MSR,
            transfers_M=transfers_M,
            launches=self.launches,
            source=self.source,
            again=self.again,
            family=self.family,
            error_family=self.error_family,
        )


def compute(
    label: Label,
    seconds: FloatArray | float,
    *,
    source: str,
    chain: int = MAIN,
    launches: float = 1,
    again: tuple[str, ...] = (),
    family: str = "memory_bound",
    error_family: str = "memory_bound",
) -> Operation:
    """A kernel (or a run of kernels) on the compute stream; `seconds` broadcasts to [M, S, R]."""
    seconds_MSR = np.asarray(seconds, dtype=np.float64)
    seconds_MSR = seconds_MSR.reshape((1,) * (3 - seconds_MSR.ndim) + seconds_MSR.shape)
    return Operation(
        kind=Kind.COMPUTE,
        label=label,
        chain=chain,
        seconds_MSR=seconds_MSR,
        source=source,
        launches=launches,
        again=again,
        family=family,
        error_family=error_family,
    )


def transfer(
    name: str,
    category: str,
    transfers_M: tuple[Transfer, ...],
    *,
    layer: int,
    phase: Phase = Phase.NONE,
    part: Part = Part.NONE,
    collective: Collective = Collective.ALL_TO_ALL,
    chain: int = MAIN,
    launches: float = 1,
    peers: tuple[int, ...] = (),
) -> Operation:
    """A transfer on the communication stream, listed directly behind the operation that feeds it.

    `peers`: the set of every rank, where the group's ranks meet in several.
    """
    stream = Stream.COMMUNICATION
    label = Label(name, category, stream, layer, peers=peers, phase=phase, part=part, collective=collective)
    return Operation(
        kind=Kind.TRANSFER, label=label, chain=chain, transfers_M=transfers_M, launches=launches, source="network"
    )


def readback(name: str, *, layer: int) -> Operation:
    """The host waits until the main chain is done and reads a result back, in the forward pass."""
    label = Label(name, "host", Stream.HOST, layer, phase=Phase.FORWARD, part=Part.ROW_COUNTS)
    return Operation(kind=Kind.READBACK, label=label, launches=0)


def collective(label: Label, prepared: Transfer) -> Operation:
    """A collective on gradients or parameters, as soon as the main chain and the one before it are there."""
    return Operation(kind=Kind.COLLECTIVE, label=label, transfers_M=(prepared,), source="network")


def _order(kind: Kind, name: str, layer: int, phase: Phase, part: Part) -> Operation:
    label = Label(name, "other", Stream.HOST, layer, phase=phase, part=part)
    return Operation(kind=kind, label=label, launches=0)


def wait(*, layer: int, phase: Phase = Phase.NONE) -> Operation:
    """The main chain waits for the collectives on gradients and parameters that are listed before."""
    return _order(Kind.AWAIT, "await", layer, phase, Part.NONE)


def fork(*, layer: int, phase: Phase = Phase.NONE, part: Part = Part.NONE) -> Operation:
    """From here the side chain runs beside the main chain."""
    return _order(Kind.FORK, "fork", layer, phase, part)


def join(*, layer: int, phase: Phase = Phase.NONE, part: Part = Part.NONE) -> Operation:
    """The main chain waits for the side chain."""
    return _order(Kind.JOIN, "join", layer, phase, part)


@dataclass(frozen=True, eq=False)
class Block:
    """The operations of one pass of one micro-batch through one stage."""

    name: str
    operations: tuple[Operation, ...]

    def merged(self, *, families_equal: bool = True) -> "Block":
        """The same block with runs of kernels of one category as one operation: exact while the host never limits.

        Where transfers slow families differently (not `families_equal`), a run is of one family.
        """
        runs: list[list[Operation]] = []
        for operation in self.operations:
            if runs and _joins(runs[-1][-1], operation, families_equal=families_equal):
                runs[-1].append(operation)
            else:
                runs.append([operation])
        return Block(self.name, tuple(_together(run) for run in runs))


def _together(run: list[Operation]) -> Operation:
    """Kernels that follow each other as one."""
    if len(run) == 1:
        return run[0]
    first = run[0]
    phases, parts = {operation.phase for operation in run}, {operation.part for operation in run}
    seconds = [operation.seconds_MSR for operation in run if operation.seconds_MSR is not None]
    return Operation(
        kind=first.kind,
        label=first.label._replace(
            name=first.label.category,
            phase=first.phase if len(phases) == 1 else Phase.NONE,
            part=first.part if len(parts) == 1 else Part.NONE,
        ),
        chain=first.chain,
        seconds_MSR=sum(seconds[1:], start=seconds[0]),
        launches=sum(operation.launches for operation in run),
        source=first.source,
        family=first.family,
        error_family=first.error_family,
    )


def _joins(first: Operation, second: Operation, *, families_equal: bool) -> bool:
    if not families_equal and first.family != second.family:
        return False
    same = first.kind is second.kind is Kind.COMPUTE and first.chain == second.chain
    return same and first.label.category == second.label.category and first.label.layer == second.label.layer


class Run(NamedTuple):
    """One pass of a micro-batch (an index into the block's durations) through a block."""

    block: Block
    micro_batch: int
    backward: bool


def interleave(first: Block, second: Block) -> tuple[tuple[int, Operation], ...]:
    """Two blocks that overlap: each goes on to its next transfer while the other's is under way.

    Gives (0 or 1: which block, operation) in issue order. A transfer stays directly behind what feeds it, and what the
    software lists beside a transfer stays behind it.
    """
    queues = [_segments(first), _segments(second)]
    order: list[tuple[int, Operation]] = []
    turn = 0
    while any(queues):
        if queues[turn]:
            order += [(turn, operation) for operation in queues[turn].pop(0)]
        turn = 1 - turn
    return tuple(order)


def _segments(block: Block) -> list[list[Operation]]:
    """Runs of operations that each end with a transfer (the last one may end without)."""
    segments: list[list[Operation]] = [[]]
    for operation in block.operations:
        segments[-1].append(operation)
        if operation.kind is Kind.TRANSFER:
            segments.append([])
    return [segment for segment in segments if segment]
