"""A recorded step at other sizes: other tokens, numbers of layers and experts, experts of a token and their width,
another vocabulary, and, where the recording followed the widths of its weights, any other width of the model.

Every matched dimension takes its new size, bytes follow. Layers of a kind are repeated, what lies outside of them is
not. What is not matched stays as it was recorded.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from moesim.errors import UserError
from moesim.recorded.layers import DENSE, MOE
from moesim.recorded.pricing import OPTIMIZER, PRODUCTS
from moesim.recorded.sizes import MatchedOp, StepSizes, Symbols, matched, of_experts
from moesim.recorded.step_file import ALIGNED, ALIGNMENT, GRADIENT_WIDTHS, GRADIENTS, PEAK, RecordedOp, Seen

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
    if op.name in PRODUCTS and op.reads[-1][1] in ("bfloat16", "float16"):
        before, after = (_aligned_bytes(matched_op, sizes, at) for at in (sizes, to))
        if facts.get(ALIGNED, ALIGNMENT) == before != after:
            facts = {name: fact for name, fact in facts.items() if name != ALIGNED}
            facts |= {ALIGNED: after} if after < ALIGNMENT else {}
    return facts


def _aligned_bytes(matched_op: MatchedOp, sizes: StepSizes, to: StepSizes) -> int:
    """As `product_facts` has it where rows of matrices are as long as widths of the model."""
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
