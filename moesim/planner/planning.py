"""make_plan: look at every combination, simulate the promising ones, rank by what was simulated, say why.

Read `make_plan` from top to bottom. A rerun in the same folder goes on where an interrupted one stopped and gives the
same plan: the screen and the search are made again or read back, finished simulations are kept.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moesim.display import Display
from moesim.errors import InfeasibleError
from moesim.flags import WRITERS
from moesim.planner.outcome import cheapest_and_soonest
from moesim.planner.plan import Plan
from moesim.planner.ranking import Simulated, screen_error, why
from moesim.planner.screen import Screen
from moesim.planner.search import (
    SLACK,
    Candidate,
    Evaluator,
    Progress,
    Traces,
    enumerate_space,
    opened_pool,
    search_space,
    uses_nsga2,
)
from moesim.planner.simulations import JOURNAL_FILE, Folder, Simulations, baseline, sensitivity
from moesim.planner.space import Space
from moesim.results.outcome import software_facts
from moesim.routing.request import ProgressCallback, show_training


@dataclass(frozen=True, kw_only=True)
class ProgressCallbacks:
    """Whom to tell: of each training step of a router, and of each combination that was looked at."""

    training: ProgressCallback | None = None
    screening: Progress | None = None


def callbacks_on(display: Display | None) -> ProgressCallbacks:
    """All of it on a display."""
    if display is None:
        return ProgressCallbacks()

    def screening(done: int, total: int) -> None:
        display.show("screened", completed=done, total=total)

    return ProgressCallbacks(training=show_training(display), screening=screening)


def make_plan(
    folder: Folder,
    *,
    storage: str | None = None,
    callbacks: ProgressCallbacks | None = None,
    force: bool = False,
    flags: str | None = None,
) -> dict[str, Any]:
    """Make the plan of `folder.plan`, write it into the folder and return what plan.json holds.

    `storage` is a database URL for the search, in place of a journal in the folder; with `flags`, a name in
    `moesim.flags.WRITERS`, every layout comes with its command line for that software. Raises InfeasibleError
    naming the binding constraint when nothing meets the goal, and UserError for what cannot be done at all.
    """
    callbacks = callbacks or ProgressCallbacks()
    with folder.kept.claimed(force=force):
        screened = screen_plan(folder, storage=storage, callbacks=callbacks)
        work = Simulations(folder, screened)
        work.simulate_best()
        checked = work.simulate_sample()
        ranking = work.ranking()
        if not ranking:
            work.require_simulated()
            raise InfeasibleError(work.why_nothing_fits())
        content = _content(folder, screened, work, ranking, checked, callbacks)
        if flags is not None:
            for layout in work.done.values():
                content["outcomes"][layout.id]["flags"] = {flags: WRITERS[flags](layout.scenario).as_json()}
        folder.kept.write(content)
        return content | {"name": folder.plan.name}


def screen_plan(folder: Folder, *, storage: str | None, callbacks: ProgressCallbacks) -> Evaluator:
    """Look at the plan's combinations: all, or those that the search asks for. Nothing is simulated."""
    plan = folder.plan
    evaluator = Evaluator(Space.of(plan), Screen(Traces(folder.cache_dir, callbacks.training).of))
    searched = uses_nsga2(plan.search, evaluator.space.size)
    expected = plan.search.trials if searched else evaluator.space.size
    with opened_pool(evaluator, workers=folder.workers, cache_dir=folder.cache_dir, expected=expected) as pool:
        if not searched:
            enumerate_space(pool, progress=callbacks.screening)
            return evaluator
        place: str | Path = storage or folder.path / JOURNAL_FILE
        name = f"moesim-{plan.name}-{folder.kept.digest}"
        search_space(pool, storage=place, study_name=name, progress=callbacks.screening)
    return evaluator


def _content(
    folder: Folder,
    evaluator: Evaluator,
    work: Simulations,
    ranking: list[Simulated],
    checked: Sequence[Candidate],
    callbacks: ProgressCallbacks,
) -> dict[str, Any]:
    plan = folder.plan
    goal = plan.goal
    screened = {candidate.layout: candidate for candidate in evaluator.fitting}
    pairs = [(screened[c.layout].screened, work.done[c.layout].outcome) for c in checked if c.layout in work.done]
    error = screen_error(pairs, objective=lambda outcome: outcome.objective(plan.objectives[0]))
    ranks = {layout.id: rank for rank, layout in enumerate(ranking, start=1)}
    return {
        "status": "done",
        "failures": plan.failures is not None,
        "goal": goal.model_dump(mode="json") | {"deadline_days": goal.deadline_days},
        "objectives": list(plan.objectives),
        "mfu_peak": plan.workload.precision.gemm,
        "counts": {
            "combinations": evaluator.space.size,
            "method": "nsga2" if uses_nsga2(plan.search, evaluator.space.size) else "enumerate",
            **evaluator.rejections.as_json(),
            "slack": SLACK,
            "simulated": len(work.done),
            "not_simulated": [
                {"id": record.id, "status": record.status, "reason": record.reason} for record in work.failed.values()
            ],
            "in_doubt": len(work.in_doubt()),
        },
        "front": [layout.id for layout in cheapest_and_soonest(ranking, lambda layout: layout.outcome)],
        "ranking": [layout.id for layout in ranking],
        "outcomes": {
            simulated.id: _shown(simulated, screened[layout]) | {"rank": ranks.get(simulated.id)}
            for layout, simulated in work.done.items()
        },
        "routing": ranking[0].result["router"],  # the same for all layouts, but for what is stated for their ranks
        "why": why(ranking),
        "sensitivity": sensitivity(folder, work, ranking),
        "screen_error": None if error is None else asdict(error),
        "baseline": baseline(folder, ranking[0], progress=callbacks.screening),
        "software": software_facts(plan.implementation),
        "warnings": [
            *_software_warnings(plan),
            *plan.model.left_out,
            *(plan.baseline.model.left_out if plan.baseline else ()),
        ],
    }


def _software_warnings(plan: Plan) -> list[str]:
    """What layouts are ranked by, where it is no program, or where the plan does not say it."""
    software = plan.implementation.software
    if software.bound:
        return [f"layouts are ranked by {software.name}, {software.about}: near ones may rank otherwise in a program"]
    if "implementation" not in plan.model_fields_set:
        return [f"the plan names no implementation: layouts are ranked as {software.name} runs them"]
    return []


def _price(layout: Simulated) -> float:
    """USD per million tokens, of useful ones with failures."""
    tokens, plain = layout.scenario.workload.train_tokens, layout.result["cost"]["usd_per_million_tokens"]
    if layout.scenario.failures is None or tokens is None:
        return float(plain)
    return layout.outcome.usd / (tokens / 1e6)


def _shown(layout: Simulated, candidate: Candidate) -> dict[str, Any]:
    """What a table shows of one layout."""
    memory = layout.result["memory"]
    return {
        "name": layout.scenario.name,
        "values": dict(layout.values),
        **layout.outcome._asdict(),
        "usd_per_million_tokens": _price(layout),
        "dropped_share": layout.result["dropped_share"],
        "peak_bytes": memory["peak_bytes"],
        "capacity_bytes": min(memory["capacity_bytes_by_pipeline_rank"]),
        "screened_step_s": candidate.screened.step_s,
    }
