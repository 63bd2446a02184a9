"""What a kernel's duration is made of: tiles and waves over the SMs, memory traffic, a launch. Few parameters, fitted.

Every function gives log seconds of sizes_QC (a row per kernel, columns as named) for parameters theta (logarithms).
Q queried kernels, C columns or candidates. Matrix products are written M x N x K: M N outputs, sums over K.
"""

import numpy as np

from moesim.compute.estimate import FloatArray

NUM_SM = 132.0  # of Hopper; waves of other chips are absorbed by the fitted parameters


def _blend(*parts: FloatArray) -> FloatArray:
    """A smooth maximum: what limits, with a little of what nearly limits."""
    total = parts[0] ** 4
    for part in parts[1:]:
        total = total + part**4
    return np.asarray(total**0.25)


def _candidate_tiles() -> FloatArray:
    """Output tiles that vendor libraries choose among on Hopper, in both orientations, with and without splits of K."""
    tiles = {(64, n) for n in (8, 16, 32, 64, 128)} | {(96, 64), (96, 128), (256, 64), (320, 64), (320, 128)}
    tiles |= {(128, n) for n in (64, 128, 160, 192, 224, 256, 304)} | {(192, n) for n in (128, 160, 192, 208)}
    tiles |= {(256, 160)}
    both = sorted(tiles | {(n, m) for m, n in tiles})
    split = [(m, n, parts) for m, n in both for parts in (2, 4, 8) if m * n <= 128 * 128]
    return np.array([(m, n, 1) for m, n in both] + split, float)


_TILE_M, _TILE_N, _SPLIT = _candidate_tiles().T
GEMM_COLUMNS = ("M", "N", "K", "element_bytes")
GEMM_START = np.log([4e-6, 9e12, 1.15e11, 6e-8, 7e-11, 4.0e12, 9e14, 2.5e-6, 1.5e-13, 2.4e13])


def gemm_log_seconds(theta: FloatArray, sizes_QC: FloatArray) -> FloatArray:
    """The best of all candidate tiles for a dense product.

    theta: launch (s), tensor rate of an SM (FLOP/s), operand feed of an SM (bytes/s), prologue of a tile (s), epilogue
    per output (s), memory bandwidth (bytes/s), sustained rate of the chip (FLOP/s), launch and traffic of a split
    (s, s per output byte), L2 bandwidth (bytes/s).
    """
    launch, rate, feed, prologue, epilogue, memory, peak, split_launch, split_traffic, l2 = np.exp(theta)
    m, n, k, size = (column[:, None] for column in sizes_QC.T)
    tiles_m, tiles_n = np.ceil(m / _TILE_M), np.ceil(n / _TILE_N)
    depth = np.ceil(k / (_SPLIT * 64.0)) * 64.0
    step = ((2.0 * _TILE_M * _TILE_N / rate) ** 4 + ((_TILE_M + _TILE_N) * size / feed) ** 4) ** 0.25
    waves = np.ceil(tiles_m * tiles_n * _SPLIT / NUM_SM)
    compute = waves * (depth * step + (prologue + epilogue * _TILE_M * _TILE_N))
    shared = (tiles_n * (m * k) + tiles_m * (n * k)) * (size / l2)
    fixed = _blend((size * (m * k + k * n) + 2.0 * m * n) / memory, 2.0 * m * n * k / peak)
    seconds = launch + _blend(compute, fixed, shared)
    seconds = seconds + np.where(_SPLIT > 1.0, split_launch + (4.0 * split_traffic) * _SPLIT * (m * n), 0.0)
    logs_QC = np.log(np.where((_SPLIT > 1.0) & (depth < 256.0), 1e3, seconds))
    best_Q1 = logs_QC.min(1, keepdims=True)
    # A soft minimum: several good candidates are a little better than the best formula.
    return np.asarray(best_Q1[:, 0] - np.log(np.exp(-60.0 * (logs_QC - best_Q1)).sum(1)) / 60.0)


