"""Which combinations are looked at, and their evaluation: rejected with a reason, or a candidate with what the screen
expects of it.

All are looked at, or those that NSGA-II asks for where there are too many. The search evaluates by the screen. It is
driven by Optuna, one generation at a time; every trial's sampler is seeded by the trial's number, so that an
interrupted search that goes on takes the same way as one that was not.

Many are evaluated at once by processes of this machine, with the results of one process in the same order.
Combinations that share parts go to one process together, so that the seconds of each part are found about once; the
routing of layouts is obtained once for all that would get the same.
"""

import os
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moesim.errors import UserError
from moesim.planner.outcome import MissedLimit, Outcome, Rejections, missed_limit, outcome_of
from moesim.planner.plan import Objective, Plan, Search
from moesim.planner.screen import Screen
from moesim.planner.space import Discarded, Layout, Space
from moesim.routing.request import ProgressCallback, TrainingRequest
from moesim.run import obtain_trace
from moesim.scenario import Scenario
from moesim.scenario.routing import StatedRouting, TraceRouting, TrainRouting
from moesim.seeding import stream_seed
from moesim.study.workers import WorkerDied, Workers, opened_workers
from moesim.trace import RoutingTrace
from moesim.trace.provenance import check_agreement
from moesim.units import format_bytes

if TYPE_CHECKING:
    import optuna

TOKENS = 262_144  # recorded or drawn: as many as for a whole step, though a layout may be screened on a part of one


@dataclass(frozen=True)
class Traces:
    """`of` gives the routing of a scenario; `progress` is told of training steps, `cache_dir` holds trained traces."""

    cache_dir: Path | None
    progress: ProgressCallback | None = None
    _known: dict[Hashable, RoutingTrace | None] = field(init=False, default_factory=dict, repr=False)

    def of(self, scenario: Scenario) -> RoutingTrace | None:
        """The trace of the scenario's router; None for a dense model. Raises UserError where a file does not fit.

        It depends on the scenario alone, not on those that were asked for before: the global batch, which differs
        between a layout and the part of it that is screened, counts as at least TOKENS.
        """
        if scenario.model.experts == 0:
            return None
        whole = _with_whole_batch(scenario)
        key = _key(whole)
        if key not in self._known:
            self._known[key] = self._obtained(whole)
        return self._known[key]

    def _obtained(self, scenario: Scenario) -> RoutingTrace | None:
        read = next(iter(self._known.values()), None)
        if read is None or not isinstance(scenario.routing, TraceRouting):
            return obtain_trace(scenario, progress=self.progress, cache_dir=self.cache_dir)
        check_agreement(read, scenario.routing, wanted=scenario.router_shape())  # one plan, one file
        return read


