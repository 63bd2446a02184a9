"""What a layout comes to for the goal, and how outcomes compare: limits, objectives, the Pareto front."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from moesim.planner.plan import Objective, Plan
from moesim.results.economy import cost, utilisation
from moesim.scenario import Scenario

Item = TypeVar("Item")


class Outcome(NamedTuple):
    """Seconds of a step; USD and days for all tokens of the goal; MFU (causal); tokens per second."""

    step_s: float
    usd: float
    days: float
    mfu: float
    tokens_per_second: float

    def objective(self, name: Objective) -> float:
        """The value of an objective, the lower the better."""
        return -self.mfu if name == "mfu" else float(getattr(self, name))

    def objectives(self, names: Sequence[Objective]) -> tuple[float, ...]:
        """By which outcomes are ranked: the first objective, the others where it ties."""
        return tuple(self.objective(name) for name in names)


def outcome_of(scenario: Scenario, step_s: float) -> Outcome:
    """What a step of `step_s` seconds comes to."""
    economy = cost(scenario, step_s)
    return Outcome(
        step_s=step_s,
        usd=economy["usd_total"],
        days=economy["days"],
        mfu=utilisation(scenario, step_s)["causal"],
        tokens_per_second=scenario.tokens_per_step / step_s,
    )


class Miss(NamedTuple):
    """The first limit of the goal that an outcome misses, what it has and what it may have, and by which factor."""

    stage: str
    text: str
    factor: float


def missed(plan: Plan, outcome: Outcome) -> Miss | None:
    """The limit that an outcome misses: speed, then the deadline, then the budget; None when it meets the goal."""
    goal, least = plan.goal, plan.constraints.tokens_per_second
    if least is not None and outcome.tokens_per_second < least:
        text = f"{outcome.tokens_per_second:,.0f} of {least:,.0f} tokens/s"
        return Miss("speed", text, least / outcome.tokens_per_second)
    if goal.deadline_days is not None and outcome.days > goal.deadline_days:
        return Miss("deadline", f"{outcome.days:.1f} of {goal.deadline_days:g} days", outcome.days / goal.deadline_days)
    if goal.usd is not None and outcome.usd > goal.usd:
        return Miss("budget", f"${outcome.usd:,.0f} of ${goal.usd:,.0f}", outcome.usd / goal.usd)
    return None


def front(items: Sequence[Item], outcome: Callable[[Item], Outcome]) -> list[Item]:
    """The items that no other beats in cost and in days, cheapest first."""
    kept: list[Item] = []
    for item in sorted(items, key=lambda item: (outcome(item).usd, outcome(item).days)):
        if not kept or outcome(item).days < outcome(kept[-1]).days:
            kept.append(item)
    return kept
