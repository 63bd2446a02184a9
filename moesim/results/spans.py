"""What the simulation emits: one row per operation of a rank group, in issue order. Everything else is derived,
first where the time of every rank goes (`moesim.results.attribution`).

Legend: N operations issued, S routing samples simulated in lockstep, R ranks of the group.
"""

from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

CATEGORIES = (
    "attention",
    "router",
    "permute",
    "dispatch_exposed",
    "experts",
    "shared_experts",
    "combine_exposed",
    "dense_ffn",
    "embedding_head",
    "imbalance_wait",
    "data_parallel",
    "tensor",
    "pipeline",
    "bubble",
    "recompute",
    "optimizer",
    "host",
    "other",
)


class Stream(IntEnum):
    """Where a span runs on its GPU, by priority of the attribution.

    COMMUNICATION carries dispatch, combine and what else sits in a token's way; REDUCTION collectives on gradients and
    parameters; PIPELINE p2p sends between stages; HOST times at which the device stood still for the host; BACKGROUND
    the part of a collective on gradients beside later passes, which nothing waits for: no time is attributed to it.
    """

    COMPUTE = 0
    COMMUNICATION = 1
    REDUCTION = 2
    PIPELINE = 3
    HOST = 4
    BACKGROUND = 5


class Phase(StrEnum):
    """What of a step an operation belongs to. NONE: reductions of gradients, and what only orders other operations."""

    FORWARD = "forward"
    INPUT_GRADIENT = "input gradient"
    WEIGHT_GRADIENT = "weight gradient"  # nobody waits for it but the optimizer: schedules may put it off
    RECOMPUTE = "recompute"
    OPTIMIZER = "optimizer"
    NONE = "none"


class Part(StrEnum):
    """Which part of the model, or of what trains it, an operation works for."""

    NORM = "norm"
    ATTENTION = "attention"
    RESIDUAL = "residual"
    DENSE_FFN = "dense FFN"
    ROUTER = "router"
    PERMUTE = "permute"
    ROW_COUNTS = "row counts"  # that software exchanges before the rows
    DISPATCH = "dispatch"
    EXPERTS = "experts"
    COMBINE = "combine"
    SHARED_EXPERTS = "shared experts"
    EMBEDDING = "embedding"
    PREDICTION_JOIN = "prediction join"
    HEAD = "head"
    LOSS = "loss"
    GRADIENTS = "gradients"
    PARAMETERS = "parameters"
    OPTIMIZER = "optimizer"
    PIPELINE = "pipeline"
    STALL = "stall"  # the device stands still for the host
    NONE = "none"


# The category of the attribution that the time of a part counts to; parts without one lie within another part.
CATEGORY_OF_PART = {
    Part.ATTENTION: "attention",
    Part.DENSE_FFN: "dense_ffn",
    Part.ROUTER: "router",
    Part.PERMUTE: "permute",
    Part.EXPERTS: "experts",
    Part.SHARED_EXPERTS: "shared_experts",
    Part.EMBEDDING: "embedding_head",
    Part.PREDICTION_JOIN: "embedding_head",
    Part.HEAD: "embedding_head",
    Part.LOSS: "embedding_head",
    Part.GRADIENTS: "data_parallel",
    Part.PARAMETERS: "data_parallel",
    Part.OPTIMIZER: "optimizer",
}


class Collective(StrEnum):
    """How ranks exchange in a transfer."""

    ALL_TO_ALL = "all_to_all"
    ALL_GATHER = "all_gather"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_REDUCE = "all_reduce"
    SEND_RECEIVE = "send_receive"
    NONE = "none"


class Label(NamedTuple):
    """What a span is: its name, its category of the attribution, its stream and its layer (-1 outside the layers).

    The name is for people: what a program asks stands in `phase`, `part` and `collective`.
    `sender` is the pipeline rank that a p2p send comes from, -1 for everything else. `peers` is the number of the set
    in which each rank of the group takes part in a transfer; empty where all of them meet.
    """

    name: str
    category: str
    stream: Stream
    layer: int
    sender: int = -1
    peers: tuple[int, ...] = ()
    phase: Phase = Phase.NONE
    part: Part = Part.NONE
    collective: Collective = Collective.NONE

    def of_layer(self, layer: int) -> "Label":
        """The same in another layer; `_replace` takes three times as long."""
        return Label(
            self.name,
            self.category,
            self.stream,
            layer,
            sender=self.sender,
            peers=self.peers,
            phase=self.phase,
            part=self.part,
            collective=self.collective,
        )


