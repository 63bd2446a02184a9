"""Is the router balanced at all? A router that nobody asked to balance is not what anybody would train at scale."""

from moesim.scenario import Scenario, TrainRouting
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import StatedRouting
from moesim.trace import RoutingTrace
from moesim.trace.metrics import expert_load_LE, imbalance, uniform_floor

FAR_ABOVE_UNIFORM = 4.0  # times a uniform router's imbalance: published routers stay below, see docs/studies.md
FAR_OF_POSSIBLE = 0.5  # of N / K, which all tokens with the same experts would give: for few experts that is soon


def balance_warnings(scenario: Scenario, trace: RoutingTrace) -> list[str]:
    """What to know of the routing's balance, from all that was recorded, before drops."""
    router, final = trace.router, trace.final
    ratio = float(imbalance(expert_load_LE(final, num_experts=router.num_experts)).mean())
    floor = uniform_floor(router.num_experts, top_k=router.top_k, tokens=final.num_tokens)
    measured = (
        f"its busiest expert gets {ratio:.1f} times the mean rows, mean over layers (a uniform router: {floor:.2f})"
    )
    routing = scenario.routing
    if isinstance(routing, StatedRouting):
        return []  # as it was asked for
    if isinstance(routing, TrainRouting) and not _is_balanced(routing):
        return [
            f"the router was trained without a balance loss or bias: {measured}; routers are trained with one, e.g. "
            f"routing.balance: {{expert: 0.01}}"
        ]
    if ratio <= min(FAR_ABOVE_UNIFORM * floor, max(floor, FAR_OF_POSSIBLE * router.num_experts / router.top_k)):
        return []
    remedy = (
        "raise routing.balance or routing.steps"
        if isinstance(routing, TrainRouting)
        else "see that it is the routing you mean"
    )
    return [f"the routing is far from balanced: {measured}; {remedy}"]


def _is_balanced(routing: TrainRouting) -> bool:
    balance = routing.balance
    coefficients = balance.expert, balance.device, balance.communication, balance.variance, balance.sequence
    biased = balance.loss_free is not None and balance.loss_free.gamma > 0
    facts = ROUTERS[routing.router.kind]
    nothing_to_balance = not facts.learned or facts.by_experts  # even by construction
    return nothing_to_balance or any(coefficients) or biased
