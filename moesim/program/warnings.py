"""What a reader of a result must know of the layout, the fabric and the trace before trusting its numbers."""

from collections.abc import Sequence
from pathlib import Path

from moesim.network import Fabric, NetworkParameters
from moesim.parallel import Mesh, TrafficSample
from moesim.parallel.memory.report import MemoryReport
from moesim.program.scenario_fabric import sharing_model
from moesim.recorded.scaling import kept_sizes
from moesim.results.metrics import trace_coverage
from moesim.scenario import Scenario
from moesim.scenario.routing import Routing, TraceRouting, TrainRouting
from moesim.trace.record import MIN_COVERAGE_FOR_CONFIDENCE, MIN_COVERAGE_FOR_RANGE
from moesim.units import format_bandwidth, format_bytes


def sharing_warnings(shared_links: int, cost_s: float) -> list[str]:
    """What groups that fill links together do to each other."""
    if not shared_links:
        return []
    effect = "groups of ranks can fill the same links of the fabric and then slow each other"
    if cost_s < 0:
        effect += "; equal loads keep them in step, which slows them most: hence a negative cost of imbalance"
    return [f"{effect} (links: {shared_links})"]


def _nominal_nvlink(scenario: Scenario) -> list[str]:
    """A bandwidth of the scenario's own may be one that transfers reach; it is taken as the links' nominal one."""
    fabric = scenario.cluster.fabric
    usual = {pool.spec.nvlink_bandwidth for pool in scenario.cluster.pools}
    if fabric.nvlink is None or fabric.nvlink in usual or fabric.nvlink_efficiency is not None:
        return []
    return [
        f"cluster.fabric.nvlink: {format_bandwidth(fabric.nvlink)} is taken as nominal, of which long transfers reach "
        f"{NetworkParameters().nvlink_efficiency:.1%}; if it is what they reach, add nvlink_efficiency: 1"
    ]


def _longer_trace(routing: Routing) -> str:
    """How a trace gets more sequences, where it can; what is drawn is drawn up to a limit."""
    if isinstance(routing, TrainRouting):
        return "; record more with routing.tokens"
    return "; use a trace of more tokens" if isinstance(routing, TraceRouting) else ""


def _sent_once(scenario: Scenario) -> list[str]:
    """A dispatch of fewer copies than the software has."""
    software, dispatch = scenario.implementation.software, scenario.dispatch
    travels = scenario.model.experts and scenario.parallelism.expert > 1 and scenario.model.top_k > 1
    if software.deduplicates or dispatch.deduplicate != "per_rank" or not travels:
        return []
    return [
        f"dispatch.deduplicate: per_rank, as simulated here, sends a token once to a rank; {software.name}'s exchange "
        "sends it for each expert: dispatch.deduplicate: per_expert simulates that"
    ]


def _recorded(scenario: Scenario) -> list[str]:
    """What of a step of one's own does not follow the scenario."""
    file = scenario.implementation.file
    kept = "" if file is None else kept_sizes(Path(file))
    return [f"of the recorded step {Path(str(file)).name} some operations {kept}"] if kept else []


def _free_host(scenario: Scenario) -> list[str]:
    """A pace of the host, where the software's host costs nothing."""
    software, factor = scenario.implementation.software, scenario.compute.host_factor
    if factor == 1 or software.kernels != "switched" or not scenario.implementation.switches.host_is_free:
        return []
    return [
        f"compute.host_factor: {factor:g} changes nothing, since no step of {software.name} waits for a launch here; a "
        "software whose host launches feels it, or implementation.host: launches, cuda_graphs: none"
    ]


def layout_warnings(
    scenario: Scenario, fabric: Fabric, memory: MemoryReport, plain: Sequence[TrafficSample]
) -> list[str]:
    """What a reader must know before trusting the numbers."""
    warnings = []
    if memory.fits_share < 1:
        warnings.append(
            f"{1 - memory.fits_share:.0%} of the routing samples do not fit into memory: the fullest needs "
            f"{format_bytes(memory.peak_bytes)}"
        )
    mesh = Mesh(scenario.parallelism, scenario.cluster)
    warnings += [*_sent_once(scenario), *_recorded(scenario), *_free_host(scenario)]
    crossing = [ranks_R for ranks_R in mesh.expert_groups() if mesh.layout(ranks_R).num_nodes > 1]
    if fabric.core_can_block and any(
        sharing_model(scenario.network, fabric, ranks_R) == "ports" for ranks_R in crossing
    ):
        warnings.append(
            "network.model: ports looks at the fabric's core links one by one: where several block at once a transfer "
            "may come out a fifth short; use fluid"
        )
    rack = fabric.kind.rack_gpus
    if rack is not None and crossing and len(mesh.expert_groups()[0]) <= rack:
        warnings.append(
            f"{len(crossing)} of {len(mesh.expert_groups())} expert groups lie on two racks and dispatch through NICs; "
            "choose parallelism.expert so that groups fill racks, or nodes so that each rack holds whole groups"
        )
    warnings += _nominal_nvlink(scenario)
    if plain and trace_coverage(scenario, plain[0]) < MIN_COVERAGE_FOR_CONFIDENCE:
        has_range = len(plain) > 1 and trace_coverage(scenario, plain[0]) >= MIN_COVERAGE_FOR_RANGE
        effect = "the range of routing is likely too narrow" if has_range else "no range of routing is given"
        of = f"{plain[0].draw.num_trace_sequences} sequences for a batch of {scenario.workload.global_batch}"
        warnings.append(f"the trace has {of}: {effect}{_longer_trace(scenario.routing)}")
    if (scenario.cluster.slowdowns or scenario.cluster.fabric.changes) and len(fabric.common_links_X):
        warnings.append(
            "ranks or links change during the step: that groups of ranks slow each other on links of the core is then "
            "left out"
        )
    if scenario.idle_gpus:
        warnings.append(f"{scenario.idle_gpus} GPUs of the cluster have no rank and are paid for all the same")
    return warnings
