"""Which candidates are simulated, how far the screen was off, and why the winner wins.

The last is where the seconds and the money of two layouts differ, and what would alter the choice.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.planner.outcome import Outcome, missed_limit
from moesim.planner.plan import Objective, Plan
from moesim.planner.search import Candidate, Evaluator
from moesim.planner.space import Layout
from moesim.scenario import Scenario
from moesim.seeding import stream

FIRST_SHARE = 0.75  # of the layouts to simulate; the rest waits for what the screen's error turns out to be


def by_objective(candidates: Iterable[Candidate], names: Sequence[Objective]) -> list[Candidate]:
    """The best by the screen first."""
    return sorted(candidates, key=lambda candidate: (*candidate.screened.objectives(names), candidate.layout[:2]))


def first_choice(candidates: Sequence[Candidate], plan: Plan, count: int) -> list[Candidate]:
    """The best with each kind of GPU, then the best of all in turn with the best of each number of GPUs of a kind.

    A price or a deadline may move, and then another kind or number is what was wanted.
    """
    ordered = by_objective(candidates, plan.objectives)
    best_of_kind = {candidate.layout.gpu: candidate for candidate in reversed(ordered)}
    kinds = by_objective(best_of_kind.values(), plan.objectives)
    best_of_size: dict[tuple[int, int], Candidate] = {}
    for candidate in ordered:
        best_of_size.setdefault((candidate.layout.gpu, candidate.layout.gpus), candidate)
    sizes = list(best_of_size.values())
    in_turn = [candidate for pair in zip(ordered, sizes, strict=False) for candidate in pair]
    chosen = dict.fromkeys([*kinds, *in_turn, *ordered])
    return list(chosen)[: max(1, round(FIRST_SHARE * count))]


def challengers(
    candidates: Sequence[Candidate], simulated: Mapping[Layout, Outcome], plan: Plan, *, best: Outcome | None
) -> list[Candidate]:
    """Candidates not simulated that could still beat the `best`, were the screen as wrong as it has been at worst.

    All others, best first, while nothing simulated meets the goal.
    """
    name = plan.objectives[0]
    others = by_objective((c for c in candidates if c.layout not in simulated), plan.objectives)
    if best is None:
        return others
    known = {candidate.layout: candidate.screened for candidate in candidates if candidate.layout in simulated}
    ratios = [simulated[layout].step_s / screened.step_s for layout, screened in known.items()]
    least = min(ratios, default=1.0)

    def hoped(candidate: Candidate) -> float:
        value = candidate.screened.objective(name)
        return value / least if name == "mfu" else value * least

    return [candidate for candidate in others if hoped(candidate) < best.objective(name)]


def random_sample(evaluator: Evaluator, plan: Plan) -> list[Candidate]:
    """Layouts drawn from all that fit into memory, whether or not they meet the goal: for a measure of the screen."""
    fitting = sorted(evaluator.fitting, key=lambda candidate: str(candidate.layout))
    rng = stream(plan.seed, "check-of-the-screen")
    chosen = rng.permutation(len(fitting))[: plan.search.check]
    return [fitting[index] for index in sorted(chosen.tolist())]


@dataclass(frozen=True, kw_only=True)
class ScreenError:
    """Step times of the screen against those of the simulation, over `layouts` drawn at random.

    `bias`: median of screen / simulation - 1. `rank_correlation`: Spearman's, of the first objective; None for fewer
    than three layouts.
    """

    layouts: int
    median: float
    worst: float
    bias: float
    rank_correlation: float | None


def screen_error(
    pairs: Sequence[tuple[Outcome, Outcome]], *, objective: Callable[[Outcome], float]
) -> ScreenError | None:
    """The error over (screened, simulated) pairs; None without any."""
    if not pairs:
        return None
    relative = np.array([screened.step_s / simulated.step_s - 1 for screened, simulated in pairs])
    ranks = None
    if len(pairs) >= 3:
        ranks = rank_correlation([objective(one) for one, _ in pairs], [objective(two) for _, two in pairs])
    return ScreenError(
        layouts=len(pairs),
        median=float(np.median(np.abs(relative))),
        worst=float(np.abs(relative).max()),
        bias=float(np.median(relative)),
        rank_correlation=ranks,
    )


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation, equal values sharing their mean rank; 0 where one side does not vary."""
    one, two = _ranks(np.asarray(first)), _ranks(np.asarray(second))
    one, two = one - one.mean(), two - two.mean()
    size = float(np.sqrt((one**2).sum() * (two**2).sum()))
    return float((one * two).sum() / size) if size else 0.0


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[group], dtype=np.float64)


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
        return self.scenario.cluster.main_pool.gpu_name

    @property
    def gpu_hours(self) -> float:
        """GPU-hours for all tokens of the goal, those of spares included."""
        failures, cluster = self.scenario.failures, self.scenario.cluster
        spares = ((failures and failures.spares) or 0) * cluster.main_pool.gpus_per_node
        return self.outcome.days * 24 * (cluster.num_gpus + spares)


def ranked(plan: Plan, layouts: Sequence[Simulated], outcome: Callable[[Simulated], Outcome]) -> list[Simulated]:
    """Layouts that meet the goal with these outcomes, best first."""
    meeting = [layout for layout in layouts if missed_limit(plan, outcome(layout)) is None]
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
