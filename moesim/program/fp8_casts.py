"""Casts around products of operands of a byte or less, and of their weights (recipes: `moesim.scenario.software`).

Y = X W runs in few bits forward, for dX and for dW, whose depth is the tokens: there both operands need scales along
tokens, and Hopper's tensor cores need FP8 operands that lie along the depth.

    blockwise   X to FP8 along its rows before the forward GEMM, unless the kernel before it wrote FP8; that copy is
                kept, and turned (FP8 along rows to FP8 along columns) before dW. dY to FP8 along rows (for dX) and
                along columns (for dW) in one kernel, unless the kernel before it did so. Products of one input share
                its copies, and shared experts those of a dispatch in FP8: tokens, and the gradients of their results.
    per_tensor  the largest magnitude of X in one pass, then FP8 and its transpose in another; dY likewise.
    mxfp8       X both ways in one pass, dY likewise: scales along the depth differ by direction.
    nvfp4       as per_tensor (it has a scale of the whole operand, too), in 4 bits.

What arrives from a dispatch in FP8 with scales of 1 x 128 is widened first where the recipe is another. Weights are
cast once in a step, in both orders, whatever the number of micro-batches. Every kernel is a memory-bound kind of its
own, measured as Triton kernels of this project on an H100 (`moesim calibrate --families fp8`).
"""

from typing import NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike

from moesim.program.operations import Operation
from moesim.program.writer import KernelWriter
from moesim.results.spans import Phase
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.software import RECIPES

WIDE = BYTES_PER_ELEMENT["bf16"]
ALONG, TURN, WIDEN, LARGEST = "fp8_cast", "fp8_turn", "fp8_widen", "largest"  # kinds of memory-bound kernels
DISPATCHED = RECIPES["blockwise"].value_bytes  # as rows travel between ranks


class Casts(NamedTuple):
    """What comes before the forward GEMM, before that of the input's gradient, and before that of the weight's."""

    forward: list[Operation]
    input_gradient: list[Operation]
    weight_gradient: list[Operation]


class FusedCasts(TypedDict, total=False):
    """What the kernels before a GEMM did already, where the recipe lets them.

    input_is_fp8: X comes in FP8 along rows. gradient_is_fp8: so does dY, and only has to be turned. gradient_is_turned:
    it comes both ways. arrives: the first two are of a dispatch that carries FP8, not of a kernel. input_is_shared:
    another product has X cast, and turned.
    """

    input_is_fp8: bool
    input_is_shared: bool
    gradient_is_fp8: bool
    gradient_is_turned: bool
    arrives: bool


NO_CASTS = Casts([], [], [])


def fp8_casts(
    w: KernelWriter, name: str, *, inputs: ArrayLike, outputs: ArrayLike, **fused: Unpack[FusedCasts]
) -> Casts:
    """The casts of one GEMM with so many input and output values, numbers or [M, S, R]."""
    assert w.recipe is not None
    return _fused(w, name, inputs, outputs, fused) if w.recipe.fuses else _apart(w, name, inputs, outputs, fused)


def _fused(w: KernelWriter, name: str, inputs: ArrayLike, outputs: ArrayLike, fused: FusedCasts) -> Casts:
    """Scales of blocks: kernels before a GEMM may have written them, and what is kept is turned when it is needed."""
    assert w.recipe is not None
    late, size = w.during(Phase.WEIGHT_GRADIENT), w.recipe.value_bytes
    shared = fused.get("input_is_shared")
    forward = [] if shared or fused.get("input_is_fp8") else [cast_along(w, f"{name}.cast", inputs)]
    turned = [_moved(late, f"{name}.turn", TURN, inputs, 2 * size)] if w.recipe.turns and not shared else []
    if fused.get("gradient_is_turned"):
        return Casts(forward, [], turned)
    if fused.get("gradient_is_fp8"):
        return Casts(forward, [], [_moved(late, f"{name}.turn_gradient", TURN, outputs, 2 * size), *turned])
    return Casts(forward, cast_both_ways(w.backward, name, outputs), turned)


def _apart(w: KernelWriter, name: str, inputs: ArrayLike, outputs: ArrayLike, fused: FusedCasts) -> Casts:
    """Every operand is cast both ways by kernels of its own; what a dispatch brought is widened before."""
    arrives, widened = fused.get("arrives"), WIDE + DISPATCHED
    forward, backward = cast_both_ways(w, name, inputs), cast_both_ways(w.backward, name, outputs)
    if arrives and fused.get("input_is_fp8") and not fused.get("gradient_is_fp8"):
        forward.insert(0, _moved(w, f"{name}.widen", WIDEN, inputs, widened))
    if arrives and fused.get("gradient_is_fp8"):
        backward.insert(0, _moved(w.backward, f"{name}.widen", WIDEN, outputs, widened))
    return Casts(forward, backward, [])


def cast_along(w: KernelWriter, name: str, values: ArrayLike) -> Operation:
    """One operand along its rows."""
    assert w.recipe is not None
    return _moved(w, name, ALONG, values, WIDE + w.recipe.value_bytes)


def cast_both_ways(w: KernelWriter, name: str, values: ArrayLike) -> list[Operation]:
    """One operand in both orders, behind the pass that finds its largest magnitude where the recipe wants it."""
    assert w.recipe is not None
    found = [_moved(w, f"{name}.largest", LARGEST, values, WIDE)] if w.recipe.searches else []
    return [*found, _moved(w, f"{name}.cast", w.recipe.both_kind, values, WIDE + 2 * w.recipe.value_bytes)]


def weight_casts(w: KernelWriter, *, weights: float, are_narrow: bool) -> list[Operation]:
    """The casts of so many weights after an update; `are_narrow`: the optimizer wrote them in FP8, in one order."""
    if w.recipe is None or not weights:
        return []
    if are_narrow:
        return [_moved(w, "weights.turn", TURN, weights, 2 * w.recipe.value_bytes)]
    return cast_both_ways(w, "weights", weights)


def _moved(w: KernelWriter, name: str, kind: str, values: ArrayLike, bytes_each: float) -> Operation:
    return w.moved(name, kind, bytes_=np.asarray(values, dtype=np.float64) * bytes_each)
