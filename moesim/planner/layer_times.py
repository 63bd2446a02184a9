"""Seconds of the parts that steps are made of: one kind of layer, embedding, head; executed on one rank group.

A part is cut out of the program of a small step, that of one rank group on its nodes with a few layers and two
micro-batches, and run by the executor of the simulation itself: waiting for hot ranks, overlap and recomputation count.
Layouts that differ in data and pipeline parallelism, schedule or ZeRO share their parts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moesim.engine.step_clock import step_kernels
from moesim.kernels import KernelModel, kernel_model
from moesim.network import Fabric, build_fabric
from moesim.network.parameters import NetworkParameters
from moesim.parallel import Mesh, TrafficSample, TrafficSampler
from moesim.parallel.memory_rows import RoutedRows, even_rows, routed_rows
from moesim.planner.pass_times import PartSeconds, Passes, part_seconds, with_sharding
from moesim.program import build_program
from moesim.scenario import Compute, GpuSpec, Parallelism, PipelineSchedule, PopularityRouting, Scenario, Zero
from moesim.schedules import PLAIN, SPLIT, ScheduleFacts
from moesim.seeding import stream
from moesim.trace import RoutingTrace

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
        key = spec, compute = scenario.cluster.pools[0].spec, scenario.compute
        if key not in self._kernels:
            self._kernels[key] = SharedClocks(kernel_model(spec, compute.profile, regime=compute.held_regime))
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
        key = (*_routing_key(group), group.cluster.pools[0].gpus_per_node)
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
        orders = (PLAIN, SPLIT) if sharded else _orders(facts)

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


def _orders(facts: ScheduleFacts) -> tuple[ScheduleFacts, ...]:
    """Schedules of one pipeline rank that together have every pass of a schedule with these `facts`."""
    return (PLAIN,) * facts.full_backward + (SPLIT,) * facts.split_backward


def _scheduled(group: Scenario, facts: ScheduleFacts) -> Scenario:
    schedule = PipelineSchedule(kind=facts.name)
    return group.model_copy(update={"parallelism": group.parallelism.model_copy(update={"schedule": schedule})})


def one_group_of(scenario: Scenario) -> Scenario:
    """The smallest scenario with the same parts: the ranks of one rank group, on their nodes, without a pipeline.

    Its schedule only says whether backward passes are split; ZeRO counts where it works layer by layer.
    """
    mesh, pool = scenario.parallelism, scenario.cluster.pools[0]
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
class _Same:
    """A key that equals those of the same object, and keeps it: no other can come to its place in memory."""

    it: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


def _routing_key(group: Scenario) -> tuple[object, ...]:
    """What decides the rows and copies of a group; counts of experts are long, so they count by identity."""
    routing = group.routing
    return (
        group.parallelism,
        group.workload.micro_batch,
        group.workload.global_batch,
        _Same(routing.counts) if isinstance(routing, PopularityRouting) else routing,
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