GROUPED_COLUMNS = (
    "rows", "experts", "active", "k", "n", "small", "tiles",
    "work", "longest", "tile", "read", "written", "l2", "squares",
)  # fmt: skip
GROUPED_START = np.log([9e-6, 6e12, 2e-6, 3.2e12, 8.5e14, 1e-8, 8e12, 1.0, 1.0])


def takes_small_tiles(mean_rows: float, k: float, n: float, *, direction: str) -> bool:
    """Whether torch's grouped_mm takes its small tiles: at most 128 rows per mean expert, or as narrow an output."""
    if direction == "wgrad":
        return k <= 128 or n <= 128
    return mean_rows // 1 <= 128 or (n if direction == "forward" else k) <= 128


def grouped_sizes(rows_QE: FloatArray, k: float, n: float, *, direction: str) -> FloatArray:
    """The columns GROUPED_COLUMNS of grouped products with rows_QE rows per expert.

    Tiles are those of the CUTLASS kernel behind torch's grouped_mm on Hopper: 64 x 128 x 128 when the mean expert has
    at most 128 rows (or the output is that narrow), else 128 x 256 x 64, in clusters of two along the rows, so that an
    expert's tiles round up to even numbers.
    """
    rows_QE = np.atleast_2d(np.asarray(rows_QE, float))
    experts = float(rows_QE.shape[-1])
    rows_Q, active_Q = rows_QE.sum(-1), np.count_nonzero(rows_QE, axis=-1).astype(float)
    ones_Q = np.ones_like(rows_Q)
    if direction == "wgrad":
        small_Q = ones_Q * float(k <= 128 or n <= 128)
    else:
        width, depth = (n, k) if direction == "forward" else (k, n)
        small_Q = ((rows_Q // experts <= 128) | (width <= 128)).astype(float)
    tile_m, tile_n = np.where(small_Q > 0, 64.0, 128.0), np.where(small_Q > 0, 128.0, 256.0)
    tile_k = np.where(small_Q > 0, 128.0, 64.0)
    if direction == "wgrad":
        per_expert_Q = np.ceil(np.ceil(k / tile_m) / 2) * 2 * np.ceil(n / tile_n)
        steps_QE = np.ceil(rows_QE / tile_k[:, None]) * tile_k[:, None]
        tiles_Q, longest_Q = per_expert_Q * experts, steps_QE.max(-1)
        work_Q = per_expert_Q * steps_QE.sum(-1)
        l2_Q = 2.0 * rows_Q * (k * np.ceil(n / tile_n) + n * np.ceil(k / tile_m / 2))
        read_Q, written_Q = 2.0 * rows_Q * (k + n), 2.0 * experts * k * n * ones_Q
    else:
        tiles_m_Q = (np.ceil(np.ceil(rows_QE / tile_m[:, None]) / 2) * 2).sum(-1)
        tiles_Q, longest_Q = tiles_m_Q * np.ceil(width / tile_n), np.ceil(depth / tile_k) * tile_k
        work_Q = tiles_Q * longest_Q
        l2_Q = 2.0 * depth * (rows_Q * np.ceil(width / tile_n) + tiles_m_Q / 2 * width)
        read_Q, written_Q = 2.0 * (rows_Q * depth + active_Q * k * n), 2.0 * rows_Q * width
    squares_Q = np.square(rows_QE).sum(-1) / np.maximum(rows_Q, 1.0)
    columns = (
        rows_Q, experts * ones_Q, active_Q, k * ones_Q, n * ones_Q, small_Q, tiles_Q,
        work_Q, longest_Q, tile_m * tile_n, read_Q, written_Q, l2_Q, squares_Q,
    )  # fmt: skip
    return np.stack(columns, axis=1)


def _grouped(theta: FloatArray, sizes_QC: FloatArray, *, jagged_depth: bool) -> FloatArray:
    launch, rate, prologue, memory, peak, per_expert, l2, whole, write_cost = np.exp(theta)
    rows, experts, _, k, n, _, tiles, work, longest, tile, read, written, l2_bytes, _ = sizes_QC.T
    step = 2.0 * tile / rate
    share = whole / (1.0 + whole)  # of a last, partly filled wave that is paid in full
    tiles = np.maximum(tiles, 1.0)
    waves = np.ceil(tiles / NUM_SM)
    if jagged_depth:
        even = np.maximum(work / NUM_SM, longest) * (1.0 - share) + share * work / tiles * waves
        compute = even * step + waves * prologue
    else:
        compute = (share * waves + (1.0 - share) * np.maximum(tiles / NUM_SM, 1.0)) * (longest * step + prologue)
    busy = _blend(compute, (read + written * write_cost) / memory, 2.0 * rows * k * n / peak, l2_bytes / l2)
    return np.asarray(np.log(launch + per_expert * experts + busy))


def grouped_log_seconds(theta: FloatArray, sizes_QC: FloatArray) -> FloatArray:
    """Forward and dgrad: every expert's rows make tiles.

    theta: launch (s), tensor rate of an SM, prologue of a tile (s), memory bandwidth, sustained rate of the chip, cost
    per local expert (s), L2 bandwidth, odds that a partial wave costs a whole one, cost of a written byte.
    """
    return _grouped(theta, sizes_QC, jagged_depth=False)


def grouped_wgrad_log_seconds(theta: FloatArray, sizes_QC: FloatArray) -> FloatArray:
    """wgrad: every expert has the same tiles, as deep as it has rows; parameters as `grouped_log_seconds`."""
    return _grouped(theta, sizes_QC, jagged_depth=True)


ATTENTION_COLUMNS = ("flops", "bytes", "tiles", "longest", "heads", "sequence", "group", "head_dim", "causal")
ATTENTION_START = np.log([9e-6, 4.5e12, 4e12, 2e-6, 1.0])


def attention_sizes(
    *,
    batch: FloatArray,
    sequence: FloatArray,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    causal: bool,
    direction: str,
) -> FloatArray:
    """The columns ATTENTION_COLUMNS: FLOPs count whole blocks of 128 x 128 pairs, the causal half with its diagonal."""
    width = head_dim + value_dim if direction == "forward" else 3 * head_dim + 2 * value_dim
    blocks_Q = np.ceil(sequence / 128.0)
    pairs_Q = (blocks_Q * (blocks_Q + 1.0) / 2.0 if causal else blocks_Q**2) * 128.0**2
    heads_Q = batch * float(heads)
    bytes_Q = 2.0 * batch * sequence * (heads + kv_heads) * (head_dim + value_dim)
    ones_Q = np.ones_like(heads_Q)
    columns = (
        2.0 * heads_Q * width * pairs_Q,
        bytes_Q * (1.0 if direction == "forward" else 2.0),
        heads_Q * blocks_Q,
        2.0 * width * 128.0**2 * blocks_Q,
        heads_Q,
        sequence * ones_Q,
        heads / kv_heads * ones_Q,
        head_dim * ones_Q,
        float(causal) * ones_Q,
    )
    return np.stack(columns, axis=1)


def attention_log_seconds(theta: FloatArray, sizes_QC: FloatArray) -> FloatArray:
    """Fused attention: one tile per head and 128 queries.

    theta: launch (s), rate of an SM (FLOP/s), memory bandwidth, prologue of a tile (s), odds of a whole last wave.
    """
    launch, rate, memory, prologue, whole = np.exp(theta)
    flops, bytes_, tiles, longest, *_ = sizes_QC.T
    share = whole / (1.0 + whole)
    even = np.maximum(flops / (rate * NUM_SM), longest / rate)
    waves = flops / tiles * np.ceil(tiles / NUM_SM) / rate
    compute = even * (1.0 - share) + share * waves + prologue * tiles / NUM_SM
    return np.asarray(np.log(launch + _blend(compute, bytes_ / memory)))


MEMORY_COLUMNS = ("bytes", "width")
MEMORY_START = np.log([2e-6, 3e12])


def memory_log_seconds(theta: FloatArray, sizes_QC: FloatArray) -> FloatArray:
    """A launch and bytes over bandwidth; theta: launch (s), bandwidth (bytes/s)."""
    launch, bandwidth = np.exp(theta)
    return np.asarray(np.log(launch + sizes_QC[:, 0] / bandwidth))
