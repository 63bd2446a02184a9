"""What a recorded operation costs: the kernels that it launches, and what a kernel model says of each.

GEMMs, grouped GEMMs and attention go to their families; everything else is bound by memory and costs the bytes of its
operands and results at the bandwidth of the measured kind that is nearest. Grouped GEMMs take rows spread evenly over
experts. What the table below does not know costs its bytes as an elementwise kernel does, and is listed as unmatched.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.kernels import KernelModel
from moesim.kernels.estimate import Estimate, weakest
from moesim.kernels.families import Attention, Gemm, GroupedGemm, Kernel, MemoryBound
from moesim.kernels.unprofiled import DROPOUT, OUTER_BATCH, ROW_BATCH, UNALIGNED, UNALIGNED_BATCH
from moesim.recorded.memory_bound import MEMORY_BOUND, memory_kernels
from moesim.recorded.step_file import ALIGNED, RecordedOp

# Between the kernels of one operation and of the next while the host is ahead, the median of 11 steps of transformers
# 5.17 on an H100 (docs/imported-steps.md).
GAP_S = 3.3e-6
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
SDPA = "scaled_dot_product_attention"
OPTIMIZER = "_fused_adamw_"
CHECK = (
    "_local_scalar_dense"  # a number that the host reads back; of a condition, with the fact that it was taken to hold
)
GEMMS = {"mm", "addmm", "bmm", "baddbmm"}
_KNOWN = GEMMS | MEMORY_BOUND | {"_grouped_mm", SDPA, OPTIMIZER}


TILE_ROWS = 256  # rows that grouped GEMMs round up to at most: two tiles of 128
FEWEST_FLOPS = 16.0  # per byte, below which a batch of GEMMs is bound by memory


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


class Launch(NamedTuple):
    """What an operation launches: kernels, seconds beside them that follow no size, and whether the tables know it."""

    kernels: list[Kernel]
    fixed_s: float
    known: bool


def prices(ops: Sequence[RecordedOp], model: KernelModel) -> list[PricedOp]:
    """What each operation costs by a kernel model, in their order."""
    return [priced(op, checked_launch(op), model) for op in ops]


def seconds_of(kernels: Sequence[Kernel], model: KernelModel) -> float:
    """Of kernels one behind the other."""
    return _sum([model.seconds(kernel) for kernel in kernels])


def _sum(estimates: Sequence[Estimate]) -> float:
    longest = (each if isinstance(each, float) else np.max(each) for each, _ in estimates)
    return float(sum(longest))


def priced(op: RecordedOp, launch: Launch, model: KernelModel) -> PricedOp:
    """What one operation costs."""
    kernels = launch.kernels
    variant, ratio = _variant(op, kernels[0])
    estimates = [model.seconds(kernel) for kernel in kernels]
    return PricedOp(
        name=op.name,
        phase=op.phase,
        module=op.module,
        shapes=" ".join("x".join(map(str, shape)) or "1" for shape, _, _ in op.reads[:3]),
        count=op.count,
        seconds=_sum(estimates) * ratio + launch.fixed_s,
        source=weakest(*(each.source for each in estimates)),
        matched=launch.known,
        kind=f"{op.name.rstrip('_')} {op.works} {'+'.join(map(_work, kernels))}{variant}",
        family=f"{FAMILIES[type(kernels[0])]}{_direction(kernels[0])}{variant}",
        measured_s=op.measured_s,
        assumed="taken" in op.facts,
    )


FAMILIES = {Gemm: "gemm", GroupedGemm: "grouped gemm", Attention: "attention", MemoryBound: "memory"}


def _variant(op: RecordedOp, kernel: Kernel) -> tuple[str, float]:
    """The name of a kernel that no profile holds, which is corrected apart, and what it costs over its sister."""
    if isinstance(kernel, Gemm) and ALIGNED in op.facts:
        alone = UNALIGNED[op.facts[ALIGNED]][kernel.direction]
        return " unaligned", alone if len(op.reads[-1][0]) == 2 else min(alone, UNALIGNED_BATCH)
    if isinstance(kernel, Attention) and op.facts.get("dropout"):
        return " dropout", DROPOUT[kernel.direction]
    return "", 1.0


def _direction(kernel: Kernel) -> str:
    return "" if isinstance(kernel, MemoryBound) else f" {kernel.direction}"


def _work(kernel: Kernel) -> str:
    return kernel.kind if isinstance(kernel, MemoryBound) else kernel.direction


def checked_launch(op: RecordedOp) -> Launch:
    """`launch_of`; an operation whose tensors cannot be its own is an error of the file."""
    try:
        launch = launch_of(op)
        kernels = launch.kernels
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
    return launch


def launch_of(op: RecordedOp) -> Launch:
    """The kernels of one operation."""
    shapes = [shape for shape, _, _ in op.reads]
    dtype = DTYPES.get(op.reads[0][1] if op.reads else "float32", "fp32")
    if op.name in GEMMS:
        left, right = shapes[-2:]
        batch = left[0] if len(left) == 3 else 1
        rows, columns = left[-2], right[-1]
        if batch > 1 and rows < columns:  # the transposed GEMM: what is long goes into the rows of the batch
            rows, columns = columns, rows
        gemm = _gemm(batch * rows, left[-1], columns, dtype, op.works)
        bytes_ = float(sum(size for _, _, size in (*op.reads, *op.writes)))
        if len(left) == 3 and float(gemm.flops) < FEWEST_FLOPS * bytes_:  # weighted sums of a few rows
            return Launch([MemoryBound("elementwise", bytes_ * _thin(batch, left, right))], 0.0, known=True)
        return Launch([gemm], 0.0, known=True)
    if op.name == "_grouped_mm":
        return Launch([_grouped(shapes, dtype, op.works)], 0.0, known=True)
    if op.name == SDPA:
        return Launch([_attention(op, dtype)], 0.0, known=True)
    if op.name == OPTIMIZER:
        wide = op.reads[0][1] == "float32"
        kind, bytes_each = ("optimizer_fp32", 28.0) if wide else ("optimizer_bf16", 14.0)
        return Launch([MemoryBound(kind, bytes_each * op.facts["parameters"])], 0.0, known=True)
    kernels, fixed_s, known = memory_kernels(op)
    return Launch([*kernels], fixed_s, known)


def _thin(batch: int, left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """What a batch of thin GEMMs costs over its bytes: one row out of several, and a column times a row."""
    if batch == 1 or min(left[-1], left[-2]) > 1:
        return 1.0
    if left[-1] == 1:
        return OUTER_BATCH if left[-2] > 1 else 1.0
    return ROW_BATCH if left[-1] < right[-1] else 1.0


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
        direction="forward" if op.works == "forward" else "backward",
    )
