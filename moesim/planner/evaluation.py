"""Combinations evaluated: each is rejected with a reason, or a candidate with what the screen expects of it.

Many are evaluated at once by processes of this machine, with the results of one process in the same order.
Combinations that share parts go to one process together, so that the seconds of each part are found about once.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from moesim.errors import UserError
from moesim.planner.outcome import Miss, Outcome, missed, outcome_of
from moesim.planner.plan import Plan
from moesim.planner.rejections import Rejections
from moesim.planner.screen import Screen
from moesim.planner.space import Discarded, Layout, Space
from moesim.planner.traces import Traces
from moesim.scenario import TrainRouting
from moesim.study.workers import Lost, Workers, opened_workers
from moesim.units import format_bytes

SLACK = 1.1  # the screen may be off: what misses a limit by less than this factor is left to the simulation


class Candidate(NamedTuple):
    """A layout that fits into memory. `miss`: the limit that it misses by more than SLACK, by the screen."""

    layout: Layout
    screened: Outcome
    peak_bytes: float
    miss: Miss | None


class Violation(NamedTuple):
    """How far a combination is from a candidate, 0 where it keeps a constraint: for searches that need a direction."""

    structure: float
    memory: float
    goal: float


class Rejection(NamedTuple):
    """At which stage a combination is rejected, why, and by which factor it misses a limit."""

    stage: str
    reason: str
    detail: str
    factor: float | None = None


class Evaluation(NamedTuple):
    """What becomes of one combination; `rejection` is None where it may meet the goal."""

    candidate: Candidate | None
    violation: Violation
    rejection: Rejection | None


def evaluate(space: Space, screen: Screen, layout: Layout) -> Evaluation:
    """The evaluation of one combination; the same whatever else was evaluated before."""
    plan = space.plan
    try:
        scenario = space.scenario(layout)
    except Discarded as why:
        return Evaluation(None, Violation(1.0, 1.0, 1.0), Rejection(why.stage, why.reason, why.detail))
    peak, capacity = screen.memory(scenario)
    usable = capacity * (1 - plan.constraints.free_memory)
    if peak > usable:
        gpu = scenario.cluster.pools[0].gpu_name
        detail = f"the smallest layout needs {format_bytes(peak)} of the {format_bytes(usable)} of a {gpu}"
        rejection = Rejection("memory", gpu, f"{detail} ({scenario.name})", peak / usable)
        return Evaluation(None, Violation(0.0, peak / usable - 1, 1.0), rejection)
    outcome = outcome_of(scenario, screen.step_seconds(scenario), screen=True)
    miss = missed(plan, outcome)
    if miss is None or miss.factor <= SLACK:
        return Evaluation(Candidate(layout, outcome, peak, None), Violation(0.0, 0.0, 0.0), None)
    rejection = Rejection(miss.stage, miss.stage, f"{miss.text} ({scenario.name})", miss.factor)
    return Evaluation(Candidate(layout, outcome, peak, miss), Violation(0.0, 0.0, miss.factor - 1), rejection)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates combinations of one space and counts what becomes of them.

    `fitting`: all that fit into memory, in the order of evaluating, also those that miss the goal.
    """

    space: Space
    screen: Screen
    rejections: Rejections = field(default_factory=Rejections)
    fitting: list[Candidate] = field(default_factory=list)
    _seen: dict[Layout, Evaluation] = field(init=False, default_factory=dict, repr=False)

    @property
    def candidates(self) -> list[Candidate]:
        """Those that may meet the goal."""
        return [candidate for candidate in self.fitting if candidate.miss is None]

    def knows(self, layout: Layout) -> bool:
        """Whether the combination was evaluated before."""
        return layout in self._seen

    def evaluate(self, layout: Layout) -> Evaluation:
        """The evaluation of a combination; each combination is counted once."""
        if layout not in self._seen:
            self.settle(layout, evaluate(self.space, self.screen, layout))
        return self._seen[layout]

    def settle(self, layout: Layout, evaluation: Evaluation) -> None:
        """Count a combination with an evaluation found elsewhere."""
        assert layout not in self._seen
        self._seen[layout] = evaluation
        if evaluation.candidate is not None:
            self.fitting.append(evaluation.candidate)
        if evaluation.rejection is None:
            self.rejections.keep()
        else:
            self.rejections.discard(*evaluation.rejection)


