"""The program of one optimizer step, as data: tasks of every rank group, reductions and the optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import Beside, BesideSend
from moesim.kernels.families import FAMILIES
from moesim.kernels.jitter import NO_JITTER, Jitter
from moesim.network import PreparedTransfer, RankPorts
from moesim.network.contention import LinkUse
from moesim.program.collectives import Reduction
from moesim.program.host import FREE_HOST, HostModel
from moesim.program.operations import Block, Run, Transfer
from moesim.results.outcome import Basis
from moesim.results.spans import CATEGORY_OF_PART, Collective, Label, Part, Phase, Stream
from moesim.schedules import P2P

FREE_BESIDE = Beside(compute=1.0)
FloatArray = NDArray[np.float64]
FREE: Mapping[str, Beside] = MappingProxyType(dict.fromkeys(FAMILIES, Beside(1.0)))
Place = tuple[int, int]  # pipeline rank, number of the group


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A p2p send of `num_bytes` that run `which` of a task makes; it arrives `seconds` later.

    `by_state`: the same with the links in every state of `Changes`, where there are several.
    """

    p2p: P2P
    which: int
    seconds: float
    num_bytes: float = 0.0
    by_state: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task:
    """One action of a pipeline schedule: its runs (two when they overlap) begin when all of `receives` has arrived."""

    runs: tuple[Run, ...]
    receives: tuple[P2P, ...] = ()
    sends: tuple[Sent, ...] = ()

    @property
    def passes(self) -> tuple[str, ...]:
        """The names of its blocks."""
        return tuple(run.block.name for run in self.runs)

    @property
    def micro_batches(self) -> tuple[int, ...]:
        """Their micro-batches."""
        return tuple(run.micro_batch for run in self.runs)


@dataclass(frozen=True, kw_only=True, eq=False)
class GroupProgram:
    """What one expert group executes. Groups with equal `number` on other pipeline ranks are its neighbours.

    `equal_groups`: the ranks of every other group of the pipeline rank that does the same at the same times, and is not
    simulated for itself (`moesim.program.equal_groups`).
    `last_tasks`: of each stage whose gradients may be reduced while other stages have tasks left, the index of the task
    that makes the last of them.
    `beside_R`: what kernels of each family and open transfers cost each other: one mapping for all, or one per rank;
    `beside_collectives_R`: likewise where the transfers are a library's collectives.
    """

    number: int
    pipeline_rank: int
    ranks_R: NDArray[np.int64]
    tasks: tuple[Task, ...]
    optimizer: Block
    last_tasks: Mapping[int, int] = field(default_factory=dict)
    equal_groups: tuple[NDArray[np.int64], ...] = ()
    beside_R: tuple[Mapping[str, Beside], ...] = (FREE,)
    beside_collectives_R: tuple[Mapping[str, Beside], ...] = (FREE,)

    @property
    def all_ranks_TR(self) -> NDArray[np.int64]:
        """Its ranks and those of its equal groups."""
        return np.stack([self.ranks_R, *self.equal_groups])

    @property
    def place(self) -> Place:
        """What names it among the groups of the step."""
        return self.pipeline_rank, self.number

    @property
    def num_operations(self) -> int:
        """Operations of the step."""
        runs = (len(run.block.operations) for task in self.tasks for run in task.runs)
        return sum(runs) + len(self.optimizer.operations)

    def begins_behind(self, reduction: Reduction) -> int:
        """The index of the task in which a collective on gradients begins."""
        last = len(self.tasks) - 1
        return self.last_tasks.get(reduction.stage, last) if reduction.buckets else last


class SharedPart(NamedTuple):
    """A transfer, or one of several side by side, among the ranks at `places_R` of a group."""

    places_R: NDArray[np.integer]
    transfer: PreparedTransfer
    use: LinkUse


@dataclass(frozen=True, kw_only=True, eq=False)
class Contention:
    """Links that transfers of a step can fill together, and what each puts on them; see `moesim.program.contention`.

    `capacity_L`: their bytes/s. `transfers`: per group those of its transfers that use them. `p2ps`: by sending
    group and the pipeline rank that receives. `collectives`: in the order of reductions and gathers, None for those
    that do not use them.
    """

    capacity_L: FloatArray
    transfers: Mapping[Place, Mapping[Transfer, tuple[SharedPart, ...]]]
    p2ps: Mapping[tuple[Place, int], LinkUse]
    collectives: tuple[LinkUse | None, ...]


