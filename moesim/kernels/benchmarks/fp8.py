"""FP8 as training does it: scaled GEMMs in three directions, grouped ones, and the casts between them.

Formats: `fp8` (one scale an operand; grouped GEMMs one a row), `fp8_block` (1 x 128 along the reduced side for
activations and gradients, 128 x 128 for weights; the weight gradient reduces over tokens, so both of its operands are
1 x 128). e4m3 operands, bf16 out. Casts are Triton kernels: what a training stack runs beside its GEMMs.

Legend: m tokens, k and n the sides of the forward weight; a GEMM is [rows, depth] x [depth, columns].
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from moesim.kernels.benchmarks.buffers import Pool, Rotation, keep_outputs
from moesim.kernels.benchmarks.later_shapes import CASTS, Shape
from moesim.kernels.benchmarks.timing import Call
from moesim.kernels.families import gemm_sides
from moesim.kernels.fp8 import BLOCK, BLOCK_SCALED

E4M3 = torch.float8_e4m3fn


def prepare_fp8(shape: Shape, pool: Pool, beyond: float) -> tuple[Call, dict[str, Any]]:
    """The call of one shape. Raises RuntimeError or ValueError where this torch or device cannot run it."""
    make, compute, moved = _PREPARE[shape["family"]](shape, pool)
    operands = Rotation(make, bytes_per_call=moved, beyond=beyond)
    return keep_outputs(lambda index: compute(operands(index)), sets=len(operands)), {}


def is_fp8_row(row: Shape) -> bool:
    """Whether this module measures the kernel of a row, not `kernels` or `memory_kernels`."""
    if row["family"] == "memory_bound":
        return row["kind"] in CASTS
    if row["family"] == "gemm_fp8":
        return bool(row["dtype"] == BLOCK_SCALED or row["direction"] != "forward")
    return bool(row["family"] == "grouped_gemm" and row["dtype"] == "fp8")


def _scales(rows: int, depth: int, *, recipe: str, device: str) -> tuple[torch.Tensor, Any]:
    """Scales of an operand [rows, depth] in the layout that cuBLAS wants, and the recipe's name."""
    kinds: Any = F.ScalingType
    if recipe == "tensor":
        return torch.ones((), device=device), kinds.TensorWise
    if recipe == "block_rows":  # 1 x 128, the outer side major
        return torch.ones(depth // BLOCK, rows, device=device).t(), kinds.BlockWise1x128
    padded = -(-depth // BLOCK // 4) * 4  # rows of scales end at a multiple of four
    return torch.ones(-(-rows // BLOCK), padded, device=device), kinds.BlockWise128x128


def _gemm(shape: Shape, pool: Pool) -> tuple[Callable[[], Any], Callable[[Any], Any], float]:
    rows, columns, depth = gemm_sides(shape["m"], shape["k"], shape["n"], shape["direction"])
    recipe, device = {"fp8": "tensor", BLOCK_SCALED: "block"}[shape["dtype"]], pool.device
    of_a = "block_rows" if recipe == "block" else recipe
    of_b = of_a if shape["direction"] == "wgrad" else ("block_whole" if recipe == "block" else recipe)
    scale_a, kind_a = _scales(rows, depth, recipe=of_a, device=device)
    scale_b, kind_b = _scales(columns, depth, recipe=of_b, device=device)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        return pool.take(rows, depth, dtype=E4M3), pool.take(columns, depth, dtype=E4M3).t()

    def compute(operands: tuple[torch.Tensor, torch.Tensor]) -> Any:
        scaled_mm: Any = F.scaled_mm
        fast = recipe == "tensor" and shape["direction"] == "forward"
        return scaled_mm(
            *operands, scale_a, kind_a, scale_b if of_b in ("tensor", "block_rows") else scale_b.t(), kind_b,
            output_dtype=torch.bfloat16, use_fast_accum=fast,
        )  # fmt: skip

    return make, compute, float(rows * depth + columns * depth + 2 * rows * columns)


def _grouped_gemm(shape: Shape, pool: Pool) -> tuple[Callable[[], Any], Callable[[Any], Any], float]:
    """Row-wise scales: the recipe that torch's grouped GEMM has on Hopper."""
    rows_E, k, n, direction = shape["rows_per_expert"], shape["k"], shape["n"], shape["direction"]
    experts, rows, device = len(rows_E), sum(rows_E), pool.device
    offsets_E = torch.tensor(rows_E, device=device).cumsum(0).to(torch.int32)
    depth, columns = (k, n) if direction == "forward" else (n, k)
    grouped: Any = torch._scaled_grouped_mm

    def make() -> tuple[torch.Tensor, ...]:
        if direction == "wgrad":  # [n, rows] x [rows, k], cut along the rows
            a, b = pool.take(n, rows, dtype=E4M3), pool.take(k, rows, dtype=E4M3).t()
            return a, b, torch.ones(n * experts, device=device), torch.ones(k * experts, device=device)
        weights = pool.take(experts * columns, depth, dtype=E4M3).view(experts, columns, depth).transpose(-2, -1)
        ones = torch.ones(rows, device=device), torch.ones(experts, columns, device=device)
        return pool.take(rows, depth, dtype=E4M3), weights, *ones

    def compute(operands: tuple[torch.Tensor, ...]) -> Any:
        return grouped(*operands, offs=offsets_E, out_dtype=torch.bfloat16, use_fast_accum=direction != "wgrad")

    moved = rows * (k + n) + experts * k * n * (2.0 if direction == "wgrad" else 1.0)
    return make, compute, float(moved + (0 if direction == "wgrad" else rows * columns))


def _cast(shape: Shape, pool: Pool) -> tuple[Callable[[], Any], Callable[[Any], Any], float]:
    from moesim.kernels.benchmarks.fp8_casts import cast_call

    rows, width, kind = shape["rows"], shape["width"], shape["kind"]

    def make() -> torch.Tensor:
        if kind in ("fp8_turn", "fp8_widen"):
            return pool.take(rows, width, dtype=E4M3)
        return pool.take(rows, 2 * width if kind == "fp8_swiglu" else width)

    return make, cast_call(kind, rows=rows, width=width, device=pool.device), float(shape["bytes"])


_PREPARE = {"gemm_fp8": _gemm, "grouped_gemm": _grouped_gemm, "memory_bound": _cast}


def long_gemms(shapes: list[Shape]) -> Iterator[Shape]:
    """The dense GEMMs that are worth running on and on: large ones."""
    dense = (shape for shape in shapes if shape["family"] == "gemm_fp8")
    return (shape for shape in dense if 2.0 * shape["m"] * shape["k"] * shape["n"] >= 4e11)