Progress = Callable[[int, int], None]  # done, of how many

SMALL = 300  # combinations that one process has evaluated before others have started
TRIES = 2  # of a group whose process is killed


@dataclass(frozen=True)
class EvaluationPool:
    """Processes that evaluate for one evaluator: `place` holds the processes, None where this process does it alone."""

    evaluator: Evaluator
    place: Workers | None = None
    cache_dir: Path | None = None

    def evaluate_all(self, layouts: Sequence[Layout], *, progress: Progress | None = None) -> None:
        """Evaluate the combinations; the evaluator counts them in their order, however many processes there are.

        Raises UserError when a process is killed twice over the same combinations.
        """
        new = [layout for layout in dict.fromkeys(layouts) if not self.evaluator.knows(layout)]
        evaluations = self._evaluations(self.place, new, progress) if self.place is not None and new else {}
        for number, layout in enumerate(layouts, start=1):
            if layout in evaluations:
                self.evaluator.settle(layout, evaluations.pop(layout))
            self.evaluator.evaluate(layout)
            if progress is not None and self.place is None:
                progress(number, len(layouts))

    def _evaluations(
        self, place: Workers, layouts: Sequence[Layout], progress: Progress | None
    ) -> dict[Layout, Evaluation]:
        space = self.evaluator.space
        waiting = [(group, 1) for group in grouped(space, layouts)]
        waiting.reverse()  # taken from the end
        running: dict[Future[Any], tuple[list[Layout], int]] = {}
        evaluations: dict[Layout, Evaluation] = {}
        while waiting or running:
            while waiting and place.has_room:
                group, tries = waiting.pop()
                future = place.submit(
                    evaluate_group, space.plan, space.model is space.plan.model, group, self.cache_dir
                )
                running[future] = group, tries
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                group, tries = running.pop(future)
                found = place.collect(future)
                if not isinstance(found, Lost):
                    evaluations.update(zip(group, found, strict=True))
                elif tries < TRIES:
                    waiting.append((group, tries + 1))
                else:
                    raise UserError(f"{space.plan.name}: the process screening layouts was killed; was memory short?")
            if progress is not None:
                progress(len(evaluations), len(layouts))
        return evaluations


@contextmanager
def opened_pool(
    evaluator: Evaluator, *, workers: int | None, cache_dir: Path | None, expected: int
) -> Iterator[EvaluationPool]:
    """A pool of `workers` processes (one per core by default), of this one alone for few `expected` combinations.

    Where routers are trained this process trains them first, so that no two processes train the same.
    """
    count = workers or len(os.sched_getaffinity(0))
    if count == 1 or expected <= SMALL:
        yield EvaluationPool(evaluator)
        return
    if isinstance(evaluator.space.plan.routing, TrainRouting):
        _train(evaluator)
    with opened_workers(count=count, cluster=None) as place:
        yield EvaluationPool(evaluator, place, cache_dir)


def _train(evaluator: Evaluator) -> None:
    for layout in evaluator.space.layouts():
        try:
            scenario = evaluator.space.scenario(layout)
        except Discarded:
            continue
        evaluator.screen.trace_of(scenario)


def grouped(space: Space, layouts: Sequence[Layout]) -> list[list[Layout]]:
    """Combinations whose parts and memory are much alike together; the largest group first."""
    groups: dict[tuple[object, ...], list[Layout]] = {}
    for layout in layouts:
        key = layout.tensor, layout.context, layout.expert, layout.expert_tensor, layout.micro_batch
        groups.setdefault(key, []).append(layout)
    return sorted(groups.values(), key=len, reverse=True)


def evaluate_group(plan: Plan, own_model: bool, layouts: Sequence[Layout], cache_dir: Path | None) -> list[Evaluation]:
    """The evaluations on some combinations of the plan, or of its baseline: what a process of a pool does."""
    space, screen = _screened(plan, own_model, cache_dir)
    return [evaluate(space, screen, layout) for layout in layouts]


@lru_cache(maxsize=1)
def _screened(plan: Plan, own_model: bool, cache_dir: Path | None) -> tuple[Space, Screen]:
    """What a process keeps from one group to the next."""
    return Space.of(plan) if own_model else Space.of_baseline(plan), Screen(Traces(cache_dir).of)
