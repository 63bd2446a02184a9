"""How far the work is: bars where somebody watches, and a line now and then where only a log does."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 20.0  # from the first report to the first line, and from line to line: short work prints none
_SPEED_PERIOD = 3600.0  # seconds over which the speed is averaged: a point may take minutes


@dataclass
class Bars:
    """A row for every kind of work; they appear with the first report."""

    progress: Progress
    rows: dict[str, TaskID] = field(default_factory=dict)

    def show(self, name: str, *, completed: int, total: int, note: str = "") -> None:
        """Bring the row of `name` up to date; a smaller number than before begins it again."""
        if not self.rows:
            self.progress.start()
        if name not in self.rows:
            self.rows[name] = self.progress.add_task(name, total=total, note=note)
        if completed < self.progress.tasks[self.progress.task_ids.index(self.rows[name])].completed:
            self.progress.reset(self.rows[name], total=total)
        self.progress.update(self.rows[name], completed=completed, total=total, note=note)


@dataclass
class Lines:
    """Every LINE_SECONDS at most a line, of what was reported last."""

    write: Callable[[str], object]
    clock: Callable[[], float] = time.monotonic
    _last: float | None = None  # when a line was written, or the work began

    def show(self, name: str, *, completed: int, total: int, note: str = "") -> None:
        """Write a line if the last one is long ago. A log that takes no more lines stops no work."""
        now = self.clock()
        if self._last is None:
            self._last = now
        if now - self._last < LINE_SECONDS:
            return
        self._last = now
        try:
            self.write(f"{name}: {completed:,} of {total:,}{', ' if note else ''}{note}\n")
        except OSError:
            self.write = lambda line: None


Display = Bars | Lines


@contextmanager
def opened_display(*, quiet: bool = False, console: Console | None = None) -> Iterator[Display | None]:
    """The display of one call on stderr (or `console`); None when `quiet`."""
    if quiet:
        yield None
        return
    console = console or Console(stderr=True)
    if not console.is_terminal:
        stream = console.file

        def write(line: str) -> None:
            stream.write(line)
            stream.flush()

        yield Lines(write)
        return
    bars = Bars(
        Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=_SPEED_PERIOD,
        )
    )
    try:
        yield bars
    finally:
        if bars.rows:
            bars.progress.stop()
