"""What a recorded operation costs: the kernels that it launches, and what a kernel model says of each.

GEMMs, grouped GEMMs and attention go to their families; everything else is bound by memory and costs the bytes of its
operands and results at the bandwidth of the measured kind that is nearest. Grouped GEMMs take rows spread evenly over
experts. What the table below does not know costs its bytes as an elementwise kernel does, and is listed as unmatched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.kernels import KernelModel
from moesim.kernels.families import Attention, Gemm, GroupedGemm, Kernel, MemoryBound
from moesim.kernels.odd_kernels import DROPOUT, UNALIGNED, UNALIGNED_BATCH
from moesim.recorded.memory_bound import MEMORY_BOUND, memory_kernels
from moesim.recorded.step_file import RecordedOp

# Of an operation, from 11 steps of transformers 5.17 on an H100 (docs/imported-steps.md): between its kernels on the
# GPU, and on the host where that sets the pace (two steps of small models).
GAP_S, HOST_S = 4.4e-6, 65e-6
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SDPA = "scaled_dot_product_attention"
OPTIMIZER = "_fused_adamw_"
CHECK = (
    "_local_scalar_dense"  # a number that the host reads back; of a condition, with the fact that it was taken to hold
)
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_KNOWN = PRODUCTS | MEMORY_BOUND | {"_grouped_mm", SDPA, OPTIMIZER}


TILE_ROWS = 256  # rows that grouped products round up to at most: two tiles of 128
FEWEST_FLOPS = 16.0  # per byte, below which a batch of products is bound by memory


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
    count: float
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
    fixed_s = memory_kernels(op)[1] if isinstance(kernels[0], MemoryBound) and op.name in MEMORY_BOUND else 0.0
    return PricedOp(
        name=op.name,
        phase=op.phase,
        module=op.module,
        shapes=" ".join("x".join(map(str, shape)) or "1" for shape, _, _ in op.reads[:3]),
        count=op.count,
        seconds=_seconds(kernels, model) * ratio + fixed_s,
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
        alone = UNALIGNED[op.facts["aligned_bytes"]][kernel.direction]
        return " unaligned", alone if len(op.reads[-1][0]) == 2 else min(alone, UNALIGNED_BATCH)
    if isinstance(kernel, Attention) and op.facts.get("dropout"):
        return " dropout", DROPOUT[kernel.direction]
    return "", 1.0


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
        gemm = _gemm(batch * left[-2], left[-1], right[-1], dtype, op.phase)
        bytes_ = sum(size for _, _, size in (*op.reads, *op.writes))
        if len(left) == 3 and float(gemm.flops) < FEWEST_FLOPS * bytes_:
            return [MemoryBound("elementwise", float(bytes_))], True  # weighted sums of a few rows
        return [gemm], True
    if op.name == "_grouped_mm":
        return [_grouped(shapes, dtype, op.phase)], True
    if op.name == SDPA:
        return [_attention(op, dtype)], True
    if op.name == OPTIMIZER:
        wide = op.reads[0][1] == "float32"
        kind, bytes_each = ("optimizer_fp32", 28.0) if wide else ("optimizer_bf16", 14.0)
        return [MemoryBound(kind, bytes_each * op.facts["parameters"])], True
    kernels, _, matched = memory_kernels(op)
    return [*kernels], matched


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
        rows = _rows_of_experts(left[0], experts)
        if phase == "forward":
            return GroupedGemm(rows_per_expert=rows, k=depth, n=columns, dtype=dtype)
        return GroupedGemm(rows_per_expert=rows, k=columns, n=depth, dtype=dtype, direction="dgrad")
    experts = shapes[2][0]
    rows = _rows_of_experts(left[1], experts)
    return GroupedGemm(rows_per_expert=rows, k=right[1], n=left[0], dtype=dtype, direction="wgrad")


def _rows_of_experts(rows: float, experts: int) -> NDArray[np.float64]:
    """Even, but for where they end in a tile: anywhere, since kernels compute whole tiles and routing hits no multiple
    of them.
    """
    mean = rows / experts
    return np.asarray(mean + ((np.arange(experts) + 0.5) / experts - 0.5) * min(TILE_ROWS, 2.0 * mean))


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
