"""The blocks of one pipeline stage on one expert group: its layers' operations per pass.

Legend: L layers of the stage.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

from moesim.kernels import KernelModel
from moesim.kernels.errors import transfers_of
from moesim.network.parameters import Evidence
from moesim.parallel import Mesh
from moesim.parallel.memory.parameters import stage_units
from moesim.program.collectives import GroupLinks, PeerCollective, SideBySide
from moesim.program.gemms import column_parallel, gather_columns
from moesim.program.host import FREE_HOST, HostModel
from moesim.program.loads import LayerLoads
from moesim.program.operations import MAIN, Block, Kind, Operation
from moesim.program.parameters import PARAMETERS, ShardedPart, ShardedStage, gathered_ahead
from moesim.program.sizes import Passes, Step, chain
from moesim.program.software import kernel_list
from moesim.program.writer import KernelWriter
from moesim.results.outcome import Basis
from moesim.results.spans import Part, Phase
from moesim.scenario import Scenario
from moesim.scenario.dispatch import DISPATCH
from moesim.scenario.routers import DEEPSEEK_MOE, facts_in_training
from moesim.schedules import Pass

FIRST: Literal["first"] = "first"  # the first forward pass of a step, where it is another than the later ones
Kinds = Pass | Literal["first"]


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """Which part of the model a stage is: `layers` numbered through the model, and whether it is an end.

    `moe_layers`: those of them with experts, and layers of multi-token prediction. `stage`: its number, and `held`:
    those of other stages on the same rank. `gathers`: of updated weights beside the first forward pass.
    """

    layers: range
    moe_layers: tuple[int, ...]
    first: bool
    last: bool
    stage: int = 0
    held: tuple[int, ...] = ()
    gathers: Mapping[str, Callable[[float], PeerCollective]] = field(default_factory=dict)


def stage_blocks(
    scenario: Scenario,
    kernels: KernelModel,
    plan: StagePlan,
    loads: LayerLoads | None,
    links: GroupLinks | None = None,
    host: HostModel = FREE_HOST,
) -> dict[Kinds, Block]:
    """A block per pass; `loads` holds the MoE layers of the plan, where there are any.

    `links` are those of the rank group, needed where its ranks share sequences or matrices; without them the
    collectives of ZeRO 2 and 3 are left out. `host`: that of the step.
    """
    parts = _parts(scenario, kernels, plan, loads, links, host)
    forward, backward = _passes(scenario, kernels, plan, parts, links)
    late = tuple(operation for operation in backward if _is_put_off(operation))
    early = tuple(operation for operation in backward if not _is_put_off(operation))
    first: dict[Kinds, Block] = {}
    if plan.gathers:
        units = stage_units(scenario, plan.stage, held=plan.held)
        named = [ShardedPart(passes, unit, layer) for (layer, passes), unit in zip(parts, units, strict=True)]
        first = {FIRST: Block("forward.first", tuple(gathered_ahead(named, plan.gathers)))}
    return first | {
        Pass.FORWARD: Block("forward", tuple(forward)),
        Pass.BACKWARD: Block("backward", tuple(backward)),
        Pass.INPUT: Block("backward.input", early),
        Pass.WEIGHT: Block("backward.weight", late),
    }


def _is_put_off(operation: Operation) -> bool:
    """Whether a split backward pass leaves it for later: not the head's, whose logits are too large to be kept."""
    return operation.phase is Phase.WEIGHT_GRADIENT and operation.part is not Part.HEAD


def _parts(
    scenario: Scenario,
    kernels: KernelModel,
    plan: StagePlan,
    loads: LayerLoads | None,
    links: GroupLinks | None,
    host: HostModel,
) -> list[tuple[int, Passes]]:
    """Layers and ends of the model in order, each with the number of its layer."""
    model, software, step = scenario.model, kernel_list(scenario), step_sizes(scenario, links)
    launch = host.forward_launch / host.backward_launch if host.backward_launch else 1.0

    def writer(part: Part, layer: int = -1, spread_S: Sequence[bool] = ()) -> KernelWriter:
        dtype = scenario.workload.precision.kernels
        return KernelWriter(kernels, dtype=dtype, part=part, layer=layer, spread_S=spread_S)

    def layer_parts(layers: Sequence[int], of_layers: LayerLoads | None) -> dict[int, Passes]:
        """Layers that differ in their loads alone are priced together and then taken apart; local ones once more."""
        if not layers:
            return {}
        spread_S = of_layers.spread_S if of_layers else ()
        wholes: dict[bool, Passes] = {}
        for local in dict.fromkeys(map(model.is_local, layers)):
            of_kind = replace(step, local=local)
            part = software.layer_part(writer(Part.ATTENTION, layers[0], spread_S), of_kind, of_layers)
            wholes[local] = _with_recomputation(scenario, part, forward_launches=launch)
        return {
            layer: _of_layer(wholes[model.is_local(layer)], layer, index, len(layers))
            for index, layer in enumerate(layers)
        }

    extra_layers = range(model.layers, model.layers + model.mtp_layers) if plan.last else ()
    dense_layers = [layer for layer in (*plan.layers, *extra_layers) if layer not in plan.moe_layers]
    part_of_layer = layer_parts(dense_layers, None) | layer_parts(plan.moe_layers, loads)
    parts = [(-1, software.embedding_part(writer(Part.EMBEDDING), step))] if plan.first else []
    parts += [(layer, part_of_layer[layer]) for layer in plan.layers]
    if plan.last:
        parts.append((-1, software.head_part(writer(Part.HEAD), step)))
        for layer in extra_layers:
            join = _prediction_join(writer(Part.PREDICTION_JOIN, layer), step)
            head = software.head_part(writer(Part.HEAD), step)
            parts.append((layer, chain(join, part_of_layer[layer], head)))
    return parts


