"""Seconds of the pieces that steps are made of: one kind of layer, embedding, head; executed on one rank group.

A piece is cut out of the program of a small step, that of one rank group on its nodes with a few layers and two
micro-batches, and run by the executor of the simulation itself: waiting for hot ranks, overlap and recomputation count.
Layouts that differ in data and pipeline parallelism, schedule or ZeRO share their pieces.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from moesim.compute import KernelModel, kernel_model
from moesim.network import build_fabric
from moesim.network.parameters import NetworkParameters
from moesim.parallel import TrafficSample, TrafficSampler
from moesim.parallel.memory_rows import RoutedRows, even_rows, routed_rows
from moesim.results.spans import SpanRecorder
from moesim.scenario import Parallelism, PopularityRouting, Scenario
from moesim.seeding import stream
from moesim.sim import StepProgram, build_program
from moesim.sim.executor import GroupExecutor
from moesim.sim.operations import Block, Operation, Run
from moesim.sim.walk import Labels
from moesim.trace import RoutingTrace

LAYERS = 4  # MoE layers of a piece, one behind the other: each has its own hot ranks
MICRO_BATCHES = 2  # that pass through it

TraceOf = Callable[[Scenario], RoutingTrace | None]


class PassSeconds(NamedTuple):
    """Seconds of one micro-batch through a piece: forward, backward, backward without and only with weights' gradients.

    `pair` is a forward pass overlapped with a backward pass.
    """

    forward: float
    backward: float
    gradient_of_input: float
    gradient_of_weights: float
    pair: float

    def __add__(self, other: "PassSeconds") -> "PassSeconds":  # type: ignore[override]
        return PassSeconds(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, count: float) -> "PassSeconds":
        """`count` such pieces one behind the other."""
        return PassSeconds(*(count * seconds for seconds in self))


NOTHING = PassSeconds(0.0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """A dense layer, a layer with experts, and the two ends of the model; `rows` of one rank group for the memory."""

    dense_layer: PassSeconds
    moe_layer: PassSeconds
    embedding: PassSeconds
    head: PassSeconds
    rows: RoutedRows


@dataclass(frozen=True)
class PieceStore:
    """Pieces of one model by what determines them, each made once; `trace_of` gives the routing of a scenario."""

    trace_of: TraceOf
    _pieces: dict[tuple[object, ...], Pieces] = field(default_factory=dict, repr=False)
    _kernels: dict[tuple[str, str | None], KernelModel] = field(default_factory=dict, repr=False)
    _samples: dict[tuple[object, ...], TrafficSample | None] = field(default_factory=dict, repr=False)

    def kernels(self, scenario: Scenario) -> KernelModel:
        """The kernel model of the scenario's GPU."""
        key = scenario.cluster.pools[0].gpu, scenario.compute.profile
        if key not in self._kernels:
            self._kernels[key] = kernel_model(*key)
        return self._kernels[key]

    def of(self, scenario: Scenario, parameters: NetworkParameters) -> Pieces:
        """The pieces of the scenario on a network with these constants."""
        cell = cell_of(scenario)
        key = (*_routing_key(cell), cell.cluster, cell.dispatch, cell.workload.recompute, parameters)
        if key not in self._pieces:
            self._pieces[key] = self._made(cell, parameters)
        return self._pieces[key]

    def _sample(self, cell: Scenario) -> TrafficSample | None:
        """One routing sample of the cell."""
        key = (*_routing_key(cell), cell.cluster.pools[0].gpus_per_node)
        if key not in self._samples:
            trace = self.trace_of(cell)
            made = None if trace is None else TrafficSampler(cell, trace).draw(stream(cell.seed, "sample", 0))
            self._samples[key] = made
        return self._samples[key]

    def _made(self, cell: Scenario, parameters: NetworkParameters) -> Pieces:
        sample, kernels = self._sample(cell), self.kernels(cell)
        short = _with_few_layers(cell)
        fabric = build_fabric(cell.cluster, parameters=parameters)
        samples = [] if sample is None else [sample]
        program = build_program(short, fabric=fabric, kernels=kernels, samples=samples)
        model, cut = short.model, _Cut.of(program)
        dense, moe = range(model.dense_layers), range(model.dense_layers, model.layers)
        return Pieces(
            dense_layer=cut.seconds(lambda op: op.label.layer in dense).times(1 / max(1, len(dense))),
            moe_layer=cut.seconds(lambda op: op.label.layer in moe).times(1 / max(1, len(moe))),
            embedding=cut.seconds(_is_embedding),
            head=cut.seconds(
                lambda op: not _is_embedding(op) and op.label.layer not in dense and op.label.layer not in moe
            ),
            rows=even_rows(cell) if sample is None else routed_rows(cell, samples),
        )