class Crossing(NamedTuple):
    """What a p2p send between groups does to their ports: it takes `work_R` seconds of the slowest on every rank's way,
    and meanwhile `sends_KR` of the sender's and `receives_KR` of the receiver's ports."""

    work_R: FloatArray
    sends_KR: FloatArray
    receives_KR: FloatArray


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedPorts:
    """The ports of single ranks that several transfers of a step can use at once; see `moesim.program.contention`.

    `of_group`: a group's ports. `crossings`: p2p sends, by sending group and the pipeline rank that receives.
    `shares_CX`: what rings of reductions and gathers, in their order, take of each of the fabric's links.
    `sends`: what p2p sends lose beside kernels of each family, where that was measured.
    """

    of_group: Mapping[Place, RankPorts]
    crossings: Mapping[tuple[Place, int], Crossing]
    shares_CX: tuple[FloatArray, ...]
    sends: Mapping[str, BesideSend]


@dataclass(frozen=True, kw_only=True, eq=False)
class Changes:
    """What changes in a step: `instants_K`, sorted, the first at 0; from each on the speed of every rank over what it
    is else, `speed_KSW`, and the state that the links are in, `state_KS`.

    `collective_seconds`: of every reduction and gather, in their order, by state of the links.
    """

    instants_K: FloatArray
    speed_KSW: FloatArray
    state_KS: NDArray[np.int64]
    collective_seconds: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class StepProgram:
    """One optimizer step. `reductions` follow a group's last task, then its optimizer, then `gathers`.

    A group attends those collectives in which its ranks are members, in this order; but reductions with buckets begin
    when it makes the last gradients of their stage, in the order in which its stages are done.

    `source_seconds`: operation seconds by what they rest on, summed over groups, mean over samples and ranks.
    `tensor_bytes`: what ranks that share layers (tensor, context, slices of experts) send in the step, all together.
    `transfer_sources`: what transfers and collectives rest on, one text for each kind.
    `beside_reductions`: what collectives on gradients and all kernels cost each other; `collective_rate`: bytes/s of a
    rank at which this and the groups' facts hold (see `moesim.kernels.Contention`). `compiled`: whether compiled loops
    move the clocks. `contention`: None where groups cannot slow each other. `jitter`: how far ranks are apart that do
    the same. `changes`: None where ranks and links stay as they are.
    """

    groups: tuple[GroupProgram, ...]
    reductions: tuple[Reduction, ...]
    gathers: tuple[Reduction, ...]
    host: HostModel
    samples: int
    beside_reductions: Beside = FREE_BESIDE
    collective_rate: float = 0.0
    source_seconds: Mapping[Basis, float]
    tensor_bytes: float = 0.0
    transfer_sources: tuple[str, ...] = ()
    compiled: bool = False
    contention: Contention | None = None
    ports: SharedPorts | None = None
    jitter: Jitter = NO_JITTER
    changes: Changes | None = None

    @property
    def passes_spans_on(self) -> bool:
        """Whether the spans of an action never change once the next one has begun, and loops take them up."""
        alone = self.contention is None and self.changes is None
        return self.compiled and self.host == FREE_HOST and alone

    def rows(self, group: GroupProgram) -> int:
        """Most spans that a group can emit: every operation, a host stall before it unless the host is free, and where
        groups meet in no collective one of waiting for the slowest."""
        per_operation = 1 if self.host == FREE_HOST else 2
        p2ps = sum(len(task.receives) for task in group.tasks)
        return per_operation * group.num_operations + p2ps + self._rows_of_meetings

    def rows_at_once(self, group: GroupProgram) -> int:
        """Most spans of one task, where the host is free."""
        tasks = {(task.runs[0].block, task.runs[-1].block, len(task.runs)): task for task in group.tasks}.values()
        most = max(sum(len(run.block.operations) for run in task.runs) for task in tasks)
        return most + max(len(task.receives) for task in group.tasks)

    def rows_of_last(self, group: GroupProgram) -> int:
        """Most spans of the last task and all that follows it, where the host is free."""
        task = group.tasks[-1]
        operations = sum(len(run.block.operations) for run in task.runs) + len(group.optimizer.operations)
        return operations + len(task.receives) + self._rows_of_meetings

    @property
    def _rows_of_meetings(self) -> int:
        # A reduction that begins early may outlast the tasks and then has a span for either part.
        return max(1, 2 * len(self.reductions)) + len(self.gathers)


def p2p_label(p2p: P2P) -> Label:
    """The label of waiting for a p2p send that is on its way."""
    phase = Phase.FORWARD if p2p.payload == "activation" else Phase.INPUT_GRADIENT
    return Label(
        p2p.payload,
        "pipeline",
        Stream.PIPELINE,
        -1,
        p2p.source,
        phase=phase,
        part=Part.PIPELINE,
        collective=Collective.SEND_RECEIVE,
    )


def collective_label(reduction: Reduction, stream: Stream = Stream.REDUCTION) -> Label:
    """The label of a collective on gradients or parameters."""
    phase = Phase.OPTIMIZER if reduction.part is Part.PARAMETERS else Phase.NONE
    part, kind = reduction.part, reduction.collective
    return Label(reduction.name, CATEGORY_OF_PART[part], stream, -1, phase=phase, part=part, collective=kind)
