"""From a scenario and its routing samples to the program of one optimizer step.

Legend: S routing samples, R ranks of a group.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import Beside, KernelModel, kernels_of_kind
from moesim.kernels.errors import transfers_of
from moesim.kernels.families import FAMILIES
from moesim.kernels.jitter import NO_JITTER, Jitter
from moesim.network import CollectiveEstimate, Fabric, group_shape, send_recv_seconds
from moesim.parallel import Mesh
from moesim.program.collectives import GroupLinks, Reduction
from moesim.program.contention import find_contention, shared_ports
from moesim.program.equal_groups import equal_group_numbers
from moesim.program.host import FREE_HOST, HostModel
from moesim.program.loads import RoutingSample, group_loads
from moesim.program.operations import Block, Run
from moesim.program.outside_layers import optimizer_block
from moesim.program.parameters import EarlyGather, ParameterGroups
from moesim.program.rank_kinds import BlocksOf, RankKinds
from moesim.program.scenario_fabric import pays_for_compiled_loops
from moesim.program.software import kernel_list
from moesim.program.stage import FIRST, Kinds, StagePlan, source_seconds, stage_blocks, tensor_bytes
from moesim.program.step_program import FREE, FREE_BESIDE, GroupProgram, Sent, StepProgram, Task
from moesim.program.writer import KernelWriter
from moesim.results.outcome import Basis
from moesim.results.spans import CATEGORY_OF_PART, Part
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.dispatch import DISPATCH
from moesim.scenario.failures import Speeds
from moesim.schedules import P2P, Action, Pass, Schedule, Work, build_schedule


def build_program(
    scenario: Scenario,
    *,
    fabric: Fabric,
    kernels: KernelModel,
    samples: Sequence[RoutingSample],
    merge: bool = False,
    equal_groups: bool = False,
) -> StepProgram:
    """The step of all rank groups; `samples` run in lockstep and are empty for a dense model.

    `merge` joins runs of kernels of one category into one operation, which changes no time while the host never limits.
    `equal_groups`: of rank groups that do the same at the same times only one is there, with the ranks of the others.
    """
    return _Builder(scenario, fabric, kernels, samples, merge, equal_groups).program()


class _Builder:
    """What the parts of one program share while it is built."""

    def __init__(
        self,
        scenario: Scenario,
        fabric: Fabric,
        kernels: KernelModel,
        samples: Sequence[RoutingSample],
        merge: bool,
        equal_groups: bool,
    ) -> None:
        self.scenario, self.fabric, self.kernels, self.samples = scenario, fabric, kernels, samples
        self.software = kernel_list(scenario)
        self.host = self.software.host_model(kernels)
        self.merge = merge and self.host == FREE_HOST
        self.compiled = pays_for_compiled_loops(scenario, samples=max(1, len(samples)))
        self.equal_groups = equal_groups
        self.mesh = Mesh(scenario.parallelism, scenario.cluster)
        self.ranks = RankKinds.of(scenario)
        self.schedules: dict[int, Schedule] = {}
        self.parameters = ParameterGroups(
            scenario, self.mesh, self.schedule, map_of=samples[0].map_of if samples else None
        )
        self.seconds: defaultdict[Basis, float] = defaultdict(float)
        self.sends: dict[tuple[int, int], CollectiveEstimate] = {}  # between stages
        # Two pipeline ranks that hold the same stage (DualPipe) share its blocks where the fabric treats them alike.
        self.blocks: dict[tuple[int, int, bytes, bytes], Mapping[Kinds, Block]] = {}
        self.shapes: dict[tuple[int, int], bytes] = {}  # of groups, by pipeline rank and number
        self.merged: dict[Block, Block] = {}
        self.whole: dict[Block, Block] = {}  # the other way round
        # Of a pipeline rank: its actions with the p2p sends before and behind, the same for all of its groups.
        self.exchanges: dict[tuple[int, int], list[tuple[Action, tuple[P2P, ...], tuple[Sent, ...]]]] = {}
        self.block_seconds: dict[Block, list[tuple[Basis, float]]] = {}
        self.block_bytes: dict[Block, float] = {}
        self.tensor_bytes = 0.0

    @property
    def schedule(self) -> Schedule:
        """Who does what on each pipeline rank, with most micro-batches."""
        return self._schedule(self.scenario.num_micro_batches)

    def _schedule(self, micro_batches: int) -> Schedule:
        """The same with so many, which groups on different pools may have different numbers of."""
        if micro_batches not in self.schedules:
            chosen = self.scenario.parallelism.schedule
            self.schedules[micro_batches] = build_schedule(
                chosen.kind,
                num_ranks=self.scenario.parallelism.pipeline,
                num_micro_batches=micro_batches,
                virtual=chosen.virtual,
            )
        return self.schedules[micro_batches]

    def program(self) -> StepProgram:
        """Everything together."""
        reductions = self.parameters.reductions(self.fabric)
        gathers = self.parameters.gathers(self.fabric)
        stages, collectives = self.schedule.num_ranks, (*reductions, *gathers)
        classes = [[number] for number in range(len(self.mesh.rank_groups()))]
        if self.equal_groups:
            classes = equal_group_numbers(
                self.mesh, self.fabric, self.samples, collectives, stages=stages, facts_of=self.ranks.key
            )
        groups = [group for stage in range(stages) for group in self._groups(stage, classes)]
        for collective in (*reductions, *gathers):
            self._count(collective, groups)
        return StepProgram(
            groups=tuple(groups),
            reductions=tuple(reductions),
            gathers=tuple(gathers),
            host=self.host,
            beside_reductions=self.kernels.contention.mean_collective,
            collective_rate=self.kernels.contention.collective_rate,
            samples=max(1, len(self.samples)),
            source_seconds=dict(self.seconds),
            tensor_bytes=self.tensor_bytes,
            transfer_sources=_transfer_sources(groups, collectives, self.sends.values()),
            compiled=(compiled := self.compiled and not self._reduces_inside),
            contention=find_contention(self.fabric, groups, collectives),
            ports=shared_ports(
                self.fabric, groups, collectives, sends=self.kernels.contention.sends, compiled=compiled
            ),
            jitter=_jitter(self.scenario, self.kernels, self.host),
        )

    @property
    def _reduces_inside(self) -> bool:
        """Whether passes hold collectives on gradients or weights."""
        return self.mesh.shards_by_layer or self.scenario.gathers_beside

    def beside_collectives(self, kind: int) -> Mapping[str, Beside]:
        """As `beside`, where a library's kernels make collectives among ranks that share layers; free without any."""
        sizes = self.scenario.parallelism
        if not (
            self.mesh.shards_by_layer
            or self.scenario.gathers_beside
            or max(sizes.tensor, sizes.context, sizes.expert_tensor) > 1
        ):
            return FREE
        facts = kernels_of_kind(self.kernels, kind).contention
        return {family: facts.beside_collective(family) for family in FAMILIES}

    def beside(self, kind: int) -> dict[str, Beside]:
        """What kernels and open transfers cost each other on a kind of GPU, by family: the SMs that communication
        holds, or as measured.

        A transfer with SMs of its own does not wait for those of a kernel.
        """
        share = self.scenario.dispatch.sm_share
        if share is not None:
            return dict.fromkeys(FAMILIES, Beside(1.0 / (1.0 - share)))
        measured = {family: kernels_of_kind(self.kernels, kind).contention.of(family) for family in FAMILIES}
        if DISPATCH[self.scenario.dispatch.algorithm].owns_sms:
            return {family: Beside(each.compute) for family, each in measured.items()}
        return measured

    def _count(self, collective: Reduction, groups: Sequence[GroupProgram]) -> None:
        taking_part = sum(
            len(group.all_ranks_TR) for group in groups if not collective.ranks.isdisjoint(group.ranks_R.tolist())
        )
        family = transfers_of(collective.evidence)
        basis = Basis(CATEGORY_OF_PART[collective.part], collective.source, family)
        self.seconds[basis] += collective.seconds * taking_part

    def _groups(self, pipeline_rank: int, classes: Sequence[Sequence[int]]) -> list[GroupProgram]:
        """One group for each class of equal ones; the seconds of all are counted, in the order of their numbers."""
        ranks = self.mesh.rank_groups(pipeline_rank)
        groups = []
        for numbers in classes:
            group = self._group(pipeline_rank, numbers[0], ranks[numbers[0]])
            groups.append(replace(group, equal_groups=tuple(ranks[number] for number in numbers[1:])))
        blocks = [Counter(run.block for task in group.tasks for run in task.runs) for group in groups]
        class_of = {number: index for index, numbers in enumerate(classes) for number in numbers}
        for _, index in sorted(class_of.items()):
            for block, times in blocks[index].items():
                self._count_block(self.whole.get(block, block), times)
            self._count_block(groups[index].optimizer, 1)
        return groups

    def _group(self, pipeline_rank: int, number: int, ranks_R: NDArray[np.int64]) -> GroupProgram:
        chunks = [
            self._blocks(stage, pipeline_rank, number, ranks_R) for stage in self.schedule.stages_of_rank[pipeline_rank]
        ]
        ends = self._priced(ranks_R, lambda kernels: self._end_blocks(kernels, pipeline_rank))
        tasks: list[Task] = []
        last_tasks: dict[int, int] = {}
        done_backwards = 0
        begun: set[int] = set()
        for action, receives, sends in self._exchanges(pipeline_rank, int(self.ranks.batches_W[ranks_R[0]])):
            runs = [
                Run(self._merged(_block_of(chunks[w.chunk], w, begun)), w.micro_batch, w.kind is not Pass.FORWARD)
                for w in action.works
            ]
            tasks += self._tasks(runs, receives, sends)
            backwards = sum(work.kind in (Pass.BACKWARD, Pass.INPUT) for work in action.works)
            added = ends["first" if done_backwards < len(chunks) else "later"]
            if backwards and added.operations:
                tasks.append(Task(runs=(Run(added, action.works[-1].micro_batch, True),)))
            done_backwards += backwards
            for work in action.works:
                if work.kind in (Pass.BACKWARD, Pass.WEIGHT):
                    last_tasks[self.schedule.stage(pipeline_rank, work)] = len(tasks) - 1
        flatten = ends["flatten"]
        if flatten.operations or self.mesh.shards_by_layer:
            last_tasks = {}  # all gradients go together, or the stream is busy in every pass
        if flatten.operations:
            tasks.append(Task(runs=(Run(flatten, -1, False),)))
        kinds = self.ranks.kinds(ranks_R)
        of_rank = kinds if len(kinds) == 1 else self.ranks.kind_W[ranks_R]
        return GroupProgram(
            number=number,
            pipeline_rank=pipeline_rank,
            ranks_R=ranks_R,
            tasks=tuple(tasks),
            optimizer=ends["optimizer"],
            last_tasks=last_tasks,
            beside_R=tuple(self.beside(kind) for kind in of_rank),
            beside_collectives_R=tuple(self.beside_collectives(kind) for kind in of_rank),
        )

    def _priced(self, ranks_R: NDArray[np.int64], write: BlocksOf) -> Mapping[Any, Block]:
        """The blocks that `write` makes of a kernel model, for the GPUs of these ranks."""
        made = self.ranks.blocks(self.kernels, ranks_R, write)
        for block, sources in made.sources.items():
            self.block_seconds[block] = list(sources)
            self.block_bytes[block] = tensor_bytes(block)
        return made.blocks

    def _end_blocks(self, kernels: KernelModel, pipeline_rank: int) -> dict[str, Block]:
        """What follows the passes: gradients added up (the first time and later), made flat, and the optimizer."""
        parameters = self.parameters.of_rank(pipeline_rank)
        writer = KernelWriter(kernels, dtype=self.scenario.workload.precision.kernels, part=Part.GRADIENTS)
        before, after = self.software.flat_copies(writer, parameters=parameters.reduced)
        held = parameters.held / len(self.schedule.stages_of_rank[pipeline_rank])  # a backward pass is of one stage
        added = {
            name: self.software.accumulation(writer, parameters=held, first=name == "first")
            for name in ("first", "later")
        }
        optimizer = optimizer_block(
            self.scenario,
            kernels,
            parameters=parameters.updated,
            gemms=parameters.gemms,
            launches=self.software.optimizer_launches(kernels.host, self.schedule.stages_of_rank[pipeline_rank]),
        )
        return {
            **{name: Block("accumulate", tuple(operations)) for name, operations in added.items()},
            "flatten": Block("flatten", tuple(before)),
            "optimizer": Block("optimizer", (*after, *optimizer.operations)),
        }

    def _exchanges(
        self, pipeline_rank: int, micro_batches: int
    ) -> list[tuple[Action, tuple[P2P, ...], tuple[Sent, ...]]]:
        key, schedule = (pipeline_rank, micro_batches), self._schedule(micro_batches)
        if key not in self.exchanges:
            self.exchanges[key] = [
                (
                    action,
                    schedule.receives(pipeline_rank, action),
                    tuple(self._sent(action.works, sent) for sent in schedule.sends(pipeline_rank, action)),
                )
                for action in schedule.actions[pipeline_rank]
            ]
        return self.exchanges[key]

    def _count_block(self, block: Block, times: int) -> None:
        if block not in self.block_seconds:
            self.block_seconds[block] = list(source_seconds(block))
            self.block_bytes[block] = tensor_bytes(block)
        self.tensor_bytes += times * self.block_bytes[block]
        for basis, seconds in self.block_seconds[block]:
            self.seconds[basis] += times * seconds

    def _merged(self, block: Block) -> Block:
        if not self.merge:
            return block
        if block not in self.merged:
            self.merged[block] = block.merged(families_equal=self.families_equal)
            self.whole[self.merged[block]] = block
        return self.merged[block]

    @cached_property
    def families_equal(self) -> bool:
        """Whether kernels of all families and open transfers cost each other the same, on every kind of GPU."""
        return all(
            len({*self.beside(kind).values(), *self.beside_collectives(kind).values()} - {FREE_BESIDE}) <= 1
            for kind in np.unique(self.ranks.kind_W).tolist()
        )

    def _tasks(self, runs: Sequence[Run], receives: tuple[P2P, ...], sends: tuple[Sent, ...]) -> list[Task]:
        """One task; a pair that the software does not overlap is one after the other."""
        if len(runs) == 1 or self.scenario.overlap.micro_batches is not False:
            return [Task(runs=tuple(runs), receives=receives, sends=sends)]
        late = tuple(replace(sent, which=0) for sent in sends if sent.which == 1)
        early = tuple(sent for sent in sends if sent.which == 0)
        return [
            Task(runs=(runs[0],), receives=receives, sends=early),
            Task(runs=(runs[1],), sends=late),
        ]

    def _sent(self, works: tuple[Work, ...], p2p: P2P) -> Sent:
        payload = Pass.FORWARD if p2p.payload == "activation" else Pass.BACKWARD
        which = next(
            index
            for index, work in enumerate(works)
            if work.micro_batch == p2p.micro_batch and (work.kind is Pass.FORWARD) == (payload is Pass.FORWARD)
        )
        seconds = self._p2p_seconds(p2p.source, p2p.target)
        return Sent(p2p=p2p, which=which, seconds=seconds, num_bytes=self.p2p_bytes if seconds else 0.0)

    @cached_property
    def p2p_bytes(self) -> float:
        """A rank's share of one micro-batch's hidden states (bf16), for its neighbour in another stage."""
        return self.scenario.tokens_per_rank * self.scenario.model.hidden * BYTES_PER_ELEMENT["bf16"]

    def _p2p_seconds(self, source: int, target: int) -> float:
        if source == target:
            return 0.0
        if (source, target) not in self.sends:
            first, second = self.mesh.rank(stage=source, index=0), self.mesh.rank(stage=target, index=0)
            self.sends[source, target] = send_recv_seconds(self.fabric, first, second, self.p2p_bytes)
        return self.sends[source, target].seconds

    def _blocks(self, stage: int, pipeline_rank: int, number: int, ranks_R: NDArray[np.int64]) -> Mapping[Kinds, Block]:
        holders = sum(stage in stages for stages in self.schedule.stages_of_rank)
        if holders == 1:
            return self._write_blocks(stage, pipeline_rank, number, ranks_R)
        if (pipeline_rank, number) not in self.shapes:
            self.shapes[pipeline_rank, number] = group_shape(self.fabric, ranks_R)
        key = (stage, number, self.shapes[pipeline_rank, number], self.ranks.key(ranks_R))
        if key not in self.blocks:
            self.blocks[key] = self._write_blocks(stage, pipeline_rank, number, ranks_R)
        return self.blocks[key]

    def _early_gathers(self, stage: int, ranks_R: NDArray[np.int64]) -> Mapping[str, EarlyGather]:
        if not self.scenario.gathers_beside:
            return {}
        samples = max(1, len(self.samples))
        return self.parameters.early_gathers(self.fabric, stage, ranks=len(ranks_R), samples=samples)

    def _write_blocks(
        self, stage: int, pipeline_rank: int, number: int, ranks_R: NDArray[np.int64]
    ) -> Mapping[Kinds, Block]:
        model, layers = self.scenario.model, self.scenario.stage_layers[stage]
        last = stage == self.schedule.num_stages - 1
        chosen = [layer for layer in layers if not model.is_dense(layer)]
        if last:
            chosen += range(model.layers, model.layers + model.mtp_layers)
        loads = None
        if self.samples and chosen:
            loads = group_loads(
                self.scenario,
                self.fabric,
                self.samples,
                group=number,
                stage=pipeline_rank,
                layers=[model.moe_number(layer) for layer in chosen],
                ranks_R=ranks_R,
                compiled=self.compiled,
            )
        plan = StagePlan(
            layers=layers,
            moe_layers=tuple(chosen) if loads else (),
            first=stage == 0,
            last=last,
            stage=stage,
            held=tuple(other for other in self.schedule.stages_of_rank[pipeline_rank] if other < stage),
            gathers=self._early_gathers(stage, ranks_R),
        )
        links = GroupLinks(self.fabric, ranks_R, samples=max(1, len(self.samples)))
        return self._priced(
            ranks_R, lambda kernels: stage_blocks(self.scenario, kernels, plan, loads, links, host=self.host)
        )


