"""From the file of a trace to a step: its operations with what they took, and what that corrects."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from moesim.errors import UserError
from moesim.importing.calibration import (
    Calibration,
    corrections_of,
    load_calibration,
    model_of_trace,
    step_times,
)
from moesim.importing.trace_collectives import collectives_of, seconds_alone
from moesim.importing.trace_file import AGAIN, TraceEvents, is_step_file, read_trace
from moesim.importing.trace_links import (
    ENGINE,
    OPTIMIZER_STEP,
    PROFILER_STEP,
    OpTree,
    TracedOp,
    linked,
)
from moesim.importing.trace_shapes import knows_traced, parameters_seen, recorded
from moesim.kernels import gpu_of_device, kernel_model
from moesim.recorded.layers import with_layers
from moesim.recorded.pricing import prices
from moesim.recorded.step_file import RecordedOp, merged

ONE_STEP = "profile one step alone: torch.profiler.schedule(wait=1, warmup=1, active=1)"


@dataclass(frozen=True, kw_only=True)
class TracedStep:
    """A step of a trace: equal operations once, each with its mean seconds, and what they correct."""

    source: str
    ops: tuple[RecordedOp, ...]
    calibration: Calibration


def step_with_times(path: Path, *, gpu: str | None = None) -> TracedStep:
    """The step of a trace, or of a file that was made of one. Raises UserError, one line, for another file."""
    if not is_step_file(path):
        return traced_step(path, gpu=gpu)
    source, ops, calibration = load_calibration(path)
    return TracedStep(source=source, ops=tuple(ops), calibration=calibration)


def traced_step(path: Path, *, gpu: str | None = None) -> TracedStep:
    """The step of a trace. `gpu`: as the catalogue calls the GPU of the trace, which is else told by its device.

    Raises UserError, one line with the remedy, where the file is no trace of one whole training step with shapes.
    """
    events = read_trace(path)
    tree = OpTree(events)
    _check(path, events, tree)
    links = linked(events, tree, knows=knows_traced)
    own = [each for each in links.ops if each.op.message is None]
    _check_shapes(path, own)
    parameters = parameters_seen(events.ops, micro_batches=_micro_batches(tree))
    device = events.gpu or "a GPU that the trace does not name"
    known = gpu or (gpu_of_device(device) if events.gpu else None)
    if known is None:
        raise UserError(f"{path} is a trace of {device}; say which GPU of `moesim gpus` that is with --gpu")
    kernels = kernel_model(known)
    alone = seconds_alone(links, kernels.contention)
    each_op = [
        replace(recorded(each, parameters=parameters), measured_s=seconds)
        for each, seconds in zip(own, alone, strict=True)
    ]
    ops = merged(with_layers(each_op))
    model, clock, modelled = model_of_trace(ops, kernels)
    times = step_times(events, ops=len(own))
    priced = [price.seconds + times.gap_per_op_s for price in prices(each_op, model)]
    sent, slowed_s = collectives_of(links, priced, kernels, gpu=known)
    calibration = Calibration(
        device=device,
        gpu=known,
        corrections=corrections_of(ops, prices(ops, model)),
        collectives=sent,
        times=times,
        clock_mhz=clock,
        modelled_clock_mhz=modelled,
        unexplained_s=sum(work.end - work.start for work in links.unexplained),
        slowed_s=sum(each.seconds for each in own) - sum(alone),
        predicted_slowed_s=slowed_s,
    )
    return TracedStep(source=path.name, ops=tuple(ops), calibration=calibration)


def _check(path: Path, events: TraceEvents, tree: OpTree) -> None:
    if not events.device_work:
        raise UserError(
            f"{path} has no kernels of a GPU; profile on one, with activities=[ProfilerActivity.CPU, "
            "ProfilerActivity.CUDA]"
        )
    if not events.ops:
        raise UserError(f"{path} has kernels but no operations; add ProfilerActivity.CPU to the activities")
    steps = _steps(events, tree)
    if len(steps) > 1:
        raise UserError(f"{path} holds {len(steps)} steps ({', '.join(steps[:6])}); {ONE_STEP}")
    if "backward" not in tree.phases:
        raise UserError(
            f"{path} has no backward pass: it is a trace of inference; profile a whole training step, with "
            "loss.backward() and optimizer.step()"
        )
    if "forward" not in tree.phases:
        raise UserError(f"{path} has no forward pass; profile a whole training step, from the model's call on")


def _steps(events: TraceEvents, tree: OpTree) -> list[str]:
    """The names of the steps in a trace: as the profiler numbers them, or by when their optimizers ran."""
    numbered = [span for span in events.annotations if span.name.startswith(PROFILER_STEP)]
    backward = [op.start for op in events.ops if op.name.startswith(ENGINE)]
    begin = min(op.start for op in events.ops)
    named, last = [], float("-inf")
    for span in events.annotations:
        if not span.name.startswith(OPTIMIZER_STEP):
            continue
        if any(last < start < span.start for start in backward):
            within = next((each.name for each in numbered if each.start <= span.start < each.end), None)
            named.append(within or f"an optimizer's step at {1e3 * (span.start - begin):.0f} ms")
        last = span.start
    return named


def _check_shapes(path: Path, ops: Sequence[TracedOp]) -> None:
    total = sum(each.seconds for each in ops)
    shaped = sum(each.seconds for each in ops if each.op.dims)
    if not ops:
        raise UserError(f"{path}: no kernel could be traced to an operation; {AGAIN}")
    if shaped < 0.5 * total:
        raise UserError(f"{path} has no shapes of operations; profile again with record_shapes=True")


def _micro_batches(tree: OpTree) -> int:
    """How often the step went from a forward to a backward pass."""
    outer = [
        phase
        for op, phase, parent in zip(tree.ops, tree.phases, tree.parents, strict=True)
        if parent < 0 and (op.dims or phase == "backward")
    ]
    return sum(first == "forward" and second == "backward" for first, second in pairwise(outer))
