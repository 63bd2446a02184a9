"""What a kernel's duration is made of: tiles and waves over the SMs, memory traffic, a launch. Few parameters, fitted.

Every formula gives log seconds of kernels whose sizes come in columns (named beside it), for parameters that fitting
moves by their logarithms. A column is a float, or an array with a value per kernel; one kernel is computed in plain
floats, which take a tenth of numpy's time. GEMMs are written M x N x K: M N outputs, sums over K.

Legend: Q queried kernels, E local experts, T candidate tiles.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from moesim.kernels.families import FloatArray

NUM_SM = 132.0  # of Hopper; waves of other chips are absorbed by the fitted parameters
# Of these, those on which clusters of four run: 29 clusters fit, for the SMs of a cluster lie in one part of the chip.
# Rows of five H100s tell it: with 112 or 120 errors of grouped GEMMs with scales are half as large again or twice.
NUM_SM_IN_FOURS = 116.0
Columns = tuple[Any, ...]
Parameters = tuple[float, ...]


@dataclass(frozen=True)
class Arithmetic:
    """The functions that the formulas need, of floats or of arrays."""

    ceil: Callable[[Any], Any]
    log: Callable[[Any], Any]
    sqrt: Callable[[Any], Any]
    maximum: Callable[[Any, Any], Any]


_FLOATS = Arithmetic(math.ceil, math.log, math.sqrt, max)
_ARRAYS = Arithmetic(np.ceil, np.log, np.sqrt, np.maximum)


def arithmetic_of(columns: Columns) -> Arithmetic:
    """That of floats when no column is an array."""
    return _ARRAYS if np.ndarray in map(type, columns) else _FLOATS


def _fourth(value: Any) -> Any:
    square = value * value
    return square * square


def _blend(ops: Arithmetic, *parts: Any) -> Any:
    """A smooth maximum: what limits, with a little of what nearly limits."""
    return ops.sqrt(ops.sqrt(sum(map(_fourth, parts))))


def _candidate_tiles() -> FloatArray:
    """Output tiles that vendor libraries choose among on Hopper, in both orientations, with and without splits of K."""
    tiles = {(64, n) for n in (8, 16, 32, 64, 128)} | {(96, 64), (96, 128), (256, 64), (320, 64), (320, 128)}
    tiles |= {(128, n) for n in (64, 128, 160, 192, 224, 256, 304)} | {(192, n) for n in (128, 160, 192, 208)}
    tiles |= {(256, 160)}
    both = sorted(tiles | {(n, m) for m, n in tiles})
    split = [(m, n, parts) for m, n in both for parts in (2, 4, 8) if m * n <= 128 * 128]
    return np.array([(m, n, 1) for m, n in both] + split, float)


CANDIDATE_TILES = np.ascontiguousarray(_candidate_tiles().T)  # rows, columns and splits of each
GEMM_START = np.log([4e-6, 9e12, 1.15e11, 6e-8, 7e-11, 4.0e12, 9e14, 2.5e-6, 1.5e-13, 2.4e13])
_TILE_M, _TILE_N, _SPLIT = CANDIDATE_TILES
_OUTPUTS = _TILE_M * _TILE_N
_IS_SPLIT = _SPLIT > 1.0
_TILES_PER_WAVE = NUM_SM / _SPLIT


@lru_cache(256)
def _tile_seconds(parameters: Parameters, size: float, depth: float) -> FloatArray:
    """Seconds [T] of one tile of each candidate, summing over `depth`; prohibitive where a split is too shallow."""
    _, rate, feed, prologue, epilogue, *_ = parameters
    steps_T = np.ceil(depth / (_SPLIT * 64.0))
    step_T = _blend(_ARRAYS, 128.0 * _OUTPUTS / rate, 64.0 * (_TILE_M + _TILE_N) * size / feed)
    seconds_T = steps_T * step_T + (prologue + epilogue * _OUTPUTS)
    return np.where(_IS_SPLIT & (steps_T < 4.0), 1e3, seconds_T)


@lru_cache(64)
def _split_seconds(parameters: Parameters) -> tuple[FloatArray, FloatArray]:
    """Per candidate tile: seconds of a launch and of its split's, and seconds per output of its split."""
    return parameters[0] + _IS_SPLIT * parameters[7], _IS_SPLIT * (4.0 * parameters[8]) * _SPLIT


