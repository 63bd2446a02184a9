"""From a scenario and its routing samples to the program of one optimizer step.

Legend: S routing samples, R ranks of a group.
"""

from collections.abc import Sequence

from moesim.compute import KernelModel
from moesim.network import Fabric, all_gather_seconds, all_reduce_seconds, reduce_scatter_seconds
from moesim.parallel import Mesh
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.flops import expert_parameters, parameters
from moesim.sim.loads import RoutingSample, group_loads
from moesim.sim.operations import Block
from moesim.sim.program import GroupProgram, StepProgram, micro_batch_blocks, optimizer_block
from moesim.sim.reductions import Members, Reduction, parameter_shares
from moesim.sim.software import SOFTWARE
from moesim.sim.writer import KernelWriter


def build_program(
    scenario: Scenario, *, fabric: Fabric, kernels: KernelModel, samples: Sequence[RoutingSample]
) -> StepProgram:
    """The step of all expert groups; `samples` run in lockstep and are empty for a dense model."""
    mesh = Mesh(scenario.parallelism, scenario.cluster)
    dense, expert = _local_parameters(scenario)
    software = SOFTWARE[scenario.implementation.kind]
    writer = KernelWriter(kernels, dtype=scenario.workload.precision.gemm, category="data_parallel", layer=-1)
    accumulate = Block("accumulate", tuple(software.accumulation(writer, parameters=dense + expert)))
    before, after = software.flat_copies(writer, parameters=_reduced_parameters(mesh, dense=dense, expert=expert))
    groups = []
    for number, ranks_R in enumerate(mesh.expert_groups()):
        loads = group_loads(scenario, fabric, samples, group=number, ranks_R=ranks_R) if samples else []
        forward, backward = micro_batch_blocks(scenario, kernels, loads)
        schedule = [
            part
            for micro_batch in range(scenario.num_micro_batches)
            for part in ((forward, micro_batch, False), (backward, micro_batch, True), (accumulate, micro_batch, True))
            if part[0] is not accumulate or (micro_batch > 0 and accumulate.operations)
        ]
        if before:
            schedule.append((Block("flatten", tuple(before)), -1, False))
        groups.append(GroupProgram(ranks_R=ranks_R, schedule=tuple(schedule)))
    zero = scenario.parallelism.zero
    replicas = len(mesh.expert_gradient_groups()[0])
    updated = parameter_shares(
        dense=dense, expert=expert, data=scenario.parallelism.data, replicas=replicas, zero=(zero.dense, zero.expert)
    )
    reductions, gathers = _collectives(scenario, fabric, mesh, dense=dense, expert=expert)
    return StepProgram(
        groups=tuple(groups),
        reductions=tuple(reductions),
        optimizer=Block("optimizer", (*after, *optimizer_block(scenario, kernels, parameters=updated).operations)),
        gathers=tuple(gathers),
        host=software.host_model(kernels),
        slowdown=kernels.contention.compute,
        samples=max(1, len(samples)),
    )


def _local_parameters(scenario: Scenario) -> tuple[float, float]:
    """Parameters that one rank holds: dense ones (shared experts and routers too), and those of its routed experts."""
    model = scenario.model
    routed = model.moe_layers * model.experts * expert_parameters(model)
    return parameters(model).total - routed, routed / scenario.parallelism.expert


def _reduced_parameters(mesh: Mesh, *, dense: float, expert: float) -> float:
    """Parameters of one rank whose gradients other ranks hold too."""
    shared = dense if len(mesh.dense_gradient_groups()[0]) > 1 else 0.0
    return shared + (expert if len(mesh.expert_gradient_groups()[0]) > 1 else 0.0)


def _collectives(
    scenario: Scenario, fabric: Fabric, mesh: Mesh, *, dense: float, expert: float
) -> tuple[list[Reduction], list[Reduction]]:
    """Gradient reductions of dense and expert parameters, and the gathers of updated weights under ZeRO 1."""
    precision, zero = scenario.workload.precision, scenario.parallelism.zero
    gradient, weight = BYTES_PER_ELEMENT[precision.gradients], BYTES_PER_ELEMENT[precision.weights]
    reductions, gathers = [], []
    kinds = (
        ("dense", dense, zero.dense, mesh.dense_gradient_groups()),
        ("expert", expert, zero.expert, mesh.expert_gradient_groups()),
    )
    for name, count, stage, members in kinds:
        if len(members[0]) == 1 or count == 0:
            continue
        ranks: Members = tuple(members)
        if stage == 0:
            estimate = all_reduce_seconds(fabric, members[0], count * gradient)
            reductions.append(Reduction(f"all_reduce.{name}", ranks, estimate.seconds, "network"))
            continue
        scatter = reduce_scatter_seconds(fabric, members[0], count * gradient)
        gather = all_gather_seconds(fabric, members[0], count * weight)
        reductions.append(Reduction(f"reduce_scatter.{name}", ranks, scatter.seconds, "network"))
        gathers.append(Reduction(f"all_gather.{name}", ranks, gather.seconds, "network"))
    return reductions, gathers