def _with_whole_batch(scenario: Scenario) -> Scenario:
    workload = scenario.workload
    sequences = -(-TOKENS // workload.sequence_length)
    return scenario.model_copy(update={"workload": workload.model_copy(update={"global_batch": sequences})})


def _key(scenario: Scenario) -> Hashable:
    """Equal for scenarios that get the same trace."""
    if isinstance(scenario.routing, TrainRouting):
        return TrainingRequest.from_scenario(scenario).content_hash()
    if isinstance(scenario.routing, TraceRouting):
        return scenario.router_shape()
    window = scenario.parallelism.expert * scenario.tokens_per_micro_batch
    drawn = scenario.router_shape(), max(TOKENS, window)
    if not isinstance(scenario.routing, StatedRouting):
        return drawn
    return *drawn, scenario.placement, scenario.parallelism.context, scenario.parallelism.tensor


SLACK = 1.1  # the screen may be off: what misses a limit by less than this factor is left to the simulation


class Candidate(NamedTuple):
    """A layout that fits into memory. `miss`: the limit that it misses by more than SLACK, by the screen."""

    layout: Layout
    screened: Outcome
    peak_bytes: float
    miss: MissedLimit | None


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
        gpu = scenario.cluster.main_pool.gpu_name
        detail = f"the smallest layout needs {format_bytes(peak)} of the {format_bytes(usable)} of a {gpu}"
        rejection = Rejection("memory", gpu, f"{detail} ({scenario.name})", peak / usable)
        return Evaluation(None, Violation(0.0, peak / usable - 1, 1.0), rejection)
    outcome = outcome_of(scenario, screen.step_seconds(scenario), screen=True)
    miss = missed_limit(plan, outcome)
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
                if not isinstance(found, WorkerDied):
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


NOT_A_LAYOUT = 1e30  # objective of what cannot be evaluated; its constraints decide


def uses_nsga2(search: Search, size: int) -> bool:
    """Whether a space of `size` combinations is searched instead of enumerated."""
    return search.method == "nsga2" or (search.method == "auto" and size > search.enumerate_at_most)


def enumerate_space(pool: EvaluationPool, *, progress: Progress | None = None) -> None:
    """Evaluate every combination."""
    pool.evaluate_all(list(pool.evaluator.space.layouts()), progress=progress)


def search_space(
    pool: EvaluationPool, *, storage: "str | Path", study_name: str, progress: Progress | None = None
) -> None:
    """Evaluate the combinations that NSGA-II asks for, `search.trials` in all, finished ones in `storage` included.

    A generation is asked for at once, for it depends on the one before it alone. `storage` is a journal file or a
    database URL; several processes may work on one database together. Raises UserError for a storage out of reach.
    """
    import optuna

    space, search = pool.evaluator.space, pool.evaluator.space.plan.search
    study = _study(storage, study_name, search.population, len(space.plan.objectives))
    axes = {name: values for name, values in space.axes.items() if len(values) > 1}
    fixed = {name: values[0] for name, values in space.axes.items() if len(values) == 1}

    def layout_of(params: dict[str, int]) -> Layout:
        return space.layout(fixed | {name: values[params[name]] for name, values in axes.items()})

    def asked(number: int) -> optuna.Trial:
        study.sampler = optuna.samplers.NSGAIISampler(
            population_size=search.population, seed=stream_seed(space.plan.seed, "nsga2", number) % 2**32
        )
        trial = study.ask()
        for name, values in axes.items():
            trial.suggest_int(name, 0, len(values) - 1)
        return trial

    complete = (optuna.trial.TrialState.COMPLETE,)
    done = study.get_trials(deepcopy=False, states=complete)
    pool.evaluate_all([layout_of(earlier.params) for earlier in done])
    finished = len(done)
    while finished < search.trials:
        left = min(search.population - finished % search.population, search.trials - finished)
        trials = [asked(number) for number in range(finished, finished + left)]
        layouts = [layout_of(trial.params) for trial in trials]
        pool.evaluate_all(layouts)
        for trial, layout in zip(trials, layouts, strict=True):
            _tell(study, trial, pool.evaluator.evaluate(layout), objectives=space.plan.objectives)
            finished += 1
            if progress is not None:
                progress(finished, search.trials)
        finished = len(study.get_trials(deepcopy=False, states=complete))  # others may work on the same database


def _tell(
    study: "optuna.Study", trial: "optuna.Trial", evaluation: Evaluation, *, objectives: Sequence[Objective]
) -> None:
    for name, amount in evaluation.violation._asdict().items():
        trial.set_constraint(name, amount)
    candidate = evaluation.candidate
    values = [NOT_A_LAYOUT] * len(objectives) if candidate is None else candidate.screened.objectives(objectives)
    study.tell(trial, values)


def _study(storage: "str | Path", name: str, population: int, objectives: int) -> "optuna.Study":
    import optuna
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.NSGAIISampler(population_size=population, seed=0)
    backend: str | optuna.storages.BaseStorage
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a journal was experimental when this was written
            if isinstance(storage, Path):
                backend = optuna.storages.JournalStorage(JournalFileBackend(str(storage)))
            else:
                backend = storage
            return optuna.create_study(
                storage=backend,
                study_name=name,
                sampler=sampler,
                directions=["minimize"] * objectives,
                load_if_exists=True,
            )
    except (OSError, ValueError, RuntimeError, ImportError, optuna.exceptions.OptunaError, SQLAlchemyError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"{storage}: cannot keep the search there: {text}; give another --storage") from None
