"""The progress of a training run, where somebody watches."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesim.moe.progress import ProgressCallback


def watched_training(*, quiet: bool) -> "AbstractContextManager[ProgressCallback | None]":
    """A bar on stderr that appears with the first training step; nothing when quiet or when stderr is no terminal."""
    if quiet or not sys.stderr.isatty():
        return nullcontext()
    from moesim.moe.progress import training_bar

    return training_bar()
