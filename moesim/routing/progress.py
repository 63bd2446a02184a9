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


ProgressCallback = Callable[[StepReport], None]


def show_training(display: Display) -> ProgressCallback:
    """What shows every report on the display."""

    def show(report: StepReport) -> None:
        note = f"loss {report.train_loss:.3f}, imbalance {report.imbalance:.2f}"
        display.show("training the router", completed=report.step, total=report.num_steps, note=note)

    return show
