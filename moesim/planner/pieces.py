"""Seconds of the pieces that steps are made of: one kind of layer, embedding, head; executed on one rank group.

A piece is cut out of the program of a small step, that of one rank group on its nodes with a few layers and two
micro-batches, and run by the executor of the simulation itself: waiting for hot ranks, overlap and recomputation count.
Layouts that differ in data and pipeline parallelism, schedule or ZeRO share their pieces.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from moesim.engine.step_clock import step_kernels
from moesim.kernels import KernelModel, kernel_model
from moesim.network import Fabric, build_fabric
from moesim.network.parameters import NetworkParameters
from moesim.parallel import Mesh, TrafficSample, TrafficSampler
from moesim.parallel.memory_rows import RoutedRows, even_rows, routed_rows
from moesim.planner.clocks import SharedClocks
from moesim.planner.passes import Cut, Passes, cut_pieces, with_sharding
from moesim.program import build_program
from moesim.scenario import GpuSpec, Parallelism, PipelineSchedule, PopularityRouting, Scenario, Zero
from moesim.schedules import PLAIN, SPLIT, ScheduleFacts
from moesim.seeding import stream
from moesim.trace import RoutingTrace

LAYERS = 4  # MoE layers of a piece, one behind the other: each has its own hot ranks
MICRO_BATCHES = 4  # that it is drawn for, at most

TraceOf = Callable[[Scenario], RoutingTrace | None]


@dataclass(frozen=True)
class PieceStore:
    """Pieces of one model by what determines them, each made once; `trace_of` gives the routing of a scenario."""

    trace_of: TraceOf
    _pieces: dict[tuple[object, ...], Cut] = field(init=False, default_factory=dict, repr=False)
    _kernels: dict[tuple[GpuSpec, str | None], KernelModel] = field(init=False, default_factory=dict, repr=False)
    _samples: dict[tuple[object, ...], TrafficSample | None] = field(init=False, default_factory=dict, repr=False)
    _clocked: dict[tuple[object, ...], KernelModel] = field(init=False, default_factory=dict, repr=False)
    _rows: dict[tuple[object, ...], RoutedRows] = field(init=False, default_factory=dict, repr=False)

    def kernels(self, scenario: Scenario) -> KernelModel:
        """The kernel model of the scenario's GPU."""
        key = scenario.cluster.pools[0].spec, scenario.compute.profile
        if key not in self._kernels:
            self._kernels[key] = SharedClocks(kernel_model(*key))
        return self._kernels[key]

    def of(self, scenario: Scenario, parameters: NetworkParameters) -> Cut:
        """The pieces of the scenario on a network with these constants."""
        cell = cell_of(scenario)
        key = (*_routing_key(cell), cell.cluster, cell.dispatch, cell.workload.recompute, parameters)
        if key not in self._pieces:
            self._pieces[key] = self._made(cell, parameters)
        return self._pieces[key]

    def rows(self, scenario: Scenario) -> RoutedRows:
        """Rows and copies of the ranks of one rank group in every layer, for the memory."""
        cell = cell_of(scenario)
        key = (*_routing_key(cell), cell.dispatch)
        if key not in self._rows:
            sample = self._sample(cell)
            self._rows[key] = even_rows(cell) if sample is None else routed_rows(cell, [sample])
        return self._rows[key]

    def sample(self, scenario: Scenario) -> TrafficSample | None:
        """One routing sample of the scenario's cell; None for a dense model."""
        return self._sample(cell_of(scenario))

    def _sample(self, cell: Scenario) -> TrafficSample | None:
        """One routing sample of the cell."""
        key = (*_routing_key(cell), cell.cluster.pools[0].gpus_per_node)
        if key not in self._samples:
            trace = self.trace_of(cell)
            made = None if trace is None else TrafficSampler(cell, trace).draw(stream(cell.seed, "sample", 0))
            self._samples[key] = made
        return self._samples[key]

    def _at_step_clock(self, cell: Scenario, fabric: Fabric, samples: list[TrafficSample]) -> KernelModel:
        """Kernels at the clock that the power limit leaves the step; few layers tell its load to a few per cent."""
        few = _scheduled(_with_few_layers(cell, LAYERS), PLAIN)  # the order of work plays no part
        key = (*_routing_key(few), few.cluster, few.dispatch, few.workload.recompute, fabric.parameters)
        if key not in self._clocked:
            kernels = self.kernels(cell)
            self._clocked[key] = step_kernels(few, fabric=fabric, kernels=kernels, samples=samples)
        return self._clocked[key]

    def _made(self, cell: Scenario, parameters: NetworkParameters) -> Cut:
        sample = self._sample(cell)
        samples = [] if sample is None else [sample]
        fabric = build_fabric(cell.cluster, parameters=parameters)
        kernels = self._at_step_clock(cell, fabric, samples)
        sharded = Mesh(cell.parallelism, cell.cluster).shards_by_layer
        facts = cell.parallelism.schedule.facts
        orders = (PLAIN, SPLIT) if sharded else _orders(facts)

        def passes(layers: int) -> Passes:
            short = _with_few_layers(cell, layers)
            programs = [
                build_program(_scheduled(short, one), fabric=fabric, kernels=kernels, samples=samples) for one in orders
            ]
            return Passes.of(programs, pairs=sharded or facts.overlaps_pairs)

        short, more = _with_few_layers(cell, LAYERS), passes(LAYERS)
        cut = cut_pieces(more, short.model)
        fewer = short.model.layers - _with_few_layers(cell, LAYERS // 2).model.layers
        if fewer and sharded:
            cut = with_sharding(cut, short, few=passes(LAYERS // 2), more=more, layers=fewer)
        return cut


def passes_of(facts: ScheduleFacts) -> ScheduleFacts:
    """The simplest schedule with the same kinds of passes, else the schedule itself."""
    return next((simple for simple in (PLAIN, SPLIT) if simple.passes == facts.passes), facts)


def _orders(facts: ScheduleFacts) -> tuple[ScheduleFacts, ...]:
    """Schedules of one pipeline rank that together have every pass of a schedule with these `facts`."""
    return (PLAIN,) * facts.full_backward + (SPLIT,) * facts.split_backward


def _scheduled(cell: Scenario, facts: ScheduleFacts) -> Scenario:
    schedule = PipelineSchedule(kind=facts.name)
    return cell.model_copy(update={"parallelism": cell.parallelism.model_copy(update={"schedule": schedule})})


def cell_of(scenario: Scenario) -> Scenario:
    """The smallest scenario with the same pieces: the ranks of one rank group, on their nodes, without a pipeline.

    Its schedule only says whether backward passes are split; ZeRO counts where it works layer by layer.
    """
    mesh, pool = scenario.parallelism, scenario.cluster.pools[0]
    groups = Mesh(mesh, scenario.cluster)
    ranks = groups.group_size
    data = ranks // (mesh.tensor * mesh.context)
    batches = min(MICRO_BATCHES, scenario.num_drawn_micro_batches)
    return scenario.model_copy(
        update={
            "name": "cell",
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


def _with_few_layers(cell: Scenario, layers: int) -> Scenario:
    """One dense layer and `layers` with experts; a dense model has `layers` dense ones. Fewer where there are fewer."""
    model = cell.model
    moe = min(layers, model.moe_layers)
    dense = min(1 if moe else layers, model.dense_layers)
    return cell.model_copy(update={"model": model.with_few_layers(dense=dense, moe=moe)})


@dataclass(frozen=True, eq=False)
class _Same:
    """A key that equals those of the same object, and keeps it: no other can come to its place in memory."""

    it: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.it is other.it

    def __hash__(self) -> int:
        return id(self.it)


def _routing_key(cell: Scenario) -> tuple[object, ...]:
    """What decides the rows and copies of a cell; counts of experts are long, so they count by identity."""
    routing = cell.routing
    return (
        cell.parallelism,
        cell.workload.micro_batch,
        cell.workload.global_batch,
        _Same(routing.counts) if isinstance(routing, PopularityRouting) else routing,
        cell.router_shape() if cell.model.experts else None,
        cell.capacity,
    )