def _passes(
    scenario: Scenario,
    kernels: KernelModel,
    plan: StagePlan,
    parts: Sequence[tuple[int, Passes]],
    links: GroupLinks | None,
) -> Passes:
    """All parts, with the collectives of ZeRO 2 and 3 among them."""
    software, dtype = kernel_list(scenario), scenario.workload.precision.kernels
    if links is None or not Mesh(scenario.parallelism, scenario.cluster).shards_by_layer:
        return chain(*(passes for _, passes in parts))
    units = stage_units(scenario, plan.stage, held=plan.held)
    zero = scenario.parallelism.zero
    named = []
    for (layer, (ahead, back)), unit in zip(parts, units, strict=True):
        gathered = unit.dense * (zero.dense >= PARAMETERS) + unit.expert * (zero.expert >= PARAMETERS)
        w = KernelWriter(kernels, dtype=dtype, part=Part.PARAMETERS, layer=layer)
        apart, together = software.shard_copies(w, parameters=gathered)
        again, _ = software.shard_copies(w.backward, parameters=gathered)
        named.append(ShardedPart(([*apart, *ahead], [*again, *back, *together]), unit, layer))
    return ShardedStage(scenario, links).passes(named)


def _prediction_join(w: KernelWriter, step: Step) -> Passes:
    """The GEMM that joins a token's state and its successor's embedding; tensor ranks then gather its columns."""
    hidden = step.model.hidden
    whole, again = (gather_columns(writer, "mtp.join.whole", step, width=hidden) for writer in (w, w.backward))
    return chain(column_parallel(w, "mtp.join", step, k=2 * hidden, n=hidden), (whole, again))


def _of_layer(part: Passes, layer: int, index: int, layers: int) -> Passes:
    forward, backward = ([op.of_layer(layer, index=index, layers=layers) for op in ops] for ops in part)
    return forward, backward


def step_sizes(scenario: Scenario, links: GroupLinks | None) -> Step:
    """The sizes of one micro-batch on one rank."""
    mesh, software = scenario.parallelism, scenario.implementation.software
    return Step(
        model=scenario.model,
        batch=scenario.workload.micro_batch,
        sequence=scenario.workload.sequence_length,
        quantise=scenario.dispatch.dtype == "fp8",
        remote=mesh.expert * mesh.expert_tensor > 1,
        router=facts_in_training(scenario.router_shape().kind) if scenario.model.experts else DEEPSEEK_MOE,
        shared_beside=scenario.shared_beside,
        software=software,
        switches=scenario.implementation.switches,
        deduplicated=scenario.dispatch.deduplicate != "per_expert",
        gathers=DISPATCH[scenario.dispatch.algorithm].gathers,
        moves_rows=DISPATCH[scenario.dispatch.algorithm].moves_rows and mesh.expert * mesh.expert_tensor > 1,
        tensor=mesh.tensor,
        context=mesh.context,
        expert_tensor=mesh.expert_tensor,
        links=links,
        weights_beside=scenario.overlap.weight_gradients,
    )


def _with_recomputation(scenario: Scenario, part: Passes, *, forward_launches: float) -> Passes:
    """One layer whose backward pass first repeats what was not kept.

    `forward_launches`: what a launch of the forward pass costs the host, in those of the backward pass.
    """
    forward, backward = part
    again_of = partial(_repeated, forward_launches=forward_launches)
    if scenario.workload.recompute == "full":
        return forward, [*map(again_of, forward), *backward]
    words = scenario.workload.recomputed_parts
    repeated = [operation for operation in forward if words.intersection(operation.again)]
    again = list(map(again_of, repeated))
    if not any(operation.kind is Kind.FORK for operation in again):  # nothing runs beside them
        again = [replace(operation, chain=MAIN) for operation in again]
    return forward, [*again, *backward]


def _repeated(operation: Operation, *, forward_launches: float) -> Operation:
    """The same operation in the backward pass: compute counts as recomputation, transfers keep their own category."""
    category = "recompute" if operation.kind is Kind.COMPUTE else operation.label.category
    name = f"{operation.label.name}.again"
    label = operation.label._replace(name=name, category=category, phase=Phase.RECOMPUTE)
    return replace(operation, label=label, launches=operation.launches * forward_launches)


def tensor_bytes(block: Block) -> float:
    """Bytes that ranks which share layers send in a block, all of them together, mean over its micro-batches."""
    return sum(
        sum(moved.moved_bytes for moved in operation.transfers_M if isinstance(moved, PeerCollective | SideBySide))
        / len(operation.transfers_M)
        for operation in block.operations
        if operation.label.category == "tensor"
    )


def source_seconds(block: Block) -> Iterable[tuple[Basis, float]]:
    """(what it rests on, mean seconds) of every operation of a block."""
    for operation in block.operations:
        category = operation.label.category
        if operation.seconds_MSR is not None:
            alike = operation.seconds_MSR.size == 1  # most are: then spare the mean
            seconds = operation.seconds_MSR.item() if alike else float(operation.seconds_MSR.mean())
            yield Basis(category, operation.source, operation.error_family), seconds
        elif operation.transfers_M:
            alone = [float(prepared.alone_R.mean()) for prepared in operation.transfers_M]
            evidence = getattr(operation.transfers_M[0], "evidence", Evidence.NONE)
            yield Basis(category, operation.source, transfers_of(evidence)), sum(alone) / len(alone)
