"""Progress of a training run: one report per step, and a bar for the terminal; torch is not imported."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class StepReport(NamedTuple):
    """One finished training step: `step` counts from 1, `imbalance` is max / mean expert load over its tokens."""

    step: int
    num_steps: int
    train_loss: float
    imbalance: float


ProgressCallback = Callable[[StepReport], None]


@contextmanager
def training_bar(console: Console | None = None) -> Iterator[ProgressCallback]:
    """A progress bar on stderr (or `console`) that appears with the first report: a cached trace shows none."""
    bar = Progress(
        TextColumn("training the router"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  imbalance {task.fields[imbalance]:.2f}"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
    )
    task: TaskID | None = None

    def show(report: StepReport) -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task("", total=report.num_steps, loss=0.0, imbalance=0.0)
        bar.update(task, completed=report.step, loss=report.train_loss, imbalance=report.imbalance)

    try:
        yield show
    finally:
        if task is not None:
            bar.stop()
