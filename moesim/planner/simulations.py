"""A plan's folder, and the simulated layouts of one space in it: which, what came of them, why none meets the goal.

OUT/plan.json               the plan that was made; until it is, its hash and `"status"`: unfinished or failed
OUT/points.jsonl            one record per simulated layout, appended at once
OUT/variants.jsonl          likewise for the best layouts on faster and slower links
OUT/scenarios/NNNN.yaml     the layouts; `moesim run` accepts them and gives the recorded result
OUT/search.journal          trials of the search, where the space was too large to enumerate

Behind them what a plan adds to its ranking: how it holds under other conditions, and a dense model to hold it against.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.planner.outcome import STAGES, MissedLimit, Outcome, missed_limit, outcome_of
from moesim.planner.plan import Plan
from moesim.planner.plan_folder import POINTS_FILE, PlanFolder, scenario_file
from moesim.planner.ranking import (
    Simulated,
    by_objective,
    challengers,
    change,
    first_choice,
    price_changes,
    price_flips,
    random_sample,
    ranked,
)
from moesim.planner.screen import Screen
from moesim.planner.search import Candidate, Evaluator, Progress, enumerate_space, opened_pool
from moesim.planner.space import Layout, Space
from moesim.routing.request import routing_digest
from moesim.scenario import Scenario, dump_scenario
from moesim.strict_json import json_text
from moesim.study import Point, PointRecord, PointsFile, read_points, run_points, scenario_id
from moesim.study.points import content_hash
from moesim.study.pool import Watch

VARIANTS_FILE, JOURNAL_FILE = "variants.jsonl", "search.journal"


def plan_hash(plan: Plan) -> str:
    """16 hexadecimal digits of the SHA-256 of the plan with all its defaults, and of what its `routing.file` holds."""
    settings, recording = plan.model_dump(mode="json"), routing_digest(plan.routing)
    return content_hash(settings if recording is None else {"plan": settings, "recording": recording})[:16]


@dataclass(frozen=True)
class Folder:
    """The folder of one plan, with `workers` processes (or a Dask `cluster`) to simulate what it lacks."""

    path: Path
    plan: Plan
    workers: int | None = None
    cluster: str | None = None
    cache_dir: Path | None = None
    watch: Watch | None = None
    _numbers: dict[str, dict[str, int]] = field(init=False, default_factory=dict, repr=False)

    @cached_property
    def kept(self) -> PlanFolder:
        """What keeps it for this plan."""
        also = (VARIANTS_FILE, JOURNAL_FILE)
        return PlanFolder(path=self.path, kind="plan", name=self.plan.name, digest=plan_hash(self.plan), also=also)

    def simulate(
        self, scenarios: Sequence[tuple[Scenario, Mapping[str, Any]]], *, file: str = POINTS_FILE
    ) -> list[PointRecord]:
        """Records of the scenarios (with what the plan chose for each), in their order; finished ones are not redone.

        Points get a scenario file, variants do not. Numbers follow the order of the first requests, which a rerun of
        the plan repeats.
        """
        points = [self._point(scenario, values, file=file) for scenario, values in scenarios]
        with PointsFile.opened(self.path / file) as points_file:
            finished = {record.id for record in read_points(self.path / file).records if record.status != "failed"}
            missing = {point.id: point for point in points if point.id not in finished}
            for point in missing.values():
                if point.scenario_file is not None:
                    self.kept.write_scenario(point.scenario_file, scenario_text(self.plan, point))
            run_points(
                list(missing.values()),
                on_record=points_file.append,
                workers=self.workers,
                cluster=self.cluster,
                cache_dir=self.cache_dir,
                watch=self.watch,
            )
        records = read_points(self.path / file).by_id()
        return [records[point.id] for point in points]

    def _point(self, scenario: Scenario, values: Mapping[str, Any], *, file: str) -> Point:
        numbers = self._numbers.setdefault(file, {})
        number = numbers.setdefault(scenario_id(scenario), len(numbers))
        name = scenario_file(number) if file == POINTS_FILE else None
        return Point.of(scenario, number=number, values=values, scenario_file=name)


def scenario_text(plan: Plan, point: Point) -> str:
    """The scenario of a point as YAML that says what the planner chose."""
    offer = next(offer for offer in plan.goal.gpus if offer.gpu == point.scenario.cluster.main_pool.gpu_name)
    head = [
        f"# Layout {point.number} of the plan {plan.name}: `moesim run` gives the result that the plan ranked it by.",
        f"# Rent of a {offer.gpu}: ${offer.usd_per_gpu_hour:g} per GPU-hour ({' '.join(offer.source.split())}).",
        "# Chosen by the planner:",
        *(f"#   {key}: {json_text(value)}" for key, value in point.values.items()),
    ]
    return "\n".join(head) + "\n" + dump_scenario(point.scenario)


@dataclass
class Simulations:
    """The simulated layouts of one space. `failed`: what came of those that were not done."""

    folder: Folder
    evaluator: Evaluator
    done: dict[Layout, Simulated] = field(default_factory=dict)
    failed: dict[Layout, PointRecord] = field(default_factory=dict)

    @property
    def plan(self) -> Plan:
        """What was asked for."""
        return self.folder.plan

    def simulate_best(self) -> None:
        """Simulate the most promising candidates, then those that the screen's error leaves in doubt, then the next."""
        budget = self.plan.search.simulate
        candidates = self.evaluator.candidates or self._nearest_misses()
        self.simulate(first_choice(candidates, self.plan, budget))
        while (left := budget - len(self.done) - len(self.failed)) > 0:
            rivals = self.in_doubt() or self._others(candidates)
            if not rivals:
                return
            self.simulate(rivals[:left])

    def in_doubt(self) -> list[Candidate]:
        """Candidates not simulated that the screen's worst error could lift above the best simulated one."""
        ranking = self.ranking()
        outcomes = {layout: simulated.outcome for layout, simulated in self.done.items()}
        left = [candidate for candidate in self.evaluator.candidates if candidate.layout not in self.failed]
        return challengers(left, outcomes, self.plan, best=ranking[0].outcome if ranking else None)

    def _others(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        tried = {*self.done, *self.failed}
        return by_objective((c for c in candidates if c.layout not in tried), self.plan.objectives)

    def _nearest_misses(self) -> list[Candidate]:
        """Of the layouts that fit into memory but miss the goal the two nearest: their simulation says by how much."""
        last = max((list(STAGES).index(c.miss.stage) for c in self.evaluator.fitting if c.miss), default=0)
        stuck = [c for c in self.evaluator.fitting if c.miss and list(STAGES).index(c.miss.stage) == last]
        return sorted(stuck, key=lambda c: c.miss.factor if c.miss else 0.0)[:2]

    def simulate_sample(self) -> list[Candidate]:
        """Simulate layouts drawn at random; the drawn ones."""
        chosen = random_sample(self.evaluator, self.plan)
        self.simulate(chosen)
        return chosen

    def simulate(self, candidates: Sequence[Candidate]) -> None:
        """Simulate what is not simulated yet."""
        new = [c.layout for c in candidates if c.layout not in self.done and c.layout not in self.failed]
        space = self.evaluator.space
        scenarios = [(space.scenario(layout), self._values(layout)) for layout in new]
        for layout, record, (scenario, values) in zip(new, self.folder.simulate(scenarios), scenarios, strict=True):
            if record.result is None:
                self.failed[layout] = record
                continue
            outcome = outcome_of(scenario, record.result["step_time_s"])
            self.done[layout] = Simulated(record.id, scenario, values, outcome, record.result)

    def _values(self, layout: Layout) -> dict[str, Any]:
        values = self.evaluator.space.values(layout)
        return values if self.evaluator.space.model is self.plan.model else {"model": "baseline", **values}

    @property
    def usable(self) -> list[Simulated]:
        """Layouts that keep the share of memory free that the plan asks for, in every routing sample."""
        free = self.plan.constraints.free_memory
        return [layout for layout in self.done.values() if _fits(layout.result["memory"], free=free)]

    def ranking(self) -> list[Simulated]:
        """Simulated layouts that meet the goal, best first."""
        return ranked(self.plan, self.usable, lambda layout: layout.outcome)

    def require_simulated(self) -> None:
        """Raise UserError where a simulation failed: then nobody knows whether a layout meets the goal."""
        broken = [record for record in self.failed.values() if record.status == "failed"]
        if broken:
            raise UserError(
                f"{self.plan.name}: {len(broken)} of {len(self.failed) + len(self.done)} simulations failed, so no "
                f"verdict is given: {broken[0].reason}"
            )

    def why_nothing_fits(self) -> str:
        """The binding constraint in one line."""
        misses = [(layout, missed_limit(self.plan, layout.outcome)) for layout in self.usable]
        near: list[tuple[Simulated, MissedLimit]] = [(layout, miss) for layout, miss in misses if miss is not None]
        head = f"{self.plan.name}: none of {self.evaluator.rejections.looked_at:,} combinations meets the goal; "
        if not near:
            if self.failed and self.evaluator.candidates:
                return f"{head}memory: {next(iter(self.failed.values())).reason}"
            return head + self.evaluator.rejections.why_empty()
        last = max(list(STAGES).index(miss.stage) for _, miss in near)
        stuck = [pair for pair in near if list(STAGES).index(pair[1].stage) == last]
        layout, miss = min(stuck, key=lambda pair: pair[1].factor)
        remedies = {
            "speed": "the fastest layout gives {}; lower constraints.tokens_per_second or offer more GPUs",
            "deadline": "the fastest layout takes {}; give more days, more or faster GPUs",
            "budget": "the cheapest layout in time costs {}; give more money, more days or cheaper GPUs",
        }
        return f"{head}{miss.stage}: {remedies[miss.stage].format(miss.text)} (simulated: {layout.scenario.name})"


def _fits(memory: dict[str, Any], *, free: float) -> bool:
    pairs = zip(memory["peak_bytes_by_pipeline_rank"], memory["capacity_bytes_by_pipeline_rank"], strict=True)
    return all(peak <= (1 - free) * capacity for peak, capacity in pairs)


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
        if missed_limit(plan, layout.outcome) is not None and missed_limit(plan, free[layout.id]) is None
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
    miss = missed_limit(plan, best.outcome)
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
    miss = missed_limit(plan, outcome)
    return 0.0 if miss is None else miss.factor
