"""simulate(scenario): the only place that wires the layers together. Read it from top to bottom."""

from pathlib import Path

from moesim.engine import simulate_samples, step_kernels
from moesim.kernels import kernel_model
from moesim.parallel.memory_remedy import check_memory
from moesim.program.drawn_routing import draw_samples, obtain_trace, rows_of_variant
from moesim.program.scenario_fabric import scenario_fabric
from moesim.program.warnings import layout_warnings, sharing_warnings
from moesim.results import RunRecord
from moesim.results.assemble import Simulated, assemble
from moesim.results.plausible import check_plausible
from moesim.results.replacing import replacing_facts
from moesim.routing.progress import ProgressCallback
from moesim.scenario import Scenario
from moesim.scenario.check import require_supported
from moesim.trace import RoutingTrace

__all__ = ["draw_samples", "mean_step_seconds", "obtain_trace", "simulate"]


def simulate(
    scenario: Scenario, *, progress: ProgressCallback | None = None, cache_dir: Path | None = None
) -> RunRecord:
    """Simulate one optimizer step of `scenario` and derive its numbers.

    Trains the router first where the scenario asks for it and no equal one is cached (`progress` is told of each
    training step). Raises UserError for what cannot be simulated and InfeasibleError for what does not fit.
    """
    require_supported(scenario)
    trace = obtain_trace(scenario, progress=progress, cache_dir=cache_dir)
    base = kernel_model(scenario.cluster.pools[0].spec, scenario.compute.profile)
    fabric = scenario_fabric(scenario, base)
    assert (trace is None) == (scenario.model.experts == 0), "an MoE step is driven by a routing trace"
    plain, bootstrap = draw_samples(scenario, trace)
    memory = check_memory(scenario, lambda variant: rows_of_variant(scenario, variant, trace, plain))
    kernels = step_kernels(scenario, fabric=fabric, kernels=base, samples=plain)
    balanced = [sample.balanced() for sample in plain]
    everything = simulate_samples(scenario, fabric, kernels, [*plain, *balanced, *bootstrap])
    done = Simulated.of(scenario, kernels, memory, trace, plain, everything)
    warnings = [
        *layout_warnings(scenario, fabric, memory, plain),
        *sharing_warnings(everything.shared_links, done.imbalance_cost_s),
    ]

    def seconds_placed(variant: Scenario, steps_ago: float) -> float:
        """The step of the plain samples with experts placed so many training steps before."""
        again = draw_samples(variant, trace, bootstrap=False, placed_ago=steps_ago)[0]
        clocked = step_kernels(variant, fabric=fabric, kernels=base, samples=again)
        return float(simulate_samples(variant, fabric, clocked, again).step_S.mean())

    replacing = replacing_facts(plain[0].sampler, fabric, step_s=done.step_s, seconds=seconds_placed) if plain else None
    record = assemble(done, layout_warnings=warnings, replacing=replacing)
    check_plausible(record, fabric)
    return record


def mean_step_seconds(scenario: Scenario, trace: RoutingTrace | None) -> float:
    """Mean step time of the plain routing samples alone, the same as `simulate` gives: for what-ifs.

    Raises as `simulate` does.
    """
    require_supported(scenario)
    kernels = kernel_model(scenario.cluster.pools[0].spec, scenario.compute.profile)
    plain = draw_samples(scenario, trace, bootstrap=False)[0]
    check_memory(scenario, lambda variant: rows_of_variant(scenario, variant, trace, plain))
    fabric = scenario_fabric(scenario, kernels)
    kernels = step_kernels(scenario, fabric=fabric, kernels=kernels, samples=plain)
    return float(simulate_samples(scenario, fabric, kernels, plain).step_S.mean())
