"""What a recorded operation costs: the kernels that it launches, and what a kernel model says of each.

GEMMs, grouped GEMMs and attention go to their families; everything else is bound by memory and costs the bytes of its
operands and results at the bandwidth of the measured kind that is nearest. Grouped GEMMs take rows spread evenly over
experts. What the table below does not know costs its bytes as an elementwise kernel does, and is listed as unmatched.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from moesim.errors import UserError
from moesim.importing.step_file import RecordedOp
from moesim.kernels import KernelModel
from moesim.kernels.families import Attention, Gemm, GroupedGemm, Kernel, MemoryBound
from moesim.kernels.odd_kernels import DROPOUT, SUMMED_BYTES, SUMMED_S, UNALIGNED

# Of an operation, from 11 steps of transformers 5.17 on an H100 (docs/software.md): between its kernels on the GPU, and
# on the host where that sets the pace (two steps of small models).
GAP_S, HOST_S = 4.4e-6, 65e-6
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SDPA = "scaled_dot_product_attention"
OPTIMIZER = "_fused_adamw_"
CHECK = (
    "_local_scalar_dense"  # a number that the host reads back; of a condition, with the fact that it was taken to hold
)
# aten operation -> kind of memory-bound kernel; its bytes are those of operands and results
KINDS = {
    "_to_copy": "cast",
    "clone": "copy",
    "cat": "copy",
    "silu": "silu",
    "silu_backward": "silu_backward",
    "_softmax": "softmax",
    "_softmax_backward_data": "softmax_backward",
    "_log_softmax": "cross_entropy_fp32",
    "_log_softmax_backward_data": "softmax_backward",
    "sum": "reduce",
    "mean": "reduce",
    "sort": "sort",
    "embedding_dense_backward": "embedding_backward",
    "native_layer_norm": "rms_norm",
    "native_layer_norm_backward": "rms_norm_backward",
    "_fused_rms_norm": "rms_norm",
    "_fused_rms_norm_backward": "rms_norm_backward",
}
# Of what is filled, and of what is copied over, nothing is read: what moves is the result, or twice that.
FILLS = {"fill_", "new_zeros", "ones", "ones_like", "zero_", "zeros", "zeros_like"}
OVERWRITES = {"copy_", "_foreach_copy_", "split_with_sizes_copy", "_chunk_cat"}
ELEMENTWISE = {
    "_local_scalar_dense", "abs", "add", "add_", "addcmul", "all", "amax", "amin", "any", "arange", "argsort",
    "bincount", "bitwise_and", "bitwise_not", "clamp", "clamp_", "complex", "constant_pad_nd", "cos", "cumsum",
    "div", "div_", "eq", "exp", "floor_divide", "full", "full_like", "ge", "gelu", "gelu_backward", "gt",
    "histc", "le", "lift_fresh_copy", "logical_and", "logical_not", "logical_or", "lt", "masked_fill_", "max",
    "maximum", "min", "minimum", "mul", "mul_", "native_dropout",
    "native_dropout_backward", "ne", "neg", "one_hot", "polar", "pow", "randint", "relu",
    "remainder", "repeat", "rsqrt", "rsub", "scalar_tensor", "select_scatter", "sigmoid", "sigmoid_",
    "sigmoid_backward", "sin", "sqrt", "sub", "sub_", "tanh", "tanh_backward", "threshold_backward",
    "topk", "tril", "triu",
    "view_as_complex", "where",
}  # fmt: skip
# Reads of a few rows out of many: what moves is the result, twice. Writes of rows into a larger tensor: the rows, and
# where the result is a new tensor this one, too.
GATHERS = {"index", "index_select", "gather", "embedding"}
SCATTERS = {"index_put", "index_put_", "scatter", "scatter_", "scatter_add", "scatter_add_", "index_add", "index_add_"}
PADDED = {"slice_backward", "select_backward"}  # a new tensor of zeros with the rows in it


PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_KNOWN = PRODUCTS | GATHERS | SCATTERS | PADDED | FILLS | OVERWRITES | ELEMENTWISE | KINDS.keys()
_KNOWN |= {"_grouped_mm", SDPA, OPTIMIZER, "nll_loss_forward", "nll_loss_backward", "masked_fill"}


def knows(name: str) -> bool:
    """Whether the tables have a kernel for an operation."""
    return name in _KNOWN


@dataclass(frozen=True, kw_only=True)
class PricedOp:
    """One kind of operation with one set of shapes: how often it runs and what one costs, and how that is known.

    kind: what corrections are made for, its name, phase and kernels; family: that of its kernels alone. factor: the
    correction in `seconds`. measured_s: what one took in a trace. assumed: a condition on data that was taken to hold.
    """

    name: str
    phase: str
    module: str
    shapes: str
    count: int
    seconds: float
    source: str
    matched: bool
    kind: str
    family: str
    factor: float = 1.0
    measured_s: float | None = None
    assumed: bool = False


class Corrections(Protocol):
    """What a trace of the same software says: factors on the price of operations, and the gap between kernels."""

    @property
    def gap_s(self) -> float:
        """Seconds between the kernels of one operation and of the next, while the host is ahead."""

    def factor(self, *, kind: str, family: str) -> float:
        """By which the price of an operation is multiplied."""


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """Seconds of a step on one GPU: its kernels, the gaps between them, and what its host needs to launch them.

    The host runs ahead of the GPU, so that the step takes the longer of both.
    """

    ops: tuple[PricedOp, ...]
    kernels_s: float
    gaps_s: float
    host_s: float

    @property
    def step_s(self) -> float:
        """Seconds of the step."""
        return max(self.kernels_s + self.gaps_s, self.host_s)


def step_estimate(
    ops: Sequence[RecordedOp],
    kernels: KernelModel,
    *,
    host_per_op: float = HOST_S,
    corrections: Corrections | None = None,
) -> StepEstimate:
    """The operations priced, dearest first, at the clock that the load of the step leaves under the power limit."""
    found = prices(ops, at_step_load(ops, kernels))
    if corrections is not None:
        found = [_corrected(op, corrections) for op in found]
    number = sum(op.count for op in ops)
    return StepEstimate(
        ops=tuple(sorted(found, key=lambda each: -each.count * each.seconds)),
        kernels_s=sum(each.count * each.seconds for each in found),
        gaps_s=number * (GAP_S if corrections is None else corrections.gap_s),
        host_s=number * host_per_op,
    )


def at_step_load(ops: Sequence[RecordedOp], kernels: KernelModel) -> KernelModel:
    """The kernels of a step of these operations, at the clock that their mean load leaves."""
    launched = [(op.count, _kernels(op)[0]) for op in ops]
    light = kernels.at_load(0.0)
    light_s = sum(count * _seconds(each, light) for count, each in launched)
    flops = sum(count * float(np.sum(kernel.flops)) for count, each in launched for kernel in each)
    return kernels.at_load(flops / light_s)


def prices(ops: Sequence[RecordedOp], model: KernelModel) -> list[PricedOp]:
    """What each operation costs by a kernel model, in their order."""
    return [_priced(op, *_kernels(op), model) for op in ops]


def _corrected(op: PricedOp, corrections: Corrections) -> PricedOp:
    factor = corrections.factor(kind=op.kind, family=op.family)
    return replace(op, seconds=op.seconds * factor, factor=factor)


def _seconds(kernels: Sequence[Kernel], model: KernelModel) -> float:
    return float(sum(np.max(model.seconds(kernel).seconds) for kernel in kernels))


def _priced(op: RecordedOp, kernels: Sequence[Kernel], matched: bool, model: KernelModel) -> PricedOp:
    variant, ratio = _variant(op, kernels[0])
    sorts_s = SUMMED_S if _sums_rows(op) else 0.0
    return PricedOp(
        name=op.name,
        phase=op.phase,
        module=op.module,
        shapes=" ".join("x".join(map(str, shape)) or "1" for shape, _, _ in op.reads[:3]),
        count=op.count,
        seconds=_seconds(kernels, model) * ratio + sorts_s,
        source=", ".join(sorted({str(model.seconds(kernel).source) for kernel in kernels})),
        matched=matched,
        kind=f"{op.name.rstrip('_')} {op.phase} {'+'.join(map(_work, kernels))}{variant}",
        family=f"{FAMILIES[type(kernels[0])]}{_direction(kernels[0])}{variant}",
        measured_s=op.measured_s,
        assumed="taken" in op.facts,
    )


FAMILIES = {Gemm: "gemm", GroupedGemm: "grouped gemm", Attention: "attention", MemoryBound: "memory"}


def _variant(op: RecordedOp, kernel: Kernel) -> tuple[str, float]:
    """The name of a kernel that no profile holds, which is corrected apart, and what it costs over its sister."""
    if isinstance(kernel, Gemm) and "aligned_bytes" in op.facts:
        return " unaligned", UNALIGNED[op.facts["aligned_bytes"]][kernel.direction]
    if isinstance(kernel, Attention) and op.facts.get("dropout"):
        return " dropout", DROPOUT[kernel.direction]
    return "", 1.0


def _sums_rows(op: RecordedOp) -> bool:
    return op.phase == "backward" and op.name in ("index_put", "index_put_")


def _direction(kernel: Kernel) -> str:
    return "" if isinstance(kernel, MemoryBound) else f" {kernel.direction}"


def _work(kernel: Kernel) -> str:
    return kernel.kind if isinstance(kernel, MemoryBound) else kernel.direction


def _kernels(op: RecordedOp) -> tuple[list[Kernel], bool]:
    """`kernels_of`; an operation whose tensors cannot be its own is an error of the file."""
    try:
        kernels, matched = kernels_of(op)
        _variant(op, kernels[0])
        possible = all(np.isfinite(kernel.moved_bytes).all() and np.all(kernel.moved_bytes >= 0) for kernel in kernels)
        possible &= all(np.all(kernel.flops > 0) for kernel in kernels if isinstance(kernel, Attention))
    except (IndexError, KeyError, TypeError, ValueError, ZeroDivisionError):
        possible = False
    if not possible:
        shapes = ", ".join("x".join(map(str, shape)) for shape, _, _ in op.reads)
        raise UserError(
            f"the recorded step has an operation {op.name} of shapes ({shapes}) that cannot be; record it again"
        )
    return kernels, matched


def kernels_of(op: RecordedOp) -> tuple[list[Kernel], bool]:
    """The kernels of one operation, and whether the tables know it."""
    shapes = [shape for shape, _, _ in op.reads]
    dtype = DTYPES.get(op.reads[0][1] if op.reads else "float32", "fp32")
    if op.name in PRODUCTS:
        left, right = shapes[-2:]
        batch = left[0] if len(left) == 3 else 1
        return [_gemm(batch * left[-2], left[-1], right[-1], dtype, op.phase)], True
    if op.name == "_grouped_mm":
        return [_grouped(shapes, dtype, op.phase)], True
    if op.name == SDPA:
        return [_attention(op, dtype)], True
    if op.name == OPTIMIZER:
        wide = op.reads[0][1] == "float32"
        kind, bytes_each = ("optimizer_fp32", 28.0) if wide else ("optimizer_bf16", 14.0)
        return [MemoryBound(kind, bytes_each * op.facts["parameters"])], True
    return _memory_bound(op)


def _memory_bound(op: RecordedOp) -> tuple[list[Kernel], bool]:
    read, written = (sum(size for _, _, size in seen) for seen in (op.reads, op.writes))
    if op.name in GATHERS:
        return [MemoryBound("permute", 2.0 * written)], True
    if _sums_rows(op):
        return [MemoryBound("elementwise", SUMMED_BYTES * math.prod(op.reads[-1][0]))], True
    if op.name in SCATTERS:
        rows = min((size for shape, _, size in op.reads if len(shape) > 1), default=0)
        new = 0.0 if op.name.endswith("_") else 2.0 * written
        return [MemoryBound("permute", 2.0 * rows + new)], True
    if op.name in PADDED:
        return [MemoryBound("zero", float(written)), MemoryBound("copy", 2.0 * min(read, written))], True
    if op.name == "nll_loss_forward":
        return [MemoryBound("elementwise", 64.0 * op.reads[-1][2])], True  # a cache line a row
    if op.name == "nll_loss_backward":
        return [MemoryBound("zero", float(written))], True  # but for one number a row
    if op.name == "masked_fill":
        return [MemoryBound("copy", 2.0 * written), MemoryBound(*_plain(op, 2.0 * written))], True
    if op.name in FILLS:
        return [MemoryBound("zero", float(written))], True
    if op.name in OVERWRITES:
        return [MemoryBound("copy", 2.0 * written)], True
    if op.name in KINDS:
        return [MemoryBound(KINDS[op.name], float(read + written))], True
    return [MemoryBound(*_plain(op, float(read + written)))], op.name in ELEMENTWISE


def _plain(op: RecordedOp, bytes_: float) -> tuple[str, float]:
    """An elementwise kernel; where an operand is broadcast torch runs one that is measured as rows times a number."""
    sizes = {math.prod(shape) for shape, _, _ in (*op.reads, *op.writes) if math.prod(shape) > 1}
    return ("mul" if len(sizes) > 1 else "elementwise"), bytes_


def _gemm(rows: int, depth: int, columns: int, dtype: str, phase: str) -> Gemm:
    """As a layer's GEMM: in the backward pass, one whose depth is the longest side makes a weight's gradient."""
    if phase == "forward":
        return Gemm(m=rows, k=depth, n=columns, dtype=dtype)
    if depth > rows and depth >= columns:
        return Gemm(m=depth, k=columns, n=rows, dtype=dtype, direction="wgrad")
    return Gemm(m=rows, k=columns, n=depth, dtype=dtype, direction="dgrad")


def _grouped(shapes: Sequence[tuple[int, ...]], dtype: str, phase: str) -> GroupedGemm:
    """[rows, k] x [experts, k, n], or for a weight's gradient [n, rows] x [rows, k] with the ends of the experts."""
    left, right = shapes[:2]
    if len(right) == 3:
        experts, depth, columns = right
        rows = np.full(experts, left[0] / experts)
        if phase == "forward":
            return GroupedGemm(rows_per_expert=rows, k=depth, n=columns, dtype=dtype)
        return GroupedGemm(rows_per_expert=rows, k=columns, n=depth, dtype=dtype, direction="dgrad")
    experts = shapes[2][0]
    rows = np.full(experts, left[1] / experts)
    return GroupedGemm(rows_per_expert=rows, k=right[1], n=left[0], dtype=dtype, direction="wgrad")


def _attention(op: RecordedOp, dtype: str) -> Attention:
    (batch, heads, sequence, width), (_, kv_heads, _, _), (*_, value) = (shape for shape, _, _ in op.reads[:3])
    return Attention(
        batch=batch,
        sequence=sequence,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        value_dim=value,
        causal=bool(op.facts.get("causal")),
        dtype=dtype,
        direction="forward" if op.phase == "forward" else "backward",
    )
