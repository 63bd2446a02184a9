"""The one progress display of a sweep or a plan, where somebody watches."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from moesim.study.progress import Progress, Watch

_SPEED_PERIOD = 3600.0  # seconds over which the speed is averaged: a point may take minutes


@contextmanager
def watched_points(*, quiet: bool, console: Console | None = None) -> Iterator[Watch | None]:
    """Bars on stderr (or `console`): routers trained, points finished, time left. None when nobody would see them.

    They appear with the first report: a plan may show the training of a router before.
    """
    if quiet or (console is None and not sys.stderr.isatty()):
        yield None
        return
    bars = Bars(
        SpinnerColumn(),
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console or Console(stderr=True),
        speed_estimate_period=_SPEED_PERIOD,
    )
    tasks: dict[str, TaskID] = {}

    def show(progress: Progress) -> None:
        counts = {"routers": (progress.trained, progress.routers), "points": (progress.finished, progress.points)}
        for name, (completed, total) in counts.items():
            if total and name not in tasks:
                bars.start()
                tasks[name] = bars.add_task(name, total=total, note="")
            if name in tasks:
                bars.update(tasks[name], completed=completed, total=total, note=_note(name, progress))

    try:
        yield show
    finally:
        if tasks:
            bars.stop()


def _note(name: str, progress: Progress) -> str:
    if name != "points":
        return ""
    counts = {"running": progress.running, "infeasible": progress.infeasible, "failed": progress.failed}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)
