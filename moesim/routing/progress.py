"""Progress of a training run: one report per step, and how a display shows it; torch is not imported."""

from collections.abc import Callable
from typing import NamedTuple

from moesim.display import Display


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
