"""FP8 as training does it: scaled GEMMs in three directions, grouped ones, and the casts between them.

Recipes: `tensor` (one scale an operand), `row` (one a row), `block` (1 x 128 along the reduced side for activations and
gradients, 128 x 128 for weights; the weight gradient reduces over tokens, so both of its operands are 1 x 128). e4m3
operands, bf16 out. Casts are Triton kernels: what a training stack runs beside its GEMMs.

Legend: m tokens, k and n the sides of the forward weight; a GEMM is [rows, depth] x [depth, columns].
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from moesim.kernels.benchmarks.buffers import Pool, Rotation, keep_outputs
from moesim.kernels.benchmarks.timing import Call
from moesim.seeding import stream

Shape = dict[str, Any]
E4M3 = torch.float8_e4m3fn
BLOCK = 128
_SIDES = (512, 1024, 1536, 2048, 3072, 4096, 5120, 7168, 8192, 14336, 16384)
_TOKENS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_DIRECTIONS = ("forward", "dgrad", "wgrad")
_EXPERT_MATRICES = ((2048, 1536), (4096, 2048), (7168, 4096), (2048, 7168), (4096, 14336), (2048, 2816))
CASTS = {
    "quantise_rows": 3.0 + 4.0 / BLOCK,
    "quantise_both": 4.0 + 8.0 / BLOCK,
    "quantise_weight": 3.0,
    "transpose_fp8": 2.0 + 8.0 / BLOCK,
    "dequantise": 3.0 + 4.0 / BLOCK,
    "swiglu_quantise": 5.0 + 4.0 / BLOCK,
}
"""Bytes read and written per element of [rows, width] (of the output, for swiglu_quantise)."""


def fp8_shapes(count: int) -> list[Shape]:
    """The shapes in measuring order: dense GEMMs of every recipe and direction, grouped ones, casts."""
    rng = stream(0, "benchmark shapes", "fp8")
    shapes: dict[str, Shape] = {}

    def add(shape: Shape) -> None:
        shapes.setdefault(repr(sorted(shape.items())), shape)

    while len(shapes) < count:
        m, k, n = int(rng.choice(_TOKENS)), int(rng.choice(_SIDES)), int(rng.choice(_SIDES))
        if m * k * n <= 5e12:
            for recipe in ("block", "row", "tensor"):
                for direction in _DIRECTIONS:
                    add({"op": "gemm", "recipe": recipe, "direction": direction, "m": m, "k": k, "n": n})
        experts, (k, n) = int(rng.choice((2, 4, 8, 16, 32, 64))), _EXPERT_MATRICES[rng.integers(len(_EXPERT_MATRICES))]
        rows = int(rng.choice((2048, 8192, 16384, 32768, 65536)))
        share_E = rng.dirichlet([float(rng.choice((0.5, 4.0, 50.0)))] * experts)
        rows_E = [max(16, int(rows * share) // 16 * 16) for share in share_E]
        if rows * k * n <= 5e12 and experts * k * n <= 2e9:
            for direction in _DIRECTIONS:
                add({"op": "grouped_gemm", "direction": direction, "rows_per_expert": rows_E, "k": k, "n": n})
        rows = int(rng.choice((2048, 8192, 32768, 65536)))
        for cast in CASTS:
            width = int(rng.choice((1024, 2048, 4096, 7168)))
            moved = rows * width * CASTS[cast]
            add({"op": "cast", "kind": cast, "rows": rows, "width": width, "bytes": moved})
    return list(shapes.values())


def prepare_fp8(shape: Shape, pool: Pool, beyond: float) -> tuple[Call, dict[str, Any]]:
    """The call of one shape. Raises RuntimeError or ValueError where this torch or device cannot run it."""
    make, compute, moved = _PREPARE[shape["op"]](shape, pool)
    operands = Rotation(make, bytes_per_call=moved, beyond=beyond)
    return keep_outputs(lambda index: compute(operands(index)), sets=len(operands)), {}


def gemm_sides(shape: Shape) -> tuple[int, int, int]:
    """(rows, columns, depth) of the GEMM that a direction of [m, k] x [k, n] is."""
    m, k, n = shape["m"], shape["k"], shape["n"]
    return {"forward": (m, n, k), "dgrad": (m, k, n), "wgrad": (n, k, m)}[shape["direction"]]


def _scales(rows: int, depth: int, *, recipe: str, device: str) -> tuple[torch.Tensor, Any]:
    """Scales of an operand [rows, depth] in the layout that cuBLAS wants, and the recipe's name."""
    kinds: Any = F.ScalingType
    if recipe == "tensor":
        return torch.ones((), device=device), kinds.TensorWise
    if recipe == "row":
        return torch.ones(rows, 1, device=device), kinds.RowWise
    if recipe == "block_rows":  # 1 x 128, the outer side major
        return torch.ones(depth // BLOCK, rows, device=device).t(), kinds.BlockWise1x128
    return torch.ones(rows // BLOCK, depth // BLOCK, device=device), kinds.BlockWise128x128


def _gemm(shape: Shape, pool: Pool) -> tuple[Callable[[], Any], Callable[[Any], Any], float]:
    rows, columns, depth = gemm_sides(shape)
    recipe, device = shape["recipe"], pool.device
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
        if kind in ("transpose_fp8", "dequantise"):
            return pool.take(rows, width, dtype=E4M3)
        return pool.take(rows, 2 * width if kind == "swiglu_quantise" else width)

    return make, cast_call(kind, rows=rows, width=width, device=pool.device), float(shape["bytes"])


_PREPARE = {"gemm": _gemm, "grouped_gemm": _grouped_gemm, "cast": _cast}


def fp8_flops(shape: Shape) -> float:
    """FLOPs of a GEMM or grouped GEMM; 0 for casts."""
    if shape["op"] == "cast":
        return 0.0
    rows = shape["m"] if shape["op"] == "gemm" else sum(shape["rows_per_expert"])
    return float(2.0 * rows * shape["k"] * shape["n"])


def long_gemms(shapes: list[Shape]) -> Iterator[Shape]:
    """The dense GEMMs that are worth running on and on: large ones."""
    return (shape for shape in shapes if shape["op"] == "gemm" and fp8_flops(shape) >= 4e11)
