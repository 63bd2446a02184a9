"""The traces of routing that is stated for the ranks of a scenario: who holds which expert decides who is loaded."""

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.mesh import pieces_of_ranks
from moesim.parallel.placement import place_lists
from moesim.scenario import Scenario
from moesim.scenario.routing import BalancednessRouting, StatedRouting
from moesim.trace.record import RoutingTrace
from moesim.trace.synthetic import TraceSize, balancedness_trace, stress_trace


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
