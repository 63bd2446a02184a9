"""Why the winner wins: where the seconds and the money of two layouts differ, and what would alter the choice."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from moesim.planner.outcome import Outcome, missed
from moesim.planner.plan import Plan
from moesim.scenario import Scenario

ROUND_OFF = 1e-6  # share of a step below which a part is left out of a comparison
NO_FIT = "no layout meets the goal"


class Simulated(NamedTuple):
    """A simulated layout: its record's id, what it is, and what it comes to."""

    id: str
    scenario: Scenario
    values: Mapping[str, Any]
    outcome: Outcome
    result: Mapping[str, Any]

    @property
    def gpu(self) -> str:
        """The kind of its GPUs."""
        return self.scenario.cluster.pools[0].gpu_name

    @property
    def gpu_hours(self) -> float:
        """GPU-hours for all tokens of the goal, those of spares included."""
        failures, cluster = self.scenario.failures, self.scenario.cluster
        spares = ((failures and failures.spares) or 0) * cluster.pools[0].gpus_per_node
        return self.outcome.days * 24 * (cluster.num_gpus + spares)


def ranked(plan: Plan, layouts: Sequence[Simulated], outcome: Callable[[Simulated], Outcome]) -> list[Simulated]:
    """Layouts that meet the goal with these outcomes, best first."""
    meeting = [layout for layout in layouts if missed(plan, outcome(layout)) is None]
    return sorted(meeting, key=lambda layout: (*outcome(layout).objectives(plan.objectives), layout.id))


def differences(winner: Simulated, other: Simulated) -> dict[str, Any]:
    """Part by part: seconds of a step, GPU-hours and USD for all tokens; largest difference in USD first.

    Parts are the categories of the attribution. They add up to the step, so that the differences add up as well.
    """
    parts = []
    for name in winner.result["attribution_s"]:
        shares = [layout.result["attribution_s"][name] / layout.result["step_time_s"] for layout in (winner, other)]
        seconds = [float(layout.result["attribution_s"][name]) for layout in (winner, other)]
        usd = [share * layout.outcome.usd for share, layout in zip(shares, (winner, other), strict=True)]
        hours = [share * layout.gpu_hours for share, layout in zip(shares, (winner, other), strict=True)]
        if max(shares) > ROUND_OFF:
            parts.append({
                "part": name,
                "step_s": [at if share > ROUND_OFF else 0.0 for at, share in zip(seconds, shares, strict=True)],
                "gpu_hours_difference": hours[1] - hours[0],
                "usd_difference": usd[1] - usd[0],
            })  # fmt: skip
    parts.sort(key=lambda part: -abs(part["usd_difference"]))
    return {
        "other": other.id,
        "usd_difference": other.outcome.usd - winner.outcome.usd,
        "days_difference": other.outcome.days - winner.outcome.days,
        "chosen_differently": {
            key: [winner.values.get(key), other.values.get(key)]
            for key in dict.fromkeys([*winner.values, *other.values])
            if winner.values.get(key) != other.values.get(key)
        },
        "parts": parts,
    }


def why(ranking: Sequence[Simulated]) -> dict[str, Any]:
    """The winner against the runner-up, and against the best with other GPUs; nothing for a winner alone."""
    if len(ranking) < 2:
        return {}
    winner, runner_up = ranking[:2]
    found = {"winner": winner.id, "runner_up": differences(winner, runner_up)}
    other_kind = next((layout for layout in ranking if layout.gpu != winner.gpu), None)
    if other_kind is not None and other_kind is not runner_up:
        found["best_with_other_gpus"] = differences(winner, other_kind)
    return found


def change(plan: Plan, name: str, layouts: Sequence[Simulated], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """One changed condition: the ranking of the layouts that have an outcome under it, and whether the winner stays."""
    known = [layout for layout in layouts if layout.id in outcomes]
    before = ranked(plan, known, lambda layout: layout.outcome)
    after = ranked(plan, known, lambda layout: outcomes[layout.id])
    return {
        "change": name,
        "layouts": len(known),
        "winner": after[0].id if after else None,
        "changes_winner": bool(before) and (not after or after[0].id != before[0].id),
        "usd": outcomes[after[0].id].usd if after else None,
        "days": outcomes[after[0].id].days if after else None,
        "note": "" if after else NO_FIT,
    }


def price_changes(plan: Plan, layouts: Sequence[Simulated]) -> list[dict[str, Any]]:
    """Every kind of GPU dearer and cheaper by sensitivity.price, alone."""
    found = []
    for kind in dict.fromkeys(layout.gpu for layout in layouts):
        for factor in (1 - plan.sensitivity.price, 1 + plan.sensitivity.price):
            outcomes = {
                layout.id: layout.outcome._replace(usd=layout.outcome.usd * (factor if layout.gpu == kind else 1.0))
                for layout in layouts
            }
            found.append(change(plan, f"price of {kind} x{factor:g}", layouts, outcomes))
    return found


def price_flips(plan: Plan, ranking: Sequence[Simulated]) -> list[dict[str, Any]]:
    """For every other kind of GPU the price, and its ratio to that of the winner's kind, at which both cost the same.

    Exact for the simulated layouts: cost is GPU-hours times price. Below that price the other kind is cheaper.
    """
    if not ranking or plan.objectives[0] != "usd":
        return []
    winner = ranking[0]
    prices = {offer.gpu: offer.usd_per_gpu_hour for offer in plan.goal.gpus}
    found = []
    for kind in dict.fromkeys(layout.gpu for layout in ranking):
        if kind == winner.gpu:
            continue
        rival = min((layout for layout in ranking if layout.gpu == kind), key=lambda layout: layout.gpu_hours)
        ratio = winner.gpu_hours / rival.gpu_hours
        found.append({
            "gpu": kind,
            "layout": rival.id,
            "price_ratio": ratio,
            "usd_per_gpu_hour": ratio * prices[winner.gpu],
            "price_ratio_now": prices[kind] / prices[winner.gpu],
        })  # fmt: skip
    return found
