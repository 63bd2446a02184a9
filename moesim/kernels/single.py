"""Kernels asked for one at a time, by compiled loops: ten microseconds each, where numpy takes a hundred.

Results are those of the cells' own formulas to 1e-12. Legend: E local experts, L power limit (`moesim.kernels.loops`).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from moesim.kernels import physics
from moesim.kernels.cells import DIRECTION_CODES, Cell, canonical, gemm_cell, grouped_cell
from moesim.kernels.estimate import DTYPE_BYTES, Estimate, FloatArray


@cache
def compiled_loops() -> Any:
    """The module `loops` where numba is installed; without it (None) numpy computes the same, more slowly."""
    try:
        from moesim.kernels import loops
    except ImportError:
        return None
    return loops


class SingleKernels:
    """Each method gives None where the profile has no such cell, or perhaps measured this very kernel.

    `limit` gives limit_L, and is asked once.
    """

    def __init__(self, loops: Any, cell_named: Callable[[str], Cell | None], limit: Callable[[], FloatArray]) -> None:
        self.loops, self._cell_named, self._limit = loops, cell_named, limit
        self._limit_L: FloatArray | None = None

    def _answer(self, cell: Cell, call: Callable[..., tuple[float, float]], *sizes: Any) -> Estimate | None:
        if self._limit_L is None:
            self._limit_L = self._limit()
        seconds, square = call(*sizes, *cell.compiled, self._limit_L)
        source = cell.source_at(square)
        return Estimate(seconds, source) if source else None

    def gemm(self, m: int, k: int, n: int, dtype: str, direction: str) -> Estimate | None:
        """As `CalibratedModel.gemm`."""
        cell = self._cell_named(gemm_cell(dtype, direction))
        if cell is None:
            return None
        rows, columns, depth = canonical(m, k, n, direction)
        sizes = float(rows), float(columns), float(depth), DTYPE_BYTES[dtype]
        return self._answer(cell, self.loops.gemm, *sizes, physics.CANDIDATE_TILES)

    def grouped_gemm(self, rows_E: FloatArray, k: int, n: int, dtype: str, direction: str) -> Estimate | None:
        """As `CalibratedModel.grouped_gemm`, of one rank."""
        if dtype not in ("bf16", "fp16") or not len(rows_E):
            return None
        totals, experts = self.loops.row_totals(np.ascontiguousarray(rows_E)), len(rows_E)
        small = physics.takes_small_tiles(totals[0] / experts, k, n, direction=direction)
        cell = self._cell_named(grouped_cell(direction, small=small))
        if cell is None:
            return None
        sizes = float(experts), float(k), float(n)
        return self._answer(cell, self.loops.grouped, totals, sizes, DIRECTION_CODES[direction], small)

    def attention(
        self,
        batch: int,
        sequence: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        causal: bool,
        direction: str,
    ) -> Estimate | None:
        """As `CalibratedModel.attention`."""
        cell = self._cell_named(f"attention/{direction}")
        if cell is None:
            return None
        columns = physics.attention_sizes(
            batch=batch,
            sequence=sequence,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            causal=causal,
            direction=direction,
        )
        return self._answer(cell, self.loops.attention, np.array(columns, float))