def gemm_log_seconds(parameters: Parameters, columns: Columns) -> Any:
    """The best of all candidate tiles for dense GEMMs, all of one element size.

    parameters: launch (s), tensor rate of an SM (FLOP/s), operand feed of an SM (bytes/s), prologue of a tile (s),
    epilogue per output (s), memory bandwidth (bytes/s), sustained rate of the chip (FLOP/s), launch and traffic of a
    split (s, s per output byte), L2 bandwidth (bytes/s).
    """
    memory, peak, l2 = parameters[5], parameters[6], parameters[9]
    m, n, depths, size = columns
    if isinstance(size, np.ndarray):
        size = float(size[0])
    if isinstance(depths, np.ndarray):
        known, of_kernel_Q = np.unique(depths, return_inverse=True)
        tile = np.stack([_tile_seconds(parameters, size, depth) for depth in known.tolist()])[of_kernel_Q]
    else:
        tile = _tile_seconds(parameters, size, depths)
    launch_T, output_T = _split_seconds(parameters)
    m, n, k = (column[:, None] if isinstance(column, np.ndarray) else column for column in (m, n, depths))
    tiles_m, tiles_n = np.ceil(m / _TILE_M), np.ceil(n / _TILE_N)
    compute = np.ceil(tiles_m * tiles_n / _TILES_PER_WAVE) * tile
    shared = (tiles_n * m + tiles_m * n) * (k * (size / l2))
    fixed = _fourth((size * k * (m + n) + 2.0 * m * n) / memory) + _fourth(2.0 * m * n * k / peak)
    seconds = np.sqrt(np.sqrt(_fourth(compute) + _fourth(shared) + fixed)) + output_T * (m * n) + launch_T
    best = np.minimum.reduce(seconds, axis=-1, keepdims=True)
    # A soft minimum: several good candidates are a little better than the best formula.
    closeness = np.add.reduce((best / seconds) ** 60, axis=-1)
    if closeness.ndim:
        return np.log(best[:, 0]) - np.log(closeness) / 60.0
    return math.log(best[0]) - math.log(closeness) / 60.0


