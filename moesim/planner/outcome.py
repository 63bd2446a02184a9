"""What a layout comes to for the goal, and how outcomes compare: limits, objectives, the Pareto front.

`Rejections` counts what became of every combination, by stage and reason, and which constraint took the last ones.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from moesim.errors import InfeasibleError
from moesim.planner.plan import Objective, Plan
from moesim.reliability import LEAST_WORK, Step, goodput_of_step, kept_share
from moesim.reliability.job import job_causes
from moesim.results.metrics import cost, utilisation
from moesim.scenario import Scenario
from moesim.study.points import pareto_front

Item = TypeVar("Item")


class Outcome(NamedTuple):
    """Seconds of a step; USD and days for all tokens of the goal; MFU (causal); tokens per second.

    goodput: share of the time that is kept work, where the plan has failures: USD, days and tokens per second are with
    them, MFU is the step's. days_with_failures: of those days, expected.
    """

    step_s: float
    usd: float
    days: float
    mfu: float
    tokens_per_second: float
    goodput: float = 1.0
    days_with_failures: float = 0.0

    def objective(self, name: Objective) -> float:
        """The value of an objective, the lower the better."""
        return -self.mfu if name == "mfu" else float(getattr(self, name))

    def objectives(self, names: Sequence[Objective]) -> tuple[float, ...]:
        """By which outcomes are ranked: the first objective, the others where it ties."""
        return tuple(self.objective(name) for name in names)


GOODPUT_FAILURES = 4_000  # behind the goodput of a simulated layout: fewer would let chance decide between near ties
DAY = 86400.0


def outcome_of(scenario: Scenario, step_s: float, *, screen: bool = False) -> Outcome:
    """What a step of `step_s` seconds comes to, with failures where the scenario has the section.

    Goodput is simulated; `screen`: in closed form. Raises ConflictError for failures that do not fit the layout.
    """
    economy = cost(scenario, step_s)
    plain = Outcome(
        step_s=step_s,
        usd=economy["usd_total"],
        days=economy["days"],
        mfu=utilisation(scenario, step_s)["causal"],
        tokens_per_second=scenario.tokens_per_step / step_s,
    )
    if scenario.failures is None:
        return plain
    per_day = sum(cause.per_second for cause in job_causes(scenario)) * DAY
    goodput, pool = _goodput(scenario, plain, per_day, screen=screen), scenario.cluster.main_pool
    days = plain.days / goodput
    spares = (scenario.failures.spares or 0) * pool.gpus_per_node * pool.usd_per_gpu_hour
    return plain._replace(
        usd=(scenario.cluster.usd_per_hour + spares) * 24 * days,
        days=days,
        tokens_per_second=plain.tokens_per_second * goodput,
        goodput=goodput,
        days_with_failures=-days * math.expm1(-per_day),
    )


def _goodput(scenario: Scenario, plain: Outcome, per_day: float, *, screen: bool) -> float:
    """That of a training as long as GOODPUT_FAILURES take, the expected one of the plan's.

    The least that counts as work where failures leave no time: such a layout takes a thousand times as long.
    """
    step = Step(seconds=plain.step_s, compute_s=0.0, degraded_s={})
    days = GOODPUT_FAILURES / per_day if per_day else plain.days
    try:
        if screen:
            return max(LEAST_WORK, kept_share(scenario, step, days=days))
        return float(goodput_of_step(scenario, step, days=days, seeds=1).result["goodput"])
    except InfeasibleError:
        return LEAST_WORK


class MissedLimit(NamedTuple):
    """The first limit of the goal that an outcome misses, what it has and what it may have, and by which factor."""

    stage: str
    text: str
    factor: float


def missed_limit(plan: Plan, outcome: Outcome) -> MissedLimit | None:
    """The limit that an outcome misses: speed, then the deadline, then the budget; None when it meets the goal."""
    goal, least = plan.goal, plan.constraints.tokens_per_second
    if least is not None and outcome.tokens_per_second < least:
        text = f"{outcome.tokens_per_second:,.0f} of {least:,.0f} tokens/s"
        return MissedLimit("speed", text, least / outcome.tokens_per_second)
    if goal.deadline_days is not None and outcome.days > goal.deadline_days:
        return MissedLimit(
            "deadline", f"{outcome.days:.1f} of {goal.deadline_days:g} days", outcome.days / goal.deadline_days
        )
    if goal.usd is not None and outcome.usd > goal.usd:
        return MissedLimit("budget", f"${outcome.usd:,.0f} of ${goal.usd:,.0f}", outcome.usd / goal.usd)
    return None


def cheapest_and_soonest(items: Sequence[Item], outcome: Callable[[Item], Outcome]) -> list[Item]:
    """The items that no other beats in cost and in days, cheapest first."""
    points = [(outcome(item).usd, outcome(item).days) for item in items]
    return [items[index] for index in pareto_front(points, better=(-1, -1))]


# In the order in which a combination meets them.
STAGES = {
    "offer": "more GPUs than offered",
    "sizes": "sizes that do not divide",
    "places": "groups that leave their node",
    "same": "the same as another",
    "refused": "refused by the scenario's checks",
    "unsupported": "not simulated yet",
    "memory": "more memory than a GPU has",
    "speed": "slower than asked for",
    "deadline": "later than the deadline",
    "budget": "dearer than the budget",
}


@dataclass
class Rejections:
    """Counts of combinations; `nearest` holds, for each limit, the discarded one that came closest: (factor, text)."""

    looked_at: int = 0
    kept: int = 0
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)
    nearest: dict[str, tuple[float, str]] = field(default_factory=dict)

    def keep(self) -> None:
        """One combination is a candidate."""
        self.looked_at += 1
        self.kept += 1

    def discard(self, stage: str, reason: str, detail: str, factor: float | None = None) -> None:
        """One is not; `factor` by which it misses a limit."""
        assert stage in STAGES
        self.looked_at += 1
        self.reasons[stage, reason] += 1
        self.examples.setdefault((stage, reason), detail)
        if factor is not None and factor < self.nearest.get(stage, (float("inf"), ""))[0]:
            self.nearest[stage] = factor, detail

    def count(self, stage: str) -> int:
        """Combinations discarded at a stage."""
        return sum(count for (where, _), count in self.reasons.items() if where == stage)

    @property
    def binding(self) -> str | None:
        """The stage that took the last combinations; None while some are left."""
        if self.kept:
            return None
        return next((stage for stage in reversed(STAGES) if self.count(stage)), None)

    def why_empty(self) -> str:
        """One line on the constraint that took the last combinations."""
        stage = self.binding
        assert stage is not None, "some are left, or none was looked at"
        if stage in self.nearest:
            return f"{stage}: {self.nearest[stage][1]}"
        (_, reason), _ = max(
            ((key, count) for key, count in self.reasons.items() if key[0] == stage), key=lambda pair: pair[1]
        )
        return f"{STAGES[stage]}: {self.examples[stage, reason]}"

    def as_json(self) -> dict[str, Any]:
        """looked_at = kept + the sum of all discarded."""
        discarded = [
            {"stage": stage, "reason": reason, "count": count, "example": self.examples[stage, reason]}
            for (stage, reason), count in sorted(
                self.reasons.items(), key=lambda pair: (list(STAGES).index(pair[0][0]), -pair[1], pair[0][1])
            )
        ]
        return {"looked_at": self.looked_at, "kept": self.kept, "discarded": discarded}
