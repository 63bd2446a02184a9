"""simulate(scenario): the only place that wires the layers together. Read it from top to bottom."""

from collections.abc import Sequence
from pathlib import Path

from moesim.engine import simulate_samples, step_kernels
from moesim.parallel import TrafficSampler
from moesim.parallel.memory.remedy import check_memory
from moesim.parallel.memory.report import MemoryReport
from moesim.parallel.traffic_sample import TrafficSample
from moesim.program.drawn_routing import draw_samples, obtain_trace, rows_of_variant
from moesim.program.scenario_fabric import scenario_fabric, scenario_kernels
from moesim.program.warnings import layout_warnings, sharing_warnings
from moesim.recorded.peak import recorded_memory
from moesim.results import RunRecord
from moesim.results.definitions import check_plausible
from moesim.results.outcome import SearchedPlacement, Simulated, assemble
from moesim.results.placement import replacing_facts
from moesim.routing.request import ProgressCallback, SearchReport
from moesim.scenario import Scenario, Search
from moesim.scenario.check import require_supported
from moesim.trace import RoutingTrace

__all__ = ["choose_placement", "draw_samples", "mean_step_seconds", "obtain_trace", "simulate"]

TRAFFIC_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)  # that a measured search of placements tries


def simulate(
    scenario: Scenario, *, progress: ProgressCallback | None = None, cache_dir: Path | None = None
) -> RunRecord:
    """Simulate one optimizer step of `scenario` and derive its numbers.

    Trains the router first where the scenario asks for it and no equal one is cached (`progress` is told of each
    training step). Raises UserError for what cannot be simulated and InfeasibleError for what does not fit.
    """
    require_supported(scenario)
    # What is routed, and where the experts are.
    trace = obtain_trace(scenario, progress=progress, cache_dir=cache_dir)
    scenario, searched = choose_placement(scenario, trace, progress=progress)
    # How long kernels and transfers take, and whether all fits.
    kernels = scenario_kernels(scenario)
    fabric = scenario_fabric(scenario, kernels)
    assert (trace is None) == (scenario.model.experts == 0), "an MoE step is driven by a routing trace"
    plain, bootstrap = draw_samples(scenario, trace)
    memory = _checked_memory(scenario, trace, plain)
    clocked = step_kernels(scenario, fabric=fabric, kernels=kernels, samples=plain)
    # The step: as routed, with all loads equal, and with traces resampled for the range.
    balanced = [sample.balanced() for sample in plain]
    outcome = simulate_samples(scenario, fabric, clocked, [*plain, *balanced, *bootstrap])
    simulated = Simulated.of(scenario, clocked, memory, trace, plain, outcome)
    warnings = [
        *layout_warnings(scenario, fabric, memory, plain),
        *sharing_warnings(outcome.shared_links, simulated.imbalance_cost_s),
    ]

    def seconds_placed(variant: Scenario, steps_ago: float) -> float:
        """The step of the plain samples with experts placed so many training steps before."""
        again = draw_samples(variant, trace, bootstrap=False, placed_ago=steps_ago)[0]
        then = step_kernels(variant, fabric=fabric, kernels=kernels, samples=again)
        return float(simulate_samples(variant, fabric, then, again).step_S.mean())

    # What it comes to.
    step_s = simulated.step_s
    replacing = replacing_facts(plain[0].sampler, fabric, step_s=step_s, seconds=seconds_placed) if plain else None
    record = assemble(simulated, layout_warnings=warnings, replacing=replacing, searched=searched)
    check_plausible(record, fabric)
    return record


def mean_step_seconds(scenario: Scenario, trace: RoutingTrace | None) -> float:
    """Mean step time of the plain routing samples alone, the same as `simulate` gives: for what-ifs.

    Raises as `simulate` does.
    """
    require_supported(scenario)
    scenario, _ = choose_placement(scenario, trace)
    kernels = scenario_kernels(scenario)
    plain = draw_samples(scenario, trace, bootstrap=False)[0]
    _checked_memory(scenario, trace, plain)
    fabric = scenario_fabric(scenario, kernels)
    clocked = step_kernels(scenario, fabric=fabric, kernels=kernels, samples=plain)
    return float(simulate_samples(scenario, fabric, clocked, plain).step_S.mean())


def _checked_memory(scenario: Scenario, trace: RoutingTrace | None, samples: Sequence[TrafficSample]) -> MemoryReport:
    """The memory of the scenario; of an imported step as its recording has it."""
    return check_memory(
        scenario,
        lambda variant: rows_of_variant(scenario, variant, trace, samples),
        recorded=recorded_memory(scenario),
    )


def choose_placement(
    scenario: Scenario, trace: RoutingTrace | None, *, progress: ProgressCallback | None = None
) -> tuple[Scenario, list[SearchedPlacement]]:
    """The scenario with the weight of traffic whose placement gives the shortest step, and all that were simulated.

    They are simulated on the rows that experts are placed by. Where nothing is to be measured the scenario as it is,
    and none.
    """
    placement = scenario.placement
    if trace is None or not isinstance(placement, Search) or not placement.measured or placement.traffic is not None:
        return scenario, []
    part = TrafficSampler(scenario, trace).placing_part()
    found = []
    for number, traffic in enumerate(TRAFFIC_WEIGHTS, start=1):
        tried = placement.model_copy(update={"traffic": traffic, "made_on": "same", "judged_on": "all"})
        step_s = mean_step_seconds(scenario.model_copy(update={"placement": tried}), part)
        found.append(SearchedPlacement(traffic=traffic, step_time_s=step_s))
        if progress is not None:
            progress(SearchReport(tried=number, total=len(TRAFFIC_WEIGHTS), step_time_s=step_s))
    best = min(found, key=lambda each: each.step_time_s).traffic
    chosen = placement.model_copy(update={"traffic": best})
    return scenario.model_copy(update={"placement": chosen}), found
