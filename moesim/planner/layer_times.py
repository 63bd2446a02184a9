"""Seconds of the parts that steps are made of, each executed on one rank group.

A part (one kind of layer, embedding, head) is cut out of the program of a small step, that of one rank group on its
nodes with a few layers and two micro-batches, and run by the executor of the simulation itself: waiting for hot ranks,
overlap and recomputation count. Layouts that differ in data and pipeline parallelism, schedule or ZeRO share parts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from moesim.engine.executor import GroupExecutor
from moesim.engine.executor_steps import Labels
from moesim.engine.step_clock import step_kernels
from moesim.kernels import KernelModel, compute_model
from moesim.network import Fabric, build_fabric
from moesim.network.parameters import NetworkParameters
from moesim.parallel import Mesh, TrafficSample, TrafficSampler
from moesim.parallel.memory.rows import RoutedRows, even_rows, routed_rows
from moesim.program import StepProgram, build_program
from moesim.program.operations import Block, Operation, Run
from moesim.results.spans import Part, SpanRecorder
from moesim.scenario import Compute, GpuSpec, Model, Parallelism, PipelineSchedule, PopularityRouting, Scenario, Zero
from moesim.schedules import PLAIN, SPLIT, ScheduleFacts
from moesim.seeding import stream
from moesim.trace import RoutingTrace

REPEATED_PASSES = 2  # micro-batches that pass one behind the other
REPEATED_WITH_COLLECTIVES = 4  # likewise where collectives of one reach into the next


class PassSeconds(NamedTuple):
    """Seconds of one micro-batch through a part: forward, backward, backward without and only with weights' gradients.

    `pair` is a forward pass overlapped with a backward pass. What the schedule does not have is 0.
    """

    forward: float
    backward: float
    gradient_of_input: float
    gradient_of_weights: float
    pair: float

    def __add__(self, other: "PassSeconds") -> "PassSeconds":  # type: ignore[override]
        return PassSeconds(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> "PassSeconds":
        """`count` such parts one behind the other."""
        return PassSeconds(*(count * seconds for seconds in self))


ZERO_SECONDS = PassSeconds(0.0, 0.0, 0.0, 0.0, 0.0)


class PartSeconds(NamedTuple):
    """The parts of one rank group: a dense layer, a layer with experts, and the two ends of the model."""

    dense_layer: PassSeconds
    moe_layer: PassSeconds
    embedding: PassSeconds
    head: PassSeconds


def _is_embedding(operation: Operation) -> bool:
    return operation.part is Part.EMBEDDING


@dataclass(frozen=True, kw_only=True, eq=False)
class Passes:
    """The passes of programs with one rank group, by the names of their blocks; `pairs`: also those of two at once."""

    program: StepProgram
    blocks: Mapping[str, Block]
    pairs: bool

    @classmethod
    def of(cls, programs: Sequence[StepProgram], *, pairs: bool) -> "Passes":
        """Those of programs of the same step under different schedules."""
        tasks = [task for program in programs for task in program.groups[0].tasks]
        blocks = {run.block.name: run.block for task in tasks for run in task.runs}
        return cls(program=programs[0], blocks=blocks, pairs=pairs)

    def cut(self, chosen: Callable[[Operation], bool]) -> PassSeconds:
        """Seconds per micro-batch of every pass over the chosen operations, from the first start to the last end."""

        def block(name: str) -> Block:
            operations = self.blocks[name].operations if name in self.blocks else ()
            return Block(name, tuple(operation for operation in operations if chosen(operation)))

        forward, backward = block("forward"), block("backward")
        return PassSeconds(
            forward=self.seconds([[forward]] * REPEATED_PASSES) / REPEATED_PASSES,
            backward=self.seconds([[backward]] * REPEATED_PASSES) / REPEATED_PASSES,
            gradient_of_input=self.seconds([[block("backward.input")]] * REPEATED_PASSES) / REPEATED_PASSES,
            gradient_of_weights=self.seconds([[block("backward.weight")]] * REPEATED_PASSES) / REPEATED_PASSES,
            pair=self.seconds([[forward, backward]] * REPEATED_PASSES) / REPEATED_PASSES if self.pairs else 0.0,
        )

    def whole(self) -> tuple[float, float]:
        """Seconds of a forward pass, and of a forward and a backward pass, one micro-batch behind the other."""
        forward, backward = self.blocks["forward"], self.blocks["backward"]
        passes = [[forward], [backward]]
        settled = self.seconds(passes * REPEATED_WITH_COLLECTIVES) - self.seconds(passes * REPEATED_PASSES)
        return self.seconds([[forward]] * REPEATED_PASSES) / REPEATED_PASSES, settled / (
            REPEATED_WITH_COLLECTIVES - REPEATED_PASSES
        )

    def seconds(self, actions: Sequence[Sequence[Block]]) -> float:
        """Until the last rank has done all actions, one micro-batch of each kind of block behind the other."""
        if not any(block.operations for blocks in actions for block in blocks):
            return 0.0
        program, ranks = self.program, len(self.program.groups[0].ranks_R)
        executor = GroupExecutor(
            samples=1,
            ranks=ranks,
            host=replace(program.host, ahead=0.0),
            beside_R=program.groups[0].beside_R,
            recorder=SpanRecorder(
                rows=2 * sum(len(block.operations) for blocks in actions for block in blocks), samples=1, ranks=ranks
            ),
            labels=Labels(),
        )
        for number, blocks in enumerate(actions):
            executor.execute([Run(block, number, block.name != "forward") for block in blocks])
        return float(max(np.max(executor.done_SR), np.max(executor.reduced_SR)))


def part_seconds(passes: Passes, model: Model) -> PartSeconds:
    """The parts of a short `model`, operation by operation as their labels say where they belong."""
    dense, moe = range(model.dense_layers), range(model.dense_layers, model.layers)
    return PartSeconds(
        dense_layer=passes.cut(lambda op: op.label.layer in dense).times(1 / max(1, len(dense))),
        moe_layer=passes.cut(lambda op: op.label.layer in moe).times(1 / max(1, len(moe))),
        embedding=passes.cut(_is_embedding),
        head=passes.cut(lambda op: not _is_embedding(op) and op.label.layer not in dense and op.label.layer not in moe),
    )


def with_sharding(cut: PartSeconds, scenario: Scenario, *, few: Passes, more: Passes, layers: int) -> PartSeconds:
    """The parts where ZeRO gathers and reduces layer by layer: collectives reach across layers and micro-batches.

    What a layer takes is the difference between passes over `layers` more of them (`more`, `few`), and the head is what
    is then left; the parts of backward passes and pairs keep the proportions of the parts cut apart (`cut`).
    """
    (few_forward, few_both), (forward, both) = few.whole(), more.whole()
    layer_forward, layer_both = (forward - few_forward) / layers, (both - few_both) / layers
    name = "moe_layer" if scenario.model.experts else "dense_layer"
    repeated = _stretched(getattr(cut, name), layer_forward, layer_both - layer_forward)
    found = cut._replace(**{name: repeated})
    num_layers = scenario.model.layers
    dense = scenario.model.dense_layers
    others = found.embedding + found.dense_layer.times(dense) + found.moe_layer.times(num_layers - dense)
    rest_forward = max(0.0, forward - others.forward)
    rest_backward = max(0.0, both - forward - others.backward)
    return found._replace(head=_stretched(cut.head, rest_forward, rest_backward))


def _stretched(part: PassSeconds, forward: float, backward: float) -> PassSeconds:
    """The part with other seconds of its two passes; their parts in proportion."""
    factor = backward / part.backward if part.backward else 0.0
    saved = part.forward + part.backward - part.pair
    return PassSeconds(
        forward=forward,
        backward=backward,
        gradient_of_input=factor * part.gradient_of_input,
        gradient_of_weights=factor * part.gradient_of_weights,
        pair=forward + backward - saved,
    )


LAYERS = 4  # MoE layers of a part, one behind the other: each has its own hot ranks
MICRO_BATCHES = 4  # that it is drawn for, at most

TraceOf = Callable[[Scenario], RoutingTrace | None]


@dataclass(frozen=True)
class LayerTimes:
    """Pieces of one model by what determines them, each made once; `trace_of` gives the routing of a scenario."""

    trace_of: TraceOf
    _parts: dict[tuple[object, ...], PartSeconds] = field(init=False, default_factory=dict, repr=False)
    _kernels: dict[tuple[GpuSpec, Compute], KernelModel] = field(init=False, default_factory=dict, repr=False)
    _samples: dict[tuple[object, ...], TrafficSample | None] = field(init=False, default_factory=dict, repr=False)
    _clocked: dict[tuple[object, ...], KernelModel] = field(init=False, default_factory=dict, repr=False)
    _rows: dict[tuple[object, ...], RoutedRows] = field(init=False, default_factory=dict, repr=False)

    def kernels(self, scenario: Scenario) -> KernelModel:
        """The kernel model of the scenario's GPU."""
        key = spec, compute = scenario.cluster.main_pool.spec, scenario.compute
        if key not in self._kernels:
            self._kernels[key] = SharedClocks(compute_model(spec, compute))
        return self._kernels[key]

    def of(self, scenario: Scenario, parameters: NetworkParameters) -> PartSeconds:
        """The parts of the scenario on a network with these constants."""
        group = one_group_of(scenario)
        key = (*_routing_key(group), group.cluster, group.dispatch, group.workload.recompute, parameters)
        if key not in self._parts:
            self._parts[key] = self._made(group, parameters)
        return self._parts[key]

    def rows(self, scenario: Scenario) -> RoutedRows:
        """Rows and copies of the ranks of one rank group in every layer, for the memory."""
        group = one_group_of(scenario)
        key = (*_routing_key(group), group.dispatch)
        if key not in self._rows:
            sample = self._sample(group)
            self._rows[key] = even_rows(group) if sample is None else routed_rows(group, [sample])
        return self._rows[key]

    def sample(self, scenario: Scenario) -> TrafficSample | None:
        """One routing sample of the scenario's group; None for a dense model."""
        return self._sample(one_group_of(scenario))

    def _sample(self, group: Scenario) -> TrafficSample | None:
        """One routing sample of the group."""
        key = (*_routing_key(group), group.cluster.main_pool.gpus_per_node)
        if key not in self._samples:
            trace = self.trace_of(group)
            made = None if trace is None else TrafficSampler(group, trace).draw(stream(group.seed, "sample", 0))
            self._samples[key] = made
        return self._samples[key]

    def _at_step_clock(self, group: Scenario, fabric: Fabric, samples: list[TrafficSample]) -> KernelModel:
        """Kernels at the clock that the power limit leaves the step; few layers tell its load to a few per cent."""
        few = _scheduled(_with_few_layers(group, LAYERS), PLAIN)  # the order of work plays no part
        key = (*_routing_key(few), few.cluster, few.dispatch, few.workload.recompute, fabric.parameters)
        if key not in self._clocked:
            kernels = self.kernels(group)
            self._clocked[key] = step_kernels(few, fabric=fabric, kernels=kernels, samples=samples)
        return self._clocked[key]

    def _made(self, group: Scenario, parameters: NetworkParameters) -> PartSeconds:
        sample = self._sample(group)
        samples = [] if sample is None else [sample]
        fabric = build_fabric(group.cluster, parameters=parameters)
        kernels = self._at_step_clock(group, fabric, samples)
        sharded = Mesh(group.parallelism, group.cluster).shards_by_layer
        facts = group.parallelism.schedule.facts
        every = (PLAIN,) * facts.full_backward + (SPLIT,) * facts.split_backward  # that together have all its passes
        orders = (PLAIN, SPLIT) if sharded else every

        def passes(layers: int) -> Passes:
            short = _with_few_layers(group, layers)
            programs = [
                build_program(_scheduled(short, one), fabric=fabric, kernels=kernels, samples=samples) for one in orders
            ]
            return Passes.of(programs, pairs=sharded or facts.overlaps_pairs)

        short, more = _with_few_layers(group, LAYERS), passes(LAYERS)
        cut = part_seconds(more, short.model)
        fewer = short.model.layers - _with_few_layers(group, LAYERS // 2).model.layers
        if fewer and sharded:
            cut = with_sharding(cut, short, few=passes(LAYERS // 2), more=more, layers=fewer)
        return cut


def passes_of(facts: ScheduleFacts) -> ScheduleFacts:
    """The simplest schedule with the same kinds of passes, else the schedule itself."""
    return next((simple for simple in (PLAIN, SPLIT) if simple.passes == facts.passes), facts)


def _scheduled(group: Scenario, facts: ScheduleFacts) -> Scenario:
    schedule = PipelineSchedule(kind=facts.name)
    return group.model_copy(update={"parallelism": group.parallelism.model_copy(update={"schedule": schedule})})


def one_group_of(scenario: Scenario) -> Scenario:
    """The smallest scenario with the same parts: the ranks of one rank group, on their nodes, without a pipeline.

    Its schedule only says whether backward passes are split; ZeRO counts where it works layer by layer.
    """
    mesh, pool = scenario.parallelism, scenario.cluster.main_pool
    groups = Mesh(mesh, scenario.cluster)
    ranks = groups.group_size
    data = ranks // (mesh.tensor * mesh.context)
    batches = min(MICRO_BATCHES, scenario.num_drawn_micro_batches)
    return scenario.model_copy(
        update={
            "name": "one rank group",
            "parallelism": Parallelism(
                data=data,
                context=mesh.context,
                tensor=mesh.tensor,
                expert=mesh.expert,
                expert_tensor=mesh.expert_tensor,
                zero=mesh.zero if groups.shards_by_layer else Zero(),
                schedule=PipelineSchedule(kind=passes_of(mesh.schedule.facts).name),
            ),
            "cluster": scenario.cluster.model_copy(
                update={"pools": (pool.model_copy(update={"nodes": -(-ranks // pool.gpus_per_node)}),)}
            ),
            "workload": scenario.workload.model_copy(
                update={"global_batch": batches * data * scenario.workload.micro_batch}
            ),
        }
    )


def _with_few_layers(group: Scenario, layers: int) -> Scenario:
    """One dense layer and `layers` with experts; a dense model has `layers` dense ones. Fewer where there are fewer."""
    model = group.model
    moe = min(layers, model.moe_layers)
    dense = min(1 if moe else layers, model.dense_layers)
    return group.model_copy(update={"model": model.with_few_layers(dense=dense, moe=moe)})


@dataclass(frozen=True, eq=False)
class _IdentityKey:
    """A key that equals those of the same object, and keeps it: no other can come to its place in memory."""

    it: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _IdentityKey) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


def _routing_key(group: Scenario) -> tuple[object, ...]:
    """What decides the rows and copies of a group; counts of experts are long, so they count by identity."""
    routing = group.routing
    return (
        group.parallelism,
        group.workload.micro_batch,
        group.workload.global_batch,
        _IdentityKey(routing.counts) if isinstance(routing, PopularityRouting) else routing,
        group.router_shape() if group.model.experts else None,
        group.capacity,
    )


LOAD_GRID = 5e12  # FLOP/s, half a per cent of an H100's peak: the clock follows load by less than that


@dataclass(frozen=True, eq=False)
class SharedClocks:
    """`kernels` whose `at_load` gives the same model again for the same load, loads being rounded to LOAD_GRID.

    Everything else is that of `kernels`.
    """

    kernels: KernelModel
    _known: dict[float, KernelModel] = field(init=False, default_factory=dict, repr=False)

    def at_load(self, flops_per_second: float) -> Any:
        """The kernels in a step of about this mean load; itself where there is no power limit."""
        load = round(flops_per_second / LOAD_GRID) * LOAD_GRID
        if load not in self._known:
            self._known[load] = self.kernels.at_load(load)
        found = self._known[load]
        return self if found is self.kernels else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.kernels, name)
