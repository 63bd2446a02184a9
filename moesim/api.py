"""The Python interface, `import moesim`: what the command line does, with plain objects in place of screens.

Everything here is imported when it is first used, so that `import moesim` costs nothing.

>>> import moesim
>>> scenario = moesim.load_scenario("quickstart", {"routing": {"kind": "uniform"}, "uncertainty.samples": 2})
>>> run = moesim.simulate(scenario)
>>> run.result["gpus"]
8
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.errors import InfeasibleError, UserError
from moesim.flags import WRITERS
from moesim.flags.megatron import read_megatron
from moesim.flags.model_flags import Choice
from moesim.planner.planning import ProgressCallbacks, make_plan
from moesim.planner.serving_plan import ServingPlan, load_any_plan
from moesim.planner.serving_planning import make_serving_plan
from moesim.planner.simulations import Folder
from moesim.reliability import Goodput, goodput
from moesim.results import RunRecord
from moesim.routing.request import ProgressCallback
from moesim.run import obtain_trace, simulate
from moesim.scenario import GpuSpec, Scenario, gpu_names, gpu_spec, scenario_from_mapping
from moesim.scenario import load_scenario as _load_file
from moesim.shipped import resolve
from moesim.strict_json import json_text
from moesim.study import PointRecord
from moesim.sweeper import SweepFolder, load_study
from moesim.sweeper import sweep as _sweep
from moesim.trace import RoutingTrace
from moesim.trace import load_trace as _load_file_of_trace
from moesim.trace.library import is_library_name, load_library
from moesim.whatif import what_if

Overrides = Mapping[str, Any]

__all__ = [
    "Goodput",
    "GpuSpec",
    "InfeasibleError",
    "PointRecord",
    "RoutingTrace",
    "RunRecord",
    "Scenario",
    "UserError",
    "command_line",
    "from_megatron",
    "goodput",
    "gpus",
    "load_scenario",
    "load_trace",
    "obtain_trace",
    "plan",
    "save_run",
    "simulate",
    "sweep",
    "what_if",
]


def load_scenario(source: str | Path | Mapping[str, Any], overrides: Overrides | None = None) -> Scenario:
    """The scenario in a file, of a shipped name such as "quickstart", or in nested dicts with the keys of a file.

    `overrides` maps dotted keys to values: {"workload.global_batch": 64}. The scenario is frozen; its attributes are
    the sections of the file in SI units. Raises UserError, one line with the place, and InfeasibleError for a layout
    that the cluster cannot hold.
    """
    texts = _override_texts(overrides)
    if isinstance(source, Mapping):
        return scenario_from_mapping(source, texts)
    return _load_file(resolve(source, "scenario"), texts)


def from_megatron(
    path: str | Path,
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    variables: Mapping[str, str] | None = None,
    routing: Choice | None = None,
    overrides: Overrides | None = None,
) -> Scenario:
    """The scenario that a launch script or YAML file of Megatron-LM is; nothing of the script is run.

    What flags do not say: the kind of `gpu` (h100), how many `gpus` (by the launcher), `variables` from outside, and
    the `routing`: "library", "train" or "uniform". What the step does not model of it stands in `model.left_out`.
    Raises UserError, one line that names the flag and its place.
    """
    texts = _override_texts(overrides)
    return read_megatron(Path(path), gpu=gpu, gpus=gpus, variables=variables, routing=routing, overrides=texts).scenario


def command_line(scenario: Scenario, software: str = "megatron") -> dict[str, Any]:
    """The flags of a scenario's layout for "megatron" or "torchtitan": `command` for a shell, `flags` by word, and what
    the software cannot do as `unsaid`, each entry a key and what it does instead. Raises UserError for another name.
    """
    if software not in WRITERS:
        raise UserError(f"no flags are written for {software!r}; use one of {', '.join(WRITERS)}")
    return WRITERS[software](scenario).as_json()


def save_run(run: RunRecord, out: str | Path, *, force: bool = False) -> Path:
    """Write the folder of a run, as `moesim run` does: result.json, report.html, arrays, the trace; returns `out`.

    Raises UserError where the folder holds another run, unless `force`.
    """
    from moesim.files import claimed
    from moesim.report.report import write_report
    from moesim.results.store import write_run

    folder = Path(out)
    with claimed(folder):
        write_run(run, folder, force=force, also={"report.html": lambda path: write_report(run, path)})
    return folder


def sweep(
    study: str | Path,
    *,
    out: str | Path,
    overrides: Overrides | None = None,
    workers: int | None = None,
    retry: bool = False,
    cache_dir: Path | None = None,
) -> tuple[PointRecord, ...]:
    """Simulate the points of a study (a file, or a shipped name such as "capacity") that the folder `out` lacks.

    Returns the records of all its points by number: `values` is what the study chose, `status` is "done", "failed" or
    "infeasible" with its `reason`, `result` is that of `simulate(...).result`. `workers` processes simulate, one per
    core by default. Raises UserError.
    """
    loaded = load_study(resolve(study, "study"), _override_texts(overrides))
    folder = SweepFolder(Path(out))
    return _sweep(loaded, folder, workers=workers, retry=retry, cache_dir=cache_dir).records


def plan(
    goal: str | Path,
    *,
    out: str | Path,
    overrides: Overrides | None = None,
    workers: int | None = None,
    force: bool = False,
    cache_dir: Path | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Any]:
    """Make the plan in a file or of a shipped name such as "deepseek-moe-16b", or go on with it, in the folder `out`.

    Returns what plan.json holds: `ranking` lists the ids of layouts, the best first, `outcomes` has the numbers of each
    (`usd`, `days`, `step_s`, `mfu`), `why` and `sensitivity` say what decided. `progress` is told of each training step
    of a router. A plan of serving (`goal: {serve: ...}`) is simulated in this process; its `ranking` has the numbers.
    Raises UserError, and InfeasibleError when nothing meets the goal.
    """
    loaded = load_any_plan(resolve(goal, "plan"), _override_texts(overrides))
    if isinstance(loaded, ServingPlan):
        return make_serving_plan(loaded, Path(out), force=force)
    folder = Folder(Path(out), loaded, workers=workers, cache_dir=cache_dir)
    return make_plan(folder, callbacks=ProgressCallbacks(training=progress), force=force)


def load_trace(source: str | Path) -> RoutingTrace:
    """The routing trace in a file that `moesim run` or `moesim trace --out` wrote, or of the library ("library:NAME").

    Raises UserError for what is no trace.
    """
    return load_library(str(source)) if is_library_name(str(source)) else _load_file_of_trace(source)


def gpus() -> tuple[GpuSpec, ...]:
    """The GPUs of the catalogue with peaks, memory, links and rent in SI units and USD, and their sources."""
    return tuple(gpu_spec(name) for name in gpu_names())


def _override_texts(overrides: Overrides | None) -> Sequence[str]:
    return [f"{key}={json_text(value)}" for key, value in (overrides or {}).items()]
