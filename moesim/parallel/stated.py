"""The traces of routing that is stated for the ranks of a scenario: who holds which expert decides who is loaded."""

from moesim.parallel.ownership import pieces_of_ranks
from moesim.parallel.placement import place_experts
from moesim.scenario import Scenario
from moesim.scenario.routing import BalancednessRouting, StatedRouting
from moesim.trace.record import RoutingTrace
from moesim.trace.stated import TraceSize, balancedness_trace, stress_trace


def stated_trace(
    scenario: Scenario, routing: StatedRouting, *, num_layers: int, num_sequences: int, seed: int
) -> RoutingTrace:
    """The trace of `routing` on the scenario's expert groups, with sequences of its length.

    Loads hold in every piece of a sequence that ranks share, so in whatever an expert group takes at a time.
    """
    layout, model = scenario.parallelism, scenario.model
    placement = place_experts(scenario.placement, num_experts=model.experts, num_ranks=layout.expert)
    router, ranks_E = scenario.router_shape(), placement.rank_of_expert_E
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