def _is_embedding(operation: Operation) -> bool:
    return operation.label.layer < 0 and operation.label.name.startswith("embedding")


def cell_of(scenario: Scenario) -> Scenario:
    """The smallest scenario with the same pieces: the ranks of one rank group, on their nodes, without a pipeline."""
    mesh, pool = scenario.parallelism, scenario.cluster.pools[0]
    shared = mesh.tensor * mesh.context
    ranks = math.lcm(mesh.expert * mesh.expert_tensor, shared)
    data = ranks // shared
    batches = min(MICRO_BATCHES, scenario.num_micro_batches)
    return scenario.model_copy(
        update={
            "name": "cell",
            "parallelism": Parallelism(
                data=data,
                context=mesh.context,
                tensor=mesh.tensor,
                expert=mesh.expert,
                expert_tensor=mesh.expert_tensor,
            ),
            "cluster": scenario.cluster.model_copy(
                update={"pools": (pool.model_copy(update={"nodes": -(-ranks // pool.gpus_per_node)}),)}
            ),
            "workload": scenario.workload.model_copy(
                update={"global_batch": batches * data * scenario.workload.micro_batch}
            ),
        }
    )


def _with_few_layers(cell: Scenario) -> Scenario:
    model = cell.model
    dense = min(1, model.dense_layers)
    moe = min(LAYERS, model.moe_layers)
    return cell.model_copy(update={"model": model.model_copy(update={"layers": dense + moe, "dense_layers": dense})})


def _routing_key(cell: Scenario) -> tuple[object, ...]:
    """What decides the rows and copies of a cell; counts of experts are long, so they count by identity."""
    routing = cell.routing
    return (
        cell.parallelism,
        cell.workload.micro_batch,
        cell.workload.global_batch,
        id(routing.counts) if isinstance(routing, PopularityRouting) else routing,
        cell.router_shape() if cell.model.experts else None,
        cell.capacity,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Cut:
    """The two passes of a program's only group, to be cut into pieces."""

    program: StepProgram
    forward: Block
    backward: Block

    @classmethod
    def of(cls, program: StepProgram) -> "_Cut":
        runs = [run for task in program.groups[0].tasks for run in task.runs]
        forward = next(run.block for run in runs if run.block.name == "forward")
        backward = next(run.block for run in runs if run.block.name == "backward")
        return cls(program=program, forward=forward, backward=backward)

    def seconds(self, chosen: Callable[[Operation], bool]) -> PassSeconds:
        """Seconds per micro-batch of every pass over the chosen operations, from the first start to the last end."""

        def block(name: str, operations: Iterable[Operation]) -> Block:
            return Block(name, tuple(operation for operation in operations if chosen(operation)))

        forward, backward = block("forward", self.forward.operations), block("backward", self.backward.operations)
        early = block("input", (op for op in backward.operations if not op.is_weight_gradient))
        late = block("weight", (op for op in backward.operations if op.is_weight_gradient))
        return PassSeconds(
            forward=self._executed(forward),
            backward=self._executed(backward),
            gradient_of_input=self._executed(early),
            gradient_of_weights=self._executed(late),
            pair=self._executed(forward, backward),
        )

    def _executed(self, *blocks: Block) -> float:
        if not any(block.operations for block in blocks):
            return 0.0
        program, ranks = self.program, len(self.program.groups[0].ranks_R)
        actions: Sequence[tuple[Run, ...]] = [
            tuple(Run(block, number, block.name != "forward") for block in blocks) for number in range(MICRO_BATCHES)
        ]
        rows = 2 * MICRO_BATCHES * sum(len(block.operations) for block in blocks)
        executor = GroupExecutor(
            samples=1,
            ranks=ranks,
            host=program.host,
            slowdown=program.slowdown,
            recorder=SpanRecorder(rows=rows, samples=1, ranks=ranks),
            labels=Labels(),
        )
        for runs in actions:
            executor.execute(runs)
        return float(np.max(executor.done_SR)) / len(actions)
