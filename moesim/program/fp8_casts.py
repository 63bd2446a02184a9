"""Casts around the GEMMs of block-scaled FP8 training (1 x 128 activations, 128 x 128 weights; arXiv 2412.19437, 3.3).

Y = X W runs in FP8 forward, for dX and for dW, whose depth is the tokens: there both operands need scales along tokens.

    X    to FP8 along its rows before the forward GEMM, unless the kernel before it wrote FP8; that copy is kept
    dY   to FP8 along rows (for dX) and along columns (for dW) in one kernel, unless the kernel before it did so
    X    from FP8 along rows to FP8 along columns before dW

Weights are cast once in a step, whatever the number of micro-batches, and not counted. Kernels that turn a matrix are
slower than plain ones. By own Triton kernels on an H100 (82 sizes; `moesim calibrate --families fp8`), from 100 MB on,
casts along rows reach 0.93 of an elementwise kernel's bandwidth (2.6 to 2.8 TB/s), casts both ways 0.77, turning 0.61.
"""

from typing import NamedTuple, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike

from moesim.program.operations import Operation
from moesim.program.writer import KernelWriter
from moesim.results.spans import Phase
from moesim.scenario.base import BYTES_PER_ELEMENT

WIDE, NARROW = BYTES_PER_ELEMENT["bf16"], BYTES_PER_ELEMENT["fp8"]
ALONG_SHARE, BOTH_WAYS_SHARE, TURNING_SHARE = 0.93, 0.77, 0.61  # of an elementwise kernel's bandwidth


class Casts(NamedTuple):
    """What comes before the forward GEMM, before that of the input's gradient, and before that of the weight's."""

    forward: list[Operation]
    input_gradient: list[Operation]
    weight_gradient: list[Operation]


class FusedCasts(TypedDict, total=False):
    """What the kernels before a GEMM did already.

    input_is_fp8: X comes in FP8 along rows. gradient_is_fp8: so does dY, and only has to be turned. gradient_is_turned:
    it comes both ways.
    """

    input_is_fp8: bool
    gradient_is_fp8: bool
    gradient_is_turned: bool


NO_CASTS = Casts([], [], [])


def fp8_casts(
    w: KernelWriter, name: str, *, inputs: ArrayLike, outputs: ArrayLike, **fused: Unpack[FusedCasts]
) -> Casts:
    """The casts of one GEMM with so many input and output values, numbers or [M, S, R]."""
    late = w.during(Phase.WEIGHT_GRADIENT)
    forward = [] if fused.get("input_is_fp8") else [_moved(w, f"{name}.cast", inputs, WIDE + NARROW, ALONG_SHARE)]
    turned = [_moved(late, f"{name}.turn", inputs, 2 * NARROW, TURNING_SHARE)]
    if fused.get("gradient_is_turned"):
        return Casts(forward, [], turned)
    if fused.get("gradient_is_fp8"):
        return Casts(forward, [], [_moved(late, f"{name}.turn_gradient", outputs, 2 * NARROW, TURNING_SHARE), *turned])
    both = _moved(w.backward, f"{name}.cast", outputs, WIDE + 2 * NARROW, BOTH_WAYS_SHARE)
    return Casts(forward, [both], turned)


def _moved(w: KernelWriter, name: str, values: ArrayLike, bytes_each: float, share: float) -> Operation:
    return w.moved(name, "elementwise", bytes_=np.asarray(values, dtype=np.float64) * (bytes_each / share))
