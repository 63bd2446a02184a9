"""Ctrl-C, SIGTERM or a closed terminal: one line that says what was kept and how to go on."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesim.scenario import Scenario

INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT


class Interrupted(Exception):
    """The user stopped the work; the message says what was kept and how to resume."""


@contextmanager
def interrupts_say(what_was_kept: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C inside the block into Interrupted with the text that `what_was_kept` gives then."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {what_was_kept()}") from None


def kept_of_training(scenario: "Scenario", cache_dir: Path | None) -> str:
    """What the cache holds of this scenario's router: the trace, a checkpoint, or nothing."""
    again = "run the same command again"
    if scenario.routing.kind != "train":
        return f"nothing was written; {again} to start over"
    from moesim.routing.cache import checkpoint_path, trace_path
    from moesim.routing.request import TrainingRequest

    request = TrainingRequest.from_scenario(scenario)
    trace = trace_path(request, cache_dir)
    if trace.exists():
        return f"the trained router is kept in {trace}; {again} to go straight to the simulation"
    checkpoint = checkpoint_path(request, cache_dir)
    if checkpoint.exists():
        return f"the training so far is kept in {checkpoint}; {again} to resume it"
    return f"no training step was kept; {again} to start over"
