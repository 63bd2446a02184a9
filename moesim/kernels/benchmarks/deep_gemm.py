"""Kernels of the library DeepGEMM, which scale FP8 operands by blocks: dense GEMMs and experts, in three directions.

Forward GEMMs and input gradients scale 1 x 128 of the rows and 128 x 128 of the weight and write bf16. Weight
gradients scale 1 x 128 of both operands and add to fp32 values in memory. Experts' rows are aligned to 128 each. Scales
lie as the kernels want them, as a training stack's casts write them. Optional: rows are skipped where the package
`deep_gemm` is missing. Its kernels are compiled when they first run; `python -m moesim.kernels.benchmarks.deep_gemm
PART PARTS` compiles those of every PARTS-th shape, so that several processes can do so at once beforehand.

Legend: m tokens, k and n the sides of the forward weight, E local experts.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from moesim.kernels.benchmarks.buffers import Pool, Rotation, keep_outputs
from moesim.kernels.benchmarks.fp8 import E4M3
from moesim.kernels.benchmarks.later_shapes import Shape, later_shapes
from moesim.kernels.benchmarks.timing import Call
from moesim.kernels.families import gemm_sides
from moesim.kernels.fp8 import BLOCK, DEEP_GEMM


def prepare_deep_gemm(shape: Shape, pool: Pool, beyond: float) -> tuple[Call, dict[str, Any]]:
    """The call of one shape. Raises RuntimeError where the library is missing or refuses it."""
    try:
        import deep_gemm  # type: ignore[import-not-found]
    except ImportError as error:
        raise RuntimeError(f"no package deep_gemm: {error}") from None
    prepared = _experts if "rows_per_expert" in shape else _dense
    make, compute, moved = prepared(shape, pool, deep_gemm)
    operands = Rotation(make, bytes_per_call=moved, beyond=beyond)
    return keep_outputs(lambda index: compute(operands(index)), sets=len(operands)), {"library": deep_gemm.__version__}


Prepared = tuple[Callable[[], Any], Callable[[Any], Any], float]


def _row_scales(library: Any, rows: int, depth: int, device: str) -> torch.Tensor:
    """One for 1 x 128, the rows major."""
    scales = torch.ones(rows, -(-depth // BLOCK), device=device)
    found: torch.Tensor = library.get_mn_major_tma_aligned_tensor(scales)
    return found


def _dense(shape: Shape, pool: Pool, library: Any) -> Prepared:
    direction, device = shape["direction"], pool.device
    rows, columns, depth = gemm_sides(shape["m"], shape["k"], shape["n"], direction)
    scale_a = _row_scales(library, rows, depth, device)
    if direction == "wgrad":
        scale_b = _row_scales(library, columns, depth, device)

        def make() -> tuple[torch.Tensor, ...]:
            summed = torch.zeros(rows, columns, device=device)
            return pool.take(rows, depth, dtype=E4M3), pool.take(columns, depth, dtype=E4M3), summed

        def add(operands: tuple[torch.Tensor, ...]) -> None:
            a, b, summed = operands
            library.fp8_gemm_nt((a, scale_a), (b, scale_b), summed, c=summed, recipe=(1, 1, BLOCK))

        return make, add, float(rows * depth + columns * depth + 8 * rows * columns)
    blocks = torch.ones(-(-columns // BLOCK), -(-depth // BLOCK), device=device)

    def make_both() -> tuple[torch.Tensor, ...]:
        return pool.take(rows, depth, dtype=E4M3), pool.take(columns, depth, dtype=E4M3)

    def compute(operands: tuple[torch.Tensor, ...]) -> torch.Tensor:
        a, b = operands
        out = torch.empty(rows, columns, dtype=torch.bfloat16, device=device)
        library.fp8_gemm_nt((a, scale_a), (b, blocks), out, disable_ue8m0_cast=True)
        return out

    return make_both, compute, float(rows * depth + columns * depth + 2 * rows * columns)


def _experts(shape: Shape, pool: Pool, library: Any) -> Prepared:
    rows_E, k, n, direction, device = shape["rows_per_expert"], shape["k"], shape["n"], shape["direction"], pool.device
    aligned_E = [-(-rows // BLOCK) * BLOCK for rows in rows_E]
    total, experts = sum(aligned_E), len(rows_E)
    if direction == "wgrad":  # [n, rows] x [rows, k], cut along the rows; each expert's part lies by itself
        counts_E = torch.tensor(aligned_E, dtype=torch.int32, device=device)
        scale_a, scale_b = (torch.ones(total // BLOCK, side, device=device).t() for side in (n, k))

        def make() -> tuple[torch.Tensor, ...]:
            summed = torch.zeros(experts, n, k, device=device)
            return pool.take(total * n, dtype=E4M3), pool.take(total * k, dtype=E4M3), summed

        def add(operands: tuple[torch.Tensor, ...]) -> None:
            a, b, summed = operands
            library.k_grouped_fp8_gemm_nt_contiguous(
                (a, scale_a), (b, scale_b), summed, aligned_E, counts_E, c=summed, compiled_dims=""
            )

        return make, add, float(total * (k + n) + 8 * experts * n * k)
    depth, columns = (k, n) if direction == "forward" else (n, k)
    ids = torch.repeat_interleave(torch.arange(experts), torch.tensor(aligned_E)).to(device, torch.int32)
    scale_a = _row_scales(library, total, depth, device)
    blocks = torch.ones(experts, -(-columns // BLOCK), -(-depth // BLOCK), device=device)

    def make_both() -> tuple[torch.Tensor, ...]:
        weights = pool.take(experts * columns, depth, dtype=E4M3).view(experts, columns, depth)
        return pool.take(total, depth, dtype=E4M3), weights

    def compute(operands: tuple[torch.Tensor, ...]) -> torch.Tensor:
        a, b = operands
        out = torch.empty(total, columns, dtype=torch.bfloat16, device=device)
        library.m_grouped_fp8_gemm_nt_contiguous(
            (a, scale_a), (b, blocks), out, ids, disable_ue8m0_cast=True, compiled_dims=""
        )
        return out

    return make_both, compute, float(total * (depth + 2 * columns) + experts * n * k)


def compile_part(part: int, parts: int, count: int) -> None:
    """Run every `parts`-th shape once, from the `part`-th on, so that its kernel is compiled; say what fails."""
    pool = Pool(device="cuda", num_bytes=2 << 30)
    for shape in later_shapes(DEEP_GEMM, count)[part::parts]:
        try:
            prepare_deep_gemm(shape, pool, 0.0)[0](0)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{shape}: {type(error).__name__}: {error}".splitlines()[0][:300], file=sys.stderr, flush=True)


if __name__ == "__main__":
    compile_part(*(int(word) for word in sys.argv[1:4]))
