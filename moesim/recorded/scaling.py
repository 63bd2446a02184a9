"""A recorded step by its parts, and at other sizes: other tokens, numbers of layers and experts, experts of a token and
their width, another vocabulary, and, where the recording followed the widths of its weights, any other width of the
model.

A file's parts are the operations of the layers of each kind, and those before and behind them. Every matched dimension
takes its new size, bytes follow. Layers of a kind are repeated, what lies outside of them is not. What is not matched
stays as it was recorded.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.recorded.layers import DENSE, EXPERTS_GEMM, MOE, module_in_layer
from moesim.recorded.pricing import GEMMS, OPTIMIZER, launch_of
from moesim.recorded.sizes import MatchedOp, StepSizes, Symbols, matched, of_experts, sizes_of
from moesim.recorded.step_file import (
    AGAIN,
    ALIGNED,
    ALIGNMENT,
    GRADIENT_WIDTHS,
    GRADIENTS,
    PEAK,
    RecordedOp,
    Seen,
    load_step,
)

CONSTANT = {"W", "1", "?"}


def scaled(ops: Sequence[RecordedOp], sizes: StepSizes, to: StepSizes) -> list[RecordedOp]:
    """The step at the sizes `to`, one optimizer step over it. Raises UserError for layers of a kind it has none of."""
    check_scalable(sizes, to)
    return scaled_ops(matched(ops, sizes), sizes, to)


def scaled_ops(ops: Iterable[MatchedOp], sizes: StepSizes, to: StepSizes) -> list[RecordedOp]:
    """The same of operations that are matched already; the optimizer goes over all whose gradients are whole there."""
    found = [each for op in ops if (each := scaled_op(op, sizes, to)) is not None]
    parameters = sum(op.count * math.prod(shape) for op in found for shape in op.facts.get(GRADIENTS, ()))
    return [updating(op, round(parameters)) if op.name == OPTIMIZER and parameters else op for op in found]


def check_scalable(sizes: StepSizes, to: StepSizes) -> None:
    """Raises UserError where the step has nothing that could be repeated."""
    for name, has, wanted in (
        ("dense", sizes.dense_layers, to.dense_layers),
        ("MoE", sizes.moe_layers, to.moe_layers),
    ):
        if wanted and not has:
            raise UserError(
                f"the recorded step has no {name} layers, of which {wanted} are wanted; record one that has"
            )
    for name, has, wanted in (
        *([] if sizes.widths else [("hidden size", sizes.hidden, to.hidden)]),
        *([] if sizes.knows_expert_width else [("expert width", sizes.expert_width, to.expert_width)]),
    ):
        if has != wanted:
            raise UserError(
                f"the step was recorded with {name} {has}, which no shape tells from other widths, and {wanted} is "
                "wanted; record it at that width, or anew with this version, which follows widths"
            )


def scaled_op(matched_op: MatchedOp, sizes: StepSizes, to: StepSizes) -> RecordedOp | None:
    """One kind of operation at other sizes; None where none of its layers is left."""
    op = matched_op.op
    layers = {DENSE: to.dense_layers, MOE: to.moe_layers}.get(op.layer or "", 1)
    if not layers:
        return None
    return replace(
        op,
        reads=_tensors(op.reads, matched_op.reads, sizes, to),
        writes=_tensors(op.writes, matched_op.writes, sizes, to),
        facts=_facts(matched_op, sizes, to),
        count=_times(op, layers) if op.layer else op.count,
        layers=layers,
    )


def _facts(matched_op: MatchedOp, sizes: StepSizes, to: StepSizes) -> Mapping[str, Any]:
    """With the shapes of weights at other sizes of the model, and at which multiples rows of matrices begin there."""
    op = matched_op.op
    facts = dict(op.facts)
    if GRADIENTS in facts:
        shapes = facts[GRADIENTS]
        texts = facts.get(GRADIENT_WIDTHS, [None] * len(shapes))
        facts[GRADIENTS] = [_weight(op, *each, sizes, to) for each in zip(shapes, texts, strict=True)]
    if op.name in GEMMS and op.reads[-1][1] in ("bfloat16", "float16"):
        before, after = (_aligned_bytes(matched_op, sizes, at) for at in (sizes, to))
        if facts.get(ALIGNED, ALIGNMENT) == before != after:
            facts = {name: fact for name, fact in facts.items() if name != ALIGNED}
            facts |= {ALIGNED: after} if after < ALIGNMENT else {}
    return facts


def _aligned_bytes(matched_op: MatchedOp, sizes: StepSizes, to: StepSizes) -> int:
    """As `gemm_facts` has it where rows of matrices are as long as widths of the model."""
    lengths = [
        2 * _dimension(size, symbol, sizes, to)
        for (shape, _, _), symbols in zip(matched_op.op.reads, matched_op.reads, strict=True)
        for size, symbol in zip(shape, symbols, strict=True)
        if size > 1 and (symbol in ("V", "E", "F", "J") or len(symbol) > 1)
    ]
    return math.gcd(ALIGNMENT, *lengths)


def _weight(
    op: RecordedOp, shape: Sequence[int], texts: Sequence[str] | None, sizes: StepSizes, to: StepSizes
) -> list[int]:
    if texts is not None:
        return [_dimension(size, text, sizes, to) if text else size for size, text in zip(shape, texts, strict=True)]
    new = {sizes.experts: to.experts} if op.layer == MOE and sizes.experts else {}
    if not op.layer:
        new = {sizes.vocabulary: to.vocabulary}
    elif of_experts(op, shape, sizes):
        new |= {factor * sizes.expert_width: factor * to.expert_width for factor in (1, 2)}
    return [new.get(size, size) for size in shape]


def updating(op: RecordedOp, parameters: int) -> RecordedOp:
    """An optimizer over so many parameters; the peak of the step is that of the recorded ones."""
    each = op.reads[0][2] / op.facts["parameters"]
    seen = (((parameters,), op.reads[0][1], round(parameters * each)),)
    facts = {name: value for name, value in op.facts.items() if name != PEAK}
    return replace(op, reads=seen, writes=seen, facts={**facts, "parameters": parameters})


def _times(op: RecordedOp, layers: int) -> float:
    count = op.count * layers / op.layers
    return int(count) if count == int(count) else count


def _tensors(
    tensors: tuple[Seen, ...], symbols: tuple[Symbols, ...], sizes: StepSizes, to: StepSizes
) -> tuple[Seen, ...]:
    return tuple(_tensor(*each, sizes, to) for each in zip(tensors, symbols, strict=True))


def _tensor(seen: Seen, symbols: Symbols, sizes: StepSizes, to: StepSizes) -> Seen:
    shape, dtype, bytes_ = seen
    new = tuple(_dimension(size, symbol, sizes, to) for size, symbol in zip(shape, symbols, strict=True))
    ratio = 1.0
    for before, after in zip(shape, new, strict=True):
        ratio *= after / before if before else 1.0
    return new, dtype, round(bytes_ * ratio)


def _dimension(size: int, symbol: str, sizes: StepSizes, to: StepSizes) -> int:
    if symbol in CONSTANT:
        return size
    before, after = sizes.of(symbol), to.of(symbol)
    if before == after:
        return size
    if len(symbol) > 1:
        return round(size * after / before)
    offset = size - before
    if symbol == "R" and sizes.experts:  # padding of every expert
        return round(after + (offset * to.experts / sizes.experts if offset > 1 else offset))
    if abs(offset) <= 1:
        return round(after + offset)
    return round(size // before * after)  # sequences and heads in one dimension


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """A file of a step: what it has in the layers of each kind, before and behind them, with its sizes."""

    sizes: StepSizes
    ops: tuple[MatchedOp, ...]
    experts_module: str  # of a layer, "" where the file does not say
    recomputes: bool  # whether its backward pass repeats layers (activation checkpointing); `ops` are without those

    def of_layer(self, kind: str, phase: str) -> list[MatchedOp]:
        """The operations of the layers of a kind."""
        return [each for each in self.ops if each.op.layer == kind and each.op.phase == phase]

    def outside(self, phase: str) -> tuple[list[MatchedOp], list[MatchedOp]]:
        """What comes before the first operation of a layer, and what behind it."""
        ops = [each for each in self.ops if each.op.phase == phase and each.op.name != OPTIMIZER]
        first = next((place for place, each in enumerate(ops) if each.op.layer), len(ops))
        return ops[:first], [each for each in ops[first:] if not each.op.layer]


def kept_sizes(path: Path) -> str:
    """What of a recorded step does not follow the scenario: operations with a dimension that matches none of the step's
    sizes, and those that no table knows, by name; "" where there are none.
    """
    step = recorded_step(path)
    kept = sorted({each.op.name for each in step.ops if not each.known})
    unknown = sorted({each.op.name for each in step.ops if not launch_of(each.op).known})
    told = [f"keep a dimension at its recorded size, which matches none of the step's: {', '.join(kept)}"] * bool(kept)
    told += [f"are priced by their bytes alone: {', '.join(unknown)}"] * bool(unknown)
    return "; ".join(told)


@lru_cache(maxsize=4)
def _read(path: Path, changed: float) -> RecordedStep:
    _, ops = load_step(path)
    sizes = sizes_of(ops, where=str(path))
    if any("collective" in op.facts for op in ops):
        raise UserError(f"{path} was recorded on several ranks; record one rank alone: the scenario adds the others")
    experts = next((module_in_layer(op.module) for op in ops if op.name == EXPERTS_GEMM), "")
    once = [op for op in ops if AGAIN not in op.facts]
    return RecordedStep(
        sizes=sizes, ops=tuple(matched(once, sizes)), experts_module=experts, recomputes=len(once) < len(ops)
    )


def recorded_step(path: Path) -> RecordedStep:
    """The step of a file. Raises UserError, one line, for what is none or cannot be scaled."""
    try:
        changed = path.stat().st_mtime
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return _read(path, changed)