def _block_of(blocks: Mapping[Kinds, Block], work: Work, begun: set[int]) -> Block:
    """Of a work of a chunk; the first forward pass of those not `begun` may be another one."""
    first = work.kind is Pass.FORWARD and work.chunk not in begun
    if first:
        begun.add(work.chunk)
    return blocks[FIRST] if first and FIRST in blocks else blocks[work.kind]


def _jitter(scenario: Scenario, kernels: KernelModel, host: HostModel) -> Jitter:
    """How far ranks are apart: stated speeds stand for the chips', and a host that never limits has none."""
    if not scenario.cluster.jitter:
        return NO_JITTER
    found = kernels.jitter
    if scenario.cluster.speeds != Speeds():
        found = replace(found, constant=0.0)
    return replace(found, host=0.0, host_white=0.0) if host == FREE_HOST else found


def _transfer_sources(
    groups: Sequence[GroupProgram], collectives: Sequence[Reduction], sends: Iterable[CollectiveEstimate]
) -> tuple[str, ...]:
    """What the kinds of transfers and collectives rest on, in the order in which they first appear."""
    blocks = dict.fromkeys(run.block for group in groups for task in group.tasks for run in task.runs)
    labels = {
        (operation.label.part, operation.label.collective, getattr(operation.transfers_M[0], "source", ""))
        for block in blocks
        for operation in block.operations
        if operation.transfers_M
    }
    exchanges = Part.DISPATCH, Part.COMBINE
    found = {(str(part if part in exchanges else collective), source) for part, collective, source in labels}
    found |= {(str(collective.collective), collective.rests_on) for collective in collectives}
    found |= {("send_recv", send.source) for send in sends}
    return tuple(f"{name}: {source}" for name, source in sorted(found) if source)
