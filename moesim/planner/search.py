"""Which combinations are looked at: all of them, or those that NSGA-II asks for where there are too many.

The search evaluates by the screen. It is driven by Optuna, one trial at a time; every trial's sampler is seeded by the
number of trials finished before it, so that an interrupted search that goes on takes the same way as one that was not.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.errors import UserError
from moesim.planner.judge import Judge
from moesim.planner.plan import Search
from moesim.seeding import stream_seed

if TYPE_CHECKING:
    import optuna

Progress = Callable[[int, int], None]  # done, of how many

NOT_A_LAYOUT = 1e30  # objective of what cannot be evaluated; its constraints decide


def uses_nsga2(search: Search, size: int) -> bool:
    """Whether a space of `size` combinations is searched instead of enumerated."""
    return search.method == "nsga2" or (search.method == "auto" and size > search.enumerate_at_most)


def enumerate_space(judge: Judge, *, progress: Progress | None = None) -> None:
    """Judge every combination."""
    size = judge.space.size
    for number, layout in enumerate(judge.space.layouts(), start=1):
        judge.judge(layout)
        if progress is not None:
            progress(number, size)


def search_space(judge: Judge, *, storage: "str | Path", study_name: str, progress: Progress | None = None) -> None:
    """Judge the combinations that NSGA-II asks for, `search.trials` in all, finished ones in `storage` included.

    `storage` is a journal file or a database URL; several processes may work on one database together. Raises UserError
    for a storage out of reach.
    """
    import optuna

    plan = judge.space.plan
    study = _study(storage, study_name, plan.search.population, len(plan.objectives))
    axes = {name: values for name, values in judge.space.axes.items() if len(values) > 1}
    fixed = {name: values[0] for name, values in judge.space.axes.items() if len(values) == 1}

    def layout_of(params: dict[str, int]) -> dict[str, object]:
        return fixed | {name: values[params[name]] for name, values in axes.items()}

    complete = (optuna.trial.TrialState.COMPLETE,)
    done = study.get_trials(deepcopy=False, states=complete)
    for earlier in done:
        judge.judge(judge.space.layout(layout_of(earlier.params)))
    finished = len(done)
    while finished < plan.search.trials:
        study.sampler = optuna.samplers.NSGAIISampler(
            population_size=plan.search.population, seed=stream_seed(plan.seed, "nsga2", finished) % 2**32
        )
        trial = study.ask()
        params = {name: trial.suggest_int(name, 0, len(values) - 1) for name, values in axes.items()}
        candidate, violation = judge.judge(judge.space.layout(layout_of(params)))
        for name, amount in violation._asdict().items():
            trial.set_constraint(name, amount)
        values = (
            [NOT_A_LAYOUT] * len(plan.objectives)
            if candidate is None
            else list(candidate.screened.objectives(plan.objectives))
        )
        study.tell(trial, values)
        finished = len(study.get_trials(deepcopy=False, states=complete))
        if progress is not None:
            progress(finished, plan.search.trials)


def _study(storage: "str | Path", name: str, population: int, objectives: int) -> "optuna.Study":
    import optuna
    from optuna.storages.journal import JournalFileBackend

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
    except Exception as error:  # database drivers raise errors of their own
        text = " ".join(str(error).split())
        raise UserError(f"{storage}: cannot keep the search there: {text}; give another --storage") from None
