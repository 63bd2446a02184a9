"""The progress of a training run on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesim.routing.progress import ProgressCallback


@contextmanager
def watched_training(*, quiet: bool) -> "Iterator[ProgressCallback | None]":
    """What to call after every training step: it shows nothing for a cached router; None when quiet."""
    from moesim.display import opened_display
    from moesim.routing.progress import show_training

    with opened_display(quiet=quiet) as display:
        yield None if display is None else show_training(display)
