"""How a display shows the progress of a sweep or a plan."""

from moesim.display import Display
from moesim.study.progress import Progress, Watch


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
