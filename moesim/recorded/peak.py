"""The most memory that tensors of a recorded step take, on one GPU at its own size, and what it says of a scenario.

The list of switches walks the moments of a step at any size and layout; the recording knows its own peak, at its own
size on one GPU. So the list is asked for that size, too, and what the recording takes more or less there, a scenario
takes at its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.parallel.memory.libraries import WORKSPACE_BYTES
from moesim.parallel.memory.rank import Recorded
from moesim.parallel.memory.report import recorded_beside
from moesim.parallel.memory.rows import even_rows
from moesim.recorded.pricing import DTYPES, OPTIMIZER
from moesim.recorded.scaling import RecordedStep, recorded_step
from moesim.recorded.sizes import StepSizes
from moesim.recorded.step_file import PEAK, RecordedOp
from moesim.recorded.widths import OF_LATENT, OF_MODEL, SHARED_WIDTH
from moesim.scenario import Scenario
from moesim.scenario.model import Mla, Model
from moesim.scenario.placement import Contiguous
from moesim.scenario.routing import NoCapacity
from moesim.scenario.schema import Parallelism

MOMENTS = 2.0  # of Adam, in the format of the weights


@dataclass(frozen=True, kw_only=True)
class StepPeak:
    """Bytes of tensors, as `torch.cuda.max_memory_allocated` counts them.

    held: weights, buffers and inputs. states: the optimizer's. phase: in which the most is alive. moving: of it what
    the step has made, gradients and activations, and the workspaces of GEMMs.
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


def recorded_memory(scenario: Scenario) -> Recorded | None:
    """For `memory_report`; None where no step is imported, and where its file knows no peak (a trace, an older file).

    Raises UserError for a file that is none.
    """
    if scenario.implementation.file is None:
        return None
    step = recorded_step(Path(scenario.implementation.file))
    peak = step_peak([each.op for each in step.ops])
    if peak is None:
        return None
    alike = _as_recorded(scenario, step)
    return recorded_beside(alike, even_rows(alike), peak_bytes=peak.total)


def _as_recorded(scenario: Scenario, step: RecordedStep) -> Scenario:
    """The scenario at the sizes of the recording, on one GPU, with nothing added for the allocator."""
    sizes, work = step.sizes, scenario.workload
    weights = next(each.op.reads[0][1] for each in step.ops if each.op.name == OPTIMIZER)
    precision = dict.fromkeys(("weights", "gradients", "optimizer"), DTYPES[weights]) | {"master": "none"}
    workload = {
        "sequence_length": sizes.sequence_length,
        "micro_batch": sizes.sequences,
        "global_batch": sizes.sequences,
        "recompute": "full" if step.recomputes else "none",
        "precision": work.precision.model_copy(update=precision),
    }
    return scenario.model_copy(
        update={
            "model": _model(scenario.model, sizes),
            "placement": Contiguous(),
            "capacity": NoCapacity(),
            "cluster": scenario.cluster.model_copy(update={"pools": scenario.cluster.pools[:1]}),
            "parallelism": Parallelism(),
            "workload": work.model_copy(update=workload),
            "memory": scenario.memory.model_copy(update={"reserved": 0.0, "allocator_overhead": 0.0}),
        }
    )


def _model(model: Model, sizes: StepSizes) -> Model:
    """The model of the recording; what it does not say is as in the scenario."""
    widths = sizes.widths
    update: dict[str, Any] = {
        "layers": sizes.dense_layers + sizes.moe_layers,
        "dense_layers": sizes.dense_layers,
        "dense_at": None,
        "hidden": sizes.hidden,
        "vocab": sizes.vocabulary,
        "mtp_layers": 0,
        **{key: widths[name] for key, name in OF_MODEL.items() if name in widths},
    }
    if sizes.experts:
        update |= {"experts": sizes.experts, "top_k": sizes.top_k, "expert_intermediate": sizes.expert_width}
    if model.shared_experts and SHARED_WIDTH in widths:
        update |= {"shared_experts": 1, "shared_intermediate": widths[SHARED_WIDTH]}
    if isinstance(model.attention, Mla):
        latent = {key: widths[name] for key, name in OF_LATENT.items() if name in widths}
        update["attention"] = model.attention.model_copy(update=latent)
    return model.model_copy(update=update)
