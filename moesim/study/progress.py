"""How far a pool is: what the display shows after every change."""

from collections.abc import Callable
from dataclasses import dataclass

from moesim.display import Display


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Counts of points and of routers to train first; `running` counts both."""

    points: int
    done: int = 0
    failed: int = 0
    infeasible: int = 0
    routers: int = 0
    trained: int = 0
    running: int = 0

    @property
    def finished(self) -> int:
        """Points with a record."""
        return self.done + self.failed + self.infeasible


Watch = Callable[[Progress], None]


def show_points(display: Display) -> Watch:
    """What shows routers trained and points finished on the display."""

    def show(progress: Progress) -> None:
        counts = {"routers": (progress.trained, progress.routers), "points": (progress.finished, progress.points)}
        for name, (completed, total) in counts.items():
            if total:
                display.show(name, completed=completed, total=total, note=_note(name, progress))

    return show


def _note(name: str, progress: Progress) -> str:
    if name != "points":
        return ""
    counts = {"running": progress.running, "infeasible": progress.infeasible, "failed": progress.failed}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)
