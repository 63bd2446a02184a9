"""The routing that drives a scenario: obtained once, then drawn as traffic samples.

Where it is stated for the ranks of the scenario, who holds which expert decides who is loaded.

Legend: S plain routing samples, E experts.
"""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel import TrafficSample, TrafficSampler
from moesim.parallel.memory.rows import RoutedRows, even_rows, routed_rows
from moesim.parallel.mesh import pieces_of_ranks
from moesim.parallel.placement import place_lists
from moesim.results.metrics import trace_coverage, window_tokens
from moesim.routing.request import ProgressCallback, TrainingRequest, cached_trace, recorded_trace
from moesim.scenario import Scenario
from moesim.scenario.routing import BalancednessRouting, PopularityRouting, StatedRouting, TraceRouting, TrainRouting
from moesim.seeding import stream, stream_seed
from moesim.trace import RoutingTrace, popularity_trace, uniform_trace
from moesim.trace.provenance import check_agreement
from moesim.trace.record import MIN_COVERAGE_FOR_RANGE
from moesim.trace.synthetic import TraceSize, balancedness_trace, stress_trace

SYNTHETIC_LAYERS = 2  # distinct layers of a synthetic trace; model layers take them in turn
SYNTHETIC_TOKENS = (65_536, 262_144)  # at least, and at most while one expert group's micro-batch fits

# Scenarios that a process simulates one after the other (a sweep, a plan, questions of what if) mostly share routing.
_popularity_trace, _uniform_trace = lru_cache(maxsize=2)(popularity_trace), lru_cache(maxsize=2)(uniform_trace)


def obtain_trace(
    scenario: Scenario, *, progress: ProgressCallback | None = None, cache_dir: Path | None = None
) -> RoutingTrace | None:
    """The routing of the scenario: trained (or cached), read from a file or the library, or drawn; None when dense."""
    if scenario.model.experts == 0:
        return None
    routing = scenario.routing
    if isinstance(routing, TrainRouting):
        return cached_trace(TrainingRequest.from_scenario(scenario), cache_dir, progress=progress)
    if isinstance(routing, TraceRouting):
        trace = recorded_trace(scenario, tokens=_synthetic_tokens(scenario), cache_dir=cache_dir)
        check_agreement(trace, routing, wanted=scenario.router_shape())
        return trace
    length = scenario.workload.sequence_length
    num_sequences, seed = -(-_synthetic_tokens(scenario) // length), stream_seed(scenario.seed, "synthetic-trace")
    if isinstance(routing, StatedRouting):
        return stated_trace(scenario, routing, num_layers=SYNTHETIC_LAYERS, num_sequences=num_sequences, seed=seed)
    common: dict[str, Any] = {"num_sequences": num_sequences, "sequence_length": length, "seed": seed}
    if isinstance(routing, PopularityRouting):
        nested = not isinstance(routing.counts[0], int | float)
        layers = len(routing.counts) if nested else SYNTHETIC_LAYERS
        common |= {"counts": routing.counts, "counts_of": routing.source, "num_layers": layers}
        return _popularity_trace(scenario.router_shape(), **common)
    return _uniform_trace(scenario.router_shape(), num_layers=SYNTHETIC_LAYERS, **common)


def _synthetic_tokens(scenario: Scenario) -> int:
    """How many tokens of drawn routing a scenario gets."""
    fewest, most = SYNTHETIC_TOKENS
    return max(fewest, window_tokens(scenario), min(most, scenario.tokens_per_step))


def draw_samples(
    scenario: Scenario, trace: RoutingTrace | None, *, bootstrap: bool = True, placed_ago: float | None = None
) -> tuple[list[TrafficSample], list[TrafficSample]]:
    """Plain routing samples, and as many from resampled traces for the range.

    None for the range from one sample, or from a trace that is too small. `placed_ago`: as the sampler's.
    """
    if trace is None:
        return [], []
    sampler = TrafficSampler(scenario, trace, placed_ago=placed_ago)
    count = scenario.uncertainty.samples
    plain = [sampler.draw(stream(scenario.seed, "sample", number)) for number in range(count)]
    if not bootstrap or count == 1 or trace_coverage(scenario, plain[0]) < MIN_COVERAGE_FOR_RANGE:
        return plain, []
    again = [sampler.draw(stream(scenario.seed, "bootstrap", number), bootstrap=True) for number in range(count)]
    return plain, again


def rows_of_variant(
    scenario: Scenario, variant: Scenario, trace: RoutingTrace | None, plain: Sequence[TrafficSample]
) -> RoutedRows:
    """The rows of a variant of the scenario under the same routing; those of the scenario itself are drawn already."""
    if trace is None:
        return even_rows(variant)
    return routed_rows(variant, plain if variant is scenario else draw_samples(variant, trace)[0])


def stated_trace(
    scenario: Scenario, routing: StatedRouting, *, num_layers: int, num_sequences: int, seed: int
) -> RoutingTrace:
    """The trace of `routing` on the scenario's expert groups, with sequences of its length.

    Loads hold in every piece of a sequence that ranks share, so in whatever an expert group takes at a time. Ranks are
    those of the placement, or neighbouring experts where it has copies or differs by layer: it is to cope with them.
    """
    layout = scenario.parallelism
    router, ranks_E = scenario.router_shape(), _ranks_E(scenario)
    size = TraceSize(
        num_layers=num_layers,
        num_sequences=num_sequences,
        sequence_length=scenario.workload.sequence_length,
        pieces_per_sequence=pieces_of_ranks(context=layout.context, tensor=layout.tensor).size,
    )
    if isinstance(routing, BalancednessRouting):
        return balancedness_trace(router, value=routing.value, rank_of_expert_E=ranks_E, size=size, seed=seed)
    return stress_trace(
        router, facts=routing.facts, severity=routing.severity, rank_of_expert_E=ranks_E, size=size, seed=seed
    )


def _ranks_E(scenario: Scenario) -> NDArray[np.int64]:
    """The rank of every expert that loads are stated for."""
    experts, ranks = scenario.model.experts, scenario.parallelism.expert
    slots = scenario.placement.fixed_slots(num_experts=experts, num_ranks=ranks)
    if slots is None or sum(map(len, slots)) > experts:
        return np.arange(experts) * ranks // experts
    return place_lists(slots).rank_of_expert_E
