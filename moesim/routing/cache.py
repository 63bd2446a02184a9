"""Traces by the content hash of their request: an equal scenario never trains twice. torch loads only to train.

Progress of a training run is one report per step; `show_training` shows it on a display.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from moesim.display import Display
from moesim.errors import MachineError, UserError
from moesim.files import turn
from moesim.routing.request import TrainingRequest
from moesim.trace import RoutingTrace, load_trace, save_trace


class StepReport(NamedTuple):
    """One finished training step: `step` counts from 1, `imbalance` is max / mean expert load over its tokens."""

    step: int
    num_steps: int
    train_loss: float
    imbalance: float


class SearchReport(NamedTuple):
    """One placement of experts that was simulated: `tried` counts from 1."""

    tried: int
    total: int
    step_time_s: float


ProgressCallback = Callable[[StepReport | SearchReport], None]


def show_training(display: Display) -> ProgressCallback:
    """What shows every report on the display."""

    def show(report: StepReport | SearchReport) -> None:
        if isinstance(report, SearchReport):
            note = f"step {1e3 * report.step_time_s:.4g} ms"
            display.show("placing the experts", completed=report.tried, total=report.total, note=note)
            return
        note = f"loss {report.train_loss:.3f}, imbalance {report.imbalance:.2f}"
        display.show("training the router", completed=report.step, total=report.num_steps, note=note)

    return show


def cache_directory() -> Path:
    """`$MOESIM_CACHE`, or `~/.cache/moesim`."""
    named = os.environ.get("MOESIM_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "moesim"


def trace_path(request: TrainingRequest, cache_dir: Path | None = None) -> Path:
    """Where the trace of `request` is kept."""
    return (cache_dir or cache_directory()) / "traces" / f"{request.content_hash()[:32]}.npz"


def checkpoint_path(request: TrainingRequest, cache_dir: Path | None = None) -> Path:
    """Where the model of `request` is kept, as far as it is trained: whoever records more of it needs no training."""
    return checkpoint_file(checkpoint_directory(cache_dir), request.training_hash())


def checkpoint_directory(cache_dir: Path | None = None) -> Path:
    """Where checkpoints of training lie."""
    return (cache_dir or cache_directory()) / "checkpoints"


def checkpoint_file(folder: Path, training_hash: str) -> Path:
    """The checkpoint of the training of that hash in `folder`."""
    return folder / f"{training_hash[:32]}.checkpoint"


def cached_trace(
    request: TrainingRequest, cache_dir: Path | None = None, *, progress: ProgressCallback | None = None
) -> RoutingTrace:
    """The trace of `request`: from the cache, or trained now (or resumed) and put there.

    Where another process trains it already this one waits, and says so if `progress` is asked for. A damaged cache file
    is reported on stderr and made again, never used. Raises UserError as `train_router` does, and MachineError when the
    cache cannot be written.
    """
    path = trace_path(request, cache_dir)

    def say() -> None:
        if progress is not None:
            print("another process trains this router; waiting for it", file=sys.stderr, flush=True)

    if (trace := _kept(request, path)) is not None:
        return trace
    with turn(checkpoint_path(request, cache_dir), on_wait=say):
        return _kept(request, path) or _trained(request, cache_dir, progress=progress)


def _kept(request: TrainingRequest, path: Path) -> RoutingTrace | None:
    """The trace in the cache; None where there is none, or a damaged one."""
    if not path.exists():
        return None
    try:
        trace = load_trace(path)
        if trace.provenance.get("content_hash") == request.content_hash():
            return trace
        reason = "it is the trace of another scenario"
    except UserError as error:
        reason = str(error)
    print(f"cached trace not used: {reason}; making it again", file=sys.stderr)
    path.unlink(missing_ok=True)
    return None


def _trained(request: TrainingRequest, cache_dir: Path | None, *, progress: ProgressCallback | None) -> RoutingTrace:
    from moesim.routing.training import train_router

    trace = train_router(request, progress=progress, checkpoint_dir=checkpoint_directory(cache_dir))
    path = trace_path(request, cache_dir)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_trace(trace, path)
    except MachineError as error:
        kept = checkpoint_path(request, cache_dir)
        raise MachineError(f"{error} with MOESIM_CACHE; the trained router is kept in {kept}") from error
    return trace