class ActionRows(NamedTuple):
    """One action of a pipeline schedule: its passes (two when they overlap), and its rows `first` to `last` - 1."""

    passes: tuple[str, ...]
    micro_batches: tuple[int, ...]
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class SpanTable:
    """Spans of one rank group.

    `label_N` indexes `labels`; `own_NSR` is the part of a transfer after its last needed peer arrived, and the whole
    duration of a compute span. Times are seconds from the start of the step. `actions` cut the rows into what the
    pipeline schedule did one after the other; behind the last come collectives and the optimizer.
    `since_R`: where rows that ended by then are left out.
    """

    labels: tuple[Label, ...]
    ranks_R: NDArray[np.int64]
    label_N: NDArray[np.int32]
    micro_batch_N: NDArray[np.int32]
    start_NSR: FloatArray
    finish_NSR: FloatArray
    own_NSR: NDArray[np.float32]
    step_S: FloatArray
    actions: tuple[ActionRows, ...] = ()
    since_R: FloatArray | None = None

    def first_sample(self) -> "SpanTable":
        """The spans of sample 0 alone, in memory of their own."""
        if len(self.step_S) == 1:
            return self
        return replace(
            self,
            start_NSR=self.start_NSR[:, :1].copy(),
            finish_NSR=self.finish_NSR[:, :1].copy(),
            own_NSR=self.own_NSR[:, :1].copy(),
            step_S=self.step_S[:1],
        )

    def rows(self, stream: Stream) -> NDArray[np.intp]:
        """Row numbers of one stream, in issue order."""
        streams = np.array([label.stream for label in self.labels])
        return np.flatnonzero(streams[self.label_N] == stream)


class SpanRecorder:
    """Preallocated arrays that the executor fills, one row per operation."""

    def __init__(self, *, rows: int, samples: int, ranks: int) -> None:
        self.label_N = np.zeros(rows, np.int32)
        self.micro_batch_N = np.full(rows, -1, np.int32)
        # Not `zeros`: numpy asks for large pages here, and half a gigabyte of small ones takes as long as to fill them.
        self.start_NSR = np.empty((rows, samples, ranks))
        self.finish_NSR = np.empty((rows, samples, ranks))
        self.own_NSR = np.empty((rows, samples, ranks), np.float32)
        self.count = 0
        self.actions: list[ActionRows] = []

    def pass_on(self) -> bool:
        """Called when an action has ended and is not the last: whether the rows so far are gone."""
        return False

    def stay(self) -> None:
        """Called before the last action: its rows are asked for later."""

    def end_action(self, passes: tuple[str, ...], micro_batches: tuple[int, ...]) -> None:
        """The rows since the last action ended belong to this one."""
        first = self.actions[-1].last if self.actions else 0
        self.actions.append(ActionRows(passes, micro_batches, first, self.count))

    def add(
        self, label: int, micro_batch: int, start_SR: FloatArray, finish_SR: FloatArray, own_SR: FloatArray
    ) -> None:
        """Append one span."""
        row = self.count
        self.label_N[row] = label
        self.micro_batch_N[row] = micro_batch
        self.start_NSR[row] = start_SR
        self.finish_NSR[row] = finish_SR
        self.own_NSR[row] = own_SR
        self.count = row + 1

    def run(self, labels_N: NDArray[np.int32], micro_batch: int | NDArray[np.integer]) -> slice:
        """Rows for spans that follow each other, of one micro-batch or of one each; the caller writes their times."""
        rows = slice(self.count, self.count + len(labels_N))
        self.label_N[rows] = labels_N
        self.micro_batch_N[rows] = micro_batch
        self.count = rows.stop
        return rows

    def append(self, other: "SpanRecorder") -> None:
        """The rows of another recorder behind these, its sample 0 alone."""
        rows, n = slice(self.count, self.count + other.count), other.count
        for name in ("label_N", "micro_batch_N"):
            getattr(self, name)[rows] = getattr(other, name)[:n]
        for name in ("start_NSR", "finish_NSR", "own_NSR"):
            getattr(self, name)[rows] = getattr(other, name)[:n, :1]
        self.actions += [
            action._replace(first=self.count + action.first, last=self.count + action.last) for action in other.actions
        ]
        self.count = rows.stop

    def table(self, *, labels: tuple[Label, ...], ranks_R: NDArray[np.int64], step_S: FloatArray) -> SpanTable:
        """The finished table (views of the rows that were filled)."""
        n = self.count
        return SpanTable(
            labels=labels,
            ranks_R=ranks_R,
            label_N=self.label_N[:n],
            micro_batch_N=self.micro_batch_N[:n],
            start_NSR=self.start_NSR[:n],
            finish_NSR=self.finish_NSR[:n],
            own_NSR=self.own_NSR[:n],
            step_S=step_S,
            actions=tuple(self.actions),
        )
