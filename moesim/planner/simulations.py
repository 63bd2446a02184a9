"""The simulated layouts of one space: which, what came of them, and why none meets the goal."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moesim.errors import UserError
from moesim.planner.evaluation import Candidate, Evaluator
from moesim.planner.explanation import Simulated, ranked
from moesim.planner.folder import Folder
from moesim.planner.outcome import Miss, missed, outcome_of
from moesim.planner.plan import Plan
from moesim.planner.rejections import STAGES
from moesim.planner.selection import by_objective, challengers, first_choice, random_sample
from moesim.planner.space import Layout
from moesim.study import PointRecord


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
        misses = [(layout, missed(self.plan, layout.outcome)) for layout in self.usable]
        near: list[tuple[Simulated, Miss]] = [(layout, miss) for layout, miss in misses if miss is not None]
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
