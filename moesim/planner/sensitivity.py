"""What a plan adds to its ranking: how it holds under other conditions, and a dense model to hold it against."""

from collections.abc import Sequence
from typing import Any

from moesim.planner.evaluation import Evaluator, Progress, opened_pool
from moesim.planner.explanation import Simulated, change, price_changes, price_flips
from moesim.planner.folder import VARIANTS_FILE, Folder
from moesim.planner.outcome import Outcome, missed, outcome_of
from moesim.planner.plan import Plan
from moesim.planner.screen import Screen
from moesim.planner.search import enumerate_space
from moesim.planner.selection import by_objective
from moesim.planner.simulations import Simulations
from moesim.planner.space import Space


def sensitivity(folder: Folder, work: Simulations, ranking: Sequence[Simulated]) -> dict[str, Any]:
    """The ranking under other bandwidths (simulated again), balanced routing and other prices."""
    plan, best = folder.plan, _best_of_each_kind(ranking, folder.plan.sensitivity.candidates)
    changes = []
    for factor in plan.sensitivity.bandwidth if best else ():
        scenarios = [
            (layout.scenario.with_stages_listed().with_bandwidth(factor), {**layout.values, "bandwidth": factor})
            for layout in best
        ]
        records = folder.simulate(scenarios, file=VARIANTS_FILE)
        outcomes = {
            layout.id: outcome_of(layout.scenario, record.result["step_time_s"])
            for layout, record in zip(best, records, strict=True)
            if record.result is not None
        }
        changes.append(change(plan, f"bandwidth of all links x{factor:g}", best, outcomes))
    if plan.model.experts:
        even = {layout.id: outcome_of(layout.scenario, layout.result["balanced_step_time_s"]) for layout in work.usable}
        changes.append(change(plan, "perfectly balanced routing", work.usable, even))
    changes += price_changes(plan, work.usable)
    return {"changes": changes, "price_flips": price_flips(plan, [*ranking, *_too_dear(plan, work.usable)])}


def _too_dear(plan: Plan, layouts: Sequence[Simulated]) -> list[Simulated]:
    """Those that miss nothing but the budget: at another price they would compete."""
    free = {layout.id: layout.outcome._replace(usd=0.0) for layout in layouts}
    return [
        layout
        for layout in layouts
        if missed(plan, layout.outcome) is not None and missed(plan, free[layout.id]) is None
    ]


def _best_of_each_kind(ranking: Sequence[Simulated], count: int) -> list[Simulated]:
    """The best layouts, and the best with each kind of GPU beyond them."""
    best = list(ranking[:count])
    for layout in ranking[count:]:
        if count and layout.gpu not in {other.gpu for other in best}:
            best.append(layout)
    return best


def baseline(folder: Folder, winner: Simulated, *, progress: Progress | None) -> dict[str, Any] | None:
    """The best layout of the dense model under the same goal, whether or not it meets it."""
    plan = folder.plan
    if plan.baseline is None:
        return None
    evaluator = Evaluator(Space.of_baseline(plan), Screen(lambda scenario: None))
    with opened_pool(
        evaluator, workers=folder.workers, cache_dir=folder.cache_dir, expected=evaluator.space.size
    ) as pool:
        enumerate_space(pool, progress=progress)
    work = Simulations(folder, evaluator)
    chosen = by_objective(evaluator.candidates or evaluator.fitting, plan.objectives)[: plan.baseline.simulate]
    work.simulate(chosen)
    model = plan.baseline.model.preset or "dense"
    found: dict[str, Any] = {"model": model, "source": plan.baseline.source, "counts": evaluator.rejections.as_json()}
    if not work.usable:
        return found | {
            "id": None,
            "note": evaluator.rejections.why_empty() if not evaluator.fitting else "none could be simulated",
        }
    best = min(
        work.usable, key=lambda layout: (_missing(plan, layout.outcome), layout.outcome.objectives(plan.objectives))
    )
    miss = missed(plan, best.outcome)
    return found | {
        "id": best.id,
        "name": best.scenario.name,
        "values": dict(best.values),
        **best.outcome._asdict(),
        "note": "" if miss is None else f"misses the {miss.stage}: {miss.text}",
        "usd_of_winner": winner.outcome.usd / best.outcome.usd,
        "days_of_winner": winner.outcome.days / best.outcome.days,
        "gpu_hours_of_winner": winner.gpu_hours / best.gpu_hours,
    }


def _missing(plan: Plan, outcome: Outcome) -> float:
    miss = missed(plan, outcome)
    return 0.0 if miss is None else miss.factor