GROUPED_COLUMNS = (
    "rows", "experts", "active", "k", "n", "small", "tiles",
    "work", "longest", "tile", "read", "written", "l2", "squares", "left_over",
)  # fmt: skip
GROUPED_START = np.log([9e-6, 6e12, 2e-6, 3.2e12, 8.5e14, 1e-8, 8e12, 1.0, 1.0])
GROUPED_FP8_START = GROUPED_START + np.log([1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
GROUPED_WGRAD_FP8_START = np.append(GROUPED_FP8_START, np.log(5e-6))


FP8_LONG = 2048  # two sides as long, and torch's grouped GEMM with scales takes other tiles
GROUPED_TILES = ("small", "large", "long")
SMALL, LARGE, LONG = range(len(GROUPED_TILES))


def grouped_tiles(mean_rows: Any, k: float, n: float, *, direction: str, fp8: bool = False) -> Any:
    """Which tiles torch's grouped_mm takes, as an index of GROUPED_TILES: an array where mean_rows, of all experts, is.

    Small ones for at most 128 rows per mean expert, or as narrow an output. Its grouped GEMM with scales (`fp8`) has
    tiles of its own where two of an expert's three sides reach 2048 (pytorch 2.11, aten/.../ScaledGroupMM.cu).
    """
    if direction == "wgrad":
        rows, columns, depth = n, k, np.floor(mean_rows)
    else:
        columns, depth = (n, k) if direction == "forward" else (k, n)
        rows = np.floor(mean_rows)
    large: Any = LARGE
    if fp8:
        long = FP8_LONG
        reached = (rows >= long) * 1 + (columns >= long) * 1 + (depth >= long) * 1
        large = np.where(reached >= 2, LONG, LARGE)
    tiles = np.where((rows <= 128) | (columns <= 128), SMALL, large)
    return tiles if tiles.ndim else int(tiles)


@dataclass(frozen=True)
class RowTotals:
    """What the directions of a grouped GEMM share about rows [E] or [Q, E]: floats, or arrays [Q]."""

    rows_QE: FloatArray
    rows: Any
    active: Any
    squares: Any  # sum of squares over sum: the rows of the expert that a row belongs to, in the mean

    @staticmethod
    def of(rows_QE: FloatArray) -> "RowTotals":
        """Sums over the experts."""
        if rows_QE.ndim == 1:
            rows = float(rows_QE.sum())
            return RowTotals(rows_QE, rows, float(np.count_nonzero(rows_QE)), float(rows_QE @ rows_QE) / max(rows, 1.0))
        rows_Q = _sums(rows_QE)
        squares_Q = np.einsum("qe,qe->q", rows_QE, rows_QE) / np.maximum(rows_Q, 1.0)
        all_active = rows_QE.size > 0 and rows_QE.min() > 0
        active_Q = float(rows_QE.shape[-1]) if all_active else _sums((rows_QE > 0).astype(float))
        return RowTotals(rows_QE, rows_Q, active_Q, squares_Q)

    def chosen(self, chosen_Q: Any) -> "RowTotals":
        """Those of some kernels."""
        active = self.active if isinstance(self.active, float) else self.active[chosen_Q]
        return RowTotals(self.rows_QE[chosen_Q], self.rows[chosen_Q], active, self.squares[chosen_Q])


def _sums(values_QE: FloatArray) -> Any:
    """Sums over the last axis; numpy's `sum` is slow along a short axis, and a product with ones may wake threads."""
    sums = np.einsum("...e->...", values_QE)
    return sums if sums.ndim else float(sums)


_TILES = {SMALL: (64.0, 128.0, 128.0), LARGE: (128.0, 256.0, 64.0), LONG: (256.0, 128.0, 128.0)}
_LONG_WGRAD = (128.0, 128.0, 128.0)
_HANDED_OVER = 128.0  # depth after which sums leave the tensor cores


def _left_over(rows_QE: FloatArray, tile_k: float) -> Any:
    """Experts [Q] whose depth ends between two hand-overs: the sums of the last block leave by a slow way of their own.

    Only where a tile is shallower than that depth: one of 64 leaves them after an odd number of blocks.
    """
    if tile_k >= _HANDED_OVER:
        return 0.0
    return _sums(np.ceil(rows_QE / tile_k) % (_HANDED_OVER / tile_k))


def grouped_sizes(totals: RowTotals, k: Any, n: Any, *, direction: str, tiles: int, fp8: bool = False) -> Columns:
    """The columns GROUPED_COLUMNS of grouped GEMMs; k and n may be arrays too.

    Tiles are those of the CUTLASS kernels behind torch's grouped_mm on Hopper, by `grouped_tiles`: 64 x 128 x 128 or
    128 x 256 x 64, and with fp8 operands (one byte) 256 x 128 x 128, or 128 x 128 x 128 for weight gradients, which do
    not sum in the tensor cores alone but hand sums over after each 128 of the depth; in clusters of two along the rows
    (fp8: and of two along the columns), so that an expert's tiles round up to even numbers. `left_over` counts tiles
    whose last sums are handed over apart.
    """
    tile_m, tile_n, tile_k = _LONG_WGRAD if tiles == LONG and direction == "wgrad" else _TILES[tiles]
    size, columns = (1.0, 2.0) if fp8 else (2.0, 1.0)  # columns of a cluster
    rows_QE, rows = totals.rows_QE, totals.rows
    left_over = 0.0
    if fp8 and direction == "wgrad":
        left_over, tile_k = _left_over(rows_QE, tile_k), max(tile_k, _HANDED_OVER)
    experts = float(rows_QE.shape[-1])
    ops = arithmetic_of((k, n))
    if direction == "wgrad":
        tall, wide = (n, k) if fp8 else (k, n)
        per_expert = ops.ceil(tall / (2.0 * tile_m)) * 2.0 * ops.ceil(wide / (columns * tile_n)) * columns
        steps = _sums(np.ceil(rows_QE / tile_k)) * tile_k
        deepest = rows_QE.max(-1) if rows_QE.ndim > 1 else float(rows_QE.max())
        longest = arithmetic_of((deepest,)).ceil(deepest / tile_k) * tile_k
        count, work, left_over = per_expert * experts, per_expert * steps, per_expert * left_over
        l2_bytes = rows * (size * (tall * ops.ceil(wide / tile_n) + wide * ops.ceil(tall / (2.0 * tile_m))))
        read, written = rows * (size * (k + n)), 2.0 * experts * k * n
    else:
        width, depth = (n, k) if direction == "forward" else (k, n)
        pairs = _sums(np.ceil(rows_QE / (2.0 * tile_m)))
        tiles_n = ops.ceil(width / (columns * tile_n)) * columns
        count, longest = pairs * (2.0 * tiles_n), ops.ceil(depth / tile_k) * tile_k
        work = 0.0  # follows from the tiles
        l2_bytes = rows * (size * depth * tiles_n) + pairs * (size * depth * width)
        read, written = rows * (size * depth) + totals.active * (size * k * n), rows * (2.0 * width)
    return (
        rows, experts, totals.active, k, n, float(tiles == SMALL), count,
        work, longest, tile_m * tile_n, read, written, l2_bytes, totals.squares, left_over,
    )  # fmt: skip


def _grouped(
    parameters: Parameters, columns: Columns, *, jagged_depth: bool, sms: float = NUM_SM, leaving: float = 0.0
) -> Any:
    """`sms`: those that work; `leaving`: seconds of a tile whose last sums leave apart."""
    launch, rate, prologue, memory, peak, per_expert, l2, whole, write_cost = parameters
    rows, experts, _, k, n, _, tiles, work, longest, tile, read, written, l2_bytes, _, left_over = columns
    ops = arithmetic_of(columns)
    step = 2.0 * tile / rate
    share = whole / (1.0 + whole)  # of a last, partly filled wave that is paid in full
    tiles = arithmetic_of((tiles,)).maximum(tiles, 1.0)
    waves = arithmetic_of((tiles,)).ceil(tiles / sms)
    if jagged_depth:
        even = ops.maximum(work / sms, longest) * (1.0 - share) + work * (share / tiles * waves)
        compute = even * step + waves * prologue + left_over * (leaving / sms)
    else:
        full = arithmetic_of((tiles,)).maximum(tiles / sms, 1.0)
        compute = (waves * share + full * (1.0 - share)) * (longest * step + prologue)
    busy = _blend(
        ops,
        compute,
        read * (1.0 / memory) + written * (write_cost / memory),
        rows * (2.0 * k * n / peak),
        l2_bytes * (1.0 / l2),
    )
    return ops.log(launch + per_expert * experts + busy)


def grouped_log_seconds(parameters: Parameters, columns: Columns) -> Any:
    """Forward and dgrad: every expert's rows make tiles.

    parameters: launch (s), tensor rate of an SM, prologue of a tile (s), memory bandwidth, sustained rate of the chip,
    cost per local expert (s), L2 bandwidth, odds that a partial wave costs a whole one, cost of a written byte.
    """
    return _grouped(parameters, columns, jagged_depth=False)


def grouped_wgrad_log_seconds(parameters: Parameters, columns: Columns) -> Any:
    """wgrad: every expert has the same tiles, as deep as it has rows; parameters as `grouped_log_seconds`."""
    return _grouped(parameters, columns, jagged_depth=True)


def grouped_fp8_log_seconds(parameters: Parameters, columns: Columns) -> Any:
    """As `grouped_log_seconds`, with fp8 operands: in clusters of four."""
    return _grouped(parameters, columns, jagged_depth=False, sms=NUM_SM_IN_FOURS)


def grouped_wgrad_fp8_log_seconds(parameters: Parameters, columns: Columns) -> Any:
    """wgrad with fp8 operands; parameters: as `grouped_wgrad_log_seconds`, and seconds of a tile `left_over`."""
    *others, leaving = parameters
    return _grouped(tuple(others), columns, jagged_depth=True, sms=NUM_SM_IN_FOURS, leaving=leaving)


ATTENTION_COLUMNS = ("flops", "bytes", "tiles", "longest", "heads", "sequence", "group", "head_dim", "causal")
ATTENTION_START = np.log([9e-6, 4.5e12, 4e12, 2e-6, 1.0])


def attention_sizes(
    *,
    batch: Any,
    sequence: Any,
    heads: Any,
    kv_heads: Any,
    head_dim: Any,
    value_dim: Any,
    causal: Any,
    direction: str,
) -> Columns:
    """The columns ATTENTION_COLUMNS: FLOPs count whole blocks of 128 x 128 pairs, the causal half with its diagonal."""
    width = head_dim + value_dim if direction == "forward" else 3.0 * head_dim + 2.0 * value_dim
    blocks = arithmetic_of((sequence,)).ceil(sequence / 128.0)
    pairs = blocks * (causal * ((blocks + 1.0) / 2.0) + (1.0 - causal) * blocks) * 128.0**2
    all_heads = batch * heads
    bytes_ = 2.0 * batch * sequence * (heads + kv_heads) * (head_dim + value_dim)
    return (
        2.0 * all_heads * width * pairs,
        bytes_ * (1.0 if direction == "forward" else 2.0),
        all_heads * blocks,
        2.0 * width * 128.0**2 * blocks,
        all_heads,
        sequence,
        heads / kv_heads,
        head_dim,
        causal,
    )


def attention_log_seconds(parameters: Parameters, columns: Columns) -> Any:
    """Fused attention: one tile per head and 128 queries.

    parameters: launch (s), rate of an SM (FLOP/s), memory bandwidth, prologue of a tile (s), odds of a whole last wave.
    """
    launch, rate, memory, prologue, whole = parameters
    flops, bytes_, tiles, longest, *_ = columns
    ops = arithmetic_of(columns)
    share = whole / (1.0 + whole)
    even = ops.maximum(flops / (rate * NUM_SM), longest / rate)
    waves = flops / ops.maximum(tiles, 1.0) * ops.ceil(tiles / NUM_SM) / rate
    compute = even * (1.0 - share) + share * waves + prologue * tiles / NUM_SM
    return ops.log(launch + _blend(ops, compute, bytes_ / memory))


MEMORY_START = np.log([2e-6, 3e12])


def memory_log_seconds(parameters: Parameters, columns: Columns) -> Any:
    """A launch and bytes over bandwidth; parameters: launch (s), bandwidth (bytes/s)."""
    launch, bandwidth = parameters
    return arithmetic_of(columns[:1]).log(launch + columns[0] / bandwidth)


COPY_START = np.append(MEMORY_START, np.log(2.4e-6))
PAGE = 4096.0  # bytes: what a copy leaves over beyond whole pages is a kernel of its own,
_LEAST_CUT = 1.25e6  # from so many bytes on (between 1.16 and 1.38 MB, on H100 as on H200)


def memory_copy_log_seconds(parameters: Parameters, columns: Columns) -> Any:
    """A copy by the driver; parameters: launch (s), bandwidth (bytes/s), launch of what copies part of a page (s)."""
    launch, bandwidth, rest = parameters
    copied = columns[0] / 2.0  # columns count reading and writing
    cut = (copied % PAGE != 0.0) * (copied >= _LEAST_CUT)
    return arithmetic_of(columns[:1]).log(launch + columns[0] / bandwidth + rest * cut)


TABLE_START = np.append(MEMORY_START, np.log(2.6e12))
TABLE_ROWS = 50304.0  # of the tables that were measured


def memory_table_log_seconds(parameters: Parameters, columns: Columns) -> Any:
    """Rows added to a table of zeros in bf16; parameters: launch (s), bandwidth of the rows, of the table (bytes/s)."""
    launch, bandwidth, zeroing = parameters
    moved, width = columns
    return arithmetic_of(columns).log(launch + moved / bandwidth + width * (2.0 * TABLE_ROWS / zeroing))
