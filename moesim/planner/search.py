"""Which combinations are looked at: all of them, or those that NSGA-II asks for where there are too many.

The search evaluates by the screen. It is driven by Optuna, one generation at a time; every trial's sampler is seeded by
the trial's number, so that an interrupted search that goes on takes the same way as one that was not.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.errors import UserError
from moesim.planner.evaluation import Evaluation, EvaluationPool, Progress
from moesim.planner.plan import Objective, Search
from moesim.planner.space import Layout
from moesim.seeding import stream_seed

if TYPE_CHECKING:
    import optuna

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
