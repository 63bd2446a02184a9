"""What surrounds every verb: Ctrl-C, closed or full standard streams, and the progress of training on stderr."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

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


def open_closed_streams() -> None:
    """Give every closed standard stream a place that takes all: else the next file opened would get its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > number and not _is_open(number):
            os.dup2(descriptor, number)
            os.close(descriptor)
            descriptor = number
        setattr(sys, name, open(descriptor, mode, encoding="utf-8"))  # noqa: SIM115 - for the life of the process


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def let_go(stream: TextIO) -> None:
    """What is still buffered goes nowhere: Python writes it once more at its end, and would complain again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def say(line: str) -> None:
    """A line on standard error, where somebody can read it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        let_go(sys.stderr)


if TYPE_CHECKING:
    from moesim.routing.cache import ProgressCallback


@contextmanager
def watched_training(*, quiet: bool) -> "Iterator[ProgressCallback | None]":
    """What to call after every training step: it shows nothing for a cached router; None when quiet."""
    from moesim.display import opened_display
    from moesim.routing.cache import show_training

    with opened_display(quiet=quiet) as display:
        yield None if display is None else show_training(display)
