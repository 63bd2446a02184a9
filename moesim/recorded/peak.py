"""The most memory that the tensors of a recorded step take at once, on one GPU and at the size of the recording."""

from collections.abc import Sequence
from dataclasses import dataclass

from moesim.parallel.memory import WORKSPACE_BYTES
from moesim.recorded.pricing import OPTIMIZER
from moesim.recorded.step_file import PEAK, RecordedOp

MOMENTS = 2.0  # of Adam, in the format of the weights


@dataclass(frozen=True, kw_only=True)
class StepPeak:
    """Bytes of tensors, as `torch.cuda.max_memory_allocated` counts them.

    held: weights, buffers and inputs. states: the optimizer's. phase: in which the most is alive. moving: of it what
    the step has made, gradients and activations, and the workspaces of products.
    """

    held: float
    states: float
    phase: str
    moving: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.held + self.states + self.moving


def step_peak(ops: Sequence[RecordedOp], *, micro_batches: int = 1) -> StepPeak | None:
    """That of a step of so many equal micro-batches; None of a trace, of an older file, and of a scaled recording.

    From the second micro-batch on the gradients of the first are there, too.
    """
    optimizer = next((op for op in ops if op.name == OPTIMIZER), None)
    if optimizer is None or PEAK not in optimizer.facts:
        return None
    facts, weights = optimizer.facts[PEAK], float(optimizer.reads[0][2])
    held, later = float(facts["held"]), weights * (micro_batches > 1)
    moving = {phase: float(facts[phase]) - held + later for phase in ("forward", "backward")}
    moving["optimizer"] = float(facts["made"])
    phase = max(moving, key=moving.__getitem__)
    return StepPeak(held=held, states=MOMENTS * weights, phase=phase, moving=moving[phase] + WORKSPACE_BYTES)
