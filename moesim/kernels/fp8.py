"""Block-scaled FP8 GEMMs by DeepGEMM's kernels on Hopper, dense and of experts: what their durations are made of.

Forward GEMMs and input gradients scale 1 x 128 of the rows and 128 x 128 of the weight and write bf16; they are one
kernel. A GEMM is cut into output tiles of 64, 128 or 256 rows and 16 to 192 columns, those that the library expects
to take the fewest cycles (deepseek-ai/DeepGEMM csrc/jit_kernels/heuristics/sm90.hpp): it counts bytes through L1 and L2
and whole waves over the SMs, and not how fast tiles are. A tile sums blocks of 128 along the depth, none of which takes
less than a floor, and ends with an epilogue; odd multiples of 16 columns are slower. Beside that stand the L2's and the
memory's time, and before all a launch. The vendor's own block-scaled GEMMs have the same form, and the best tile.
Experts' rows are rounded up to 128 each, the height of their tiles, and every active expert's weight is read.

Weight gradients scale both operands along the tokens and add to fp32 values in memory, which takes longer than reading
and writing as many bytes; every expert has the same tiles, as deep as it has rows.

Rows of both were measured on an H100 (`moesim.kernels.benchmarks.deep_gemm`); half of them are in the fits. PUBLISHED
ones are in none: those of the library's README at commit a9967bc (2025-04-09), H800 SXM5.

Legend: E local experts, Q GEMMs, T candidate tiles.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moesim.kernels.families import FloatArray, Gemm, GroupedGemm, gemm_sides
from moesim.kernels.physics import NUM_SM, Columns, Parameters

# m, n, k, TFLOP/s: github:deepseek-ai/DeepGEMM@a9967bc:README.md (2025-04-09), H800 SXM5, NVCC 12.8
PUBLISHED_ROWS = (
    (64, 2112, 7168, 206), (64, 24576, 1536, 289), (64, 32768, 512, 219), (64, 7168, 16384, 336),
    (64, 4096, 7168, 287), (64, 7168, 2048, 295), (128, 2112, 7168, 352), (128, 24576, 1536, 535),
    (128, 32768, 512, 358), (128, 7168, 16384, 645), (128, 4096, 7168, 533), (128, 7168, 2048, 510),
    (4096, 2112, 7168, 1127), (4096, 24576, 1536, 1212), (4096, 32768, 512, 775), (4096, 7168, 16384, 1520),
    (4096, 4096, 7168, 1410), (4096, 7168, 2048, 1168),
)  # fmt: skip
FASTEST_PUBLISHED = 1e12 * max(row[3] for row in PUBLISHED_ROWS)  # FLOP/s
DEEP_GEMM, BLOCK_SCALED = "deep_gemm", "fp8_block"  # the family of rows, and their dtype
BLOCK = 128  # values along the depth that share a scale; rows of an expert are rounded up to as many
BLOCK_START = np.log([5e-6, 1.0e13, 2e-7, 1e-6, 1e-11, 2.8e12, 2e13, 3.0])
DEEP_GEMM_START = np.append(BLOCK_START, np.log(0.1))
BLOCK_WGRAD_START = np.log([5e-6, 6.5e12, 1e-6, 2.8e12, 2e13, 2e12, 3.0])
_NEVER = 1e12  # tiles of a height that experts' GEMMs do not have


def _forward_tiles() -> FloatArray:
    """Heights and widths [2, T]: in registers one side is at most 128, and beyond 128 columns their scales unroll."""
    widths = [*range(16, 129, 16), 144, 160, 192]
    return np.array([(m, n) for m in (64, 128, 256) for n in widths if min(m, n) <= 128], float).T


_TILE_M, _TILE_N = _forward_tiles()


def _layouts() -> FloatArray:
    """Heights, widths, and SMs that share a tile's columns and its rows [4, T], in the order of trials."""
    clusters, tiles = ((1, 1), (1, 2), (2, 1)), _forward_tiles().T.astype(int).tolist()
    return np.array([(m, n, *cluster) for cluster in clusters for m, n in tiles], float).T


_HEIGHT, _WIDTH, _SHARE_N, _SHARE_M = _layouts()
_OUTPUT_BYTES = 2.0 * _HEIGHT * _WIDTH
_STAGE_BYTES = (_HEIGHT + _WIDTH) * BLOCK + np.ceil(_HEIGHT * 4.0 / BLOCK) * BLOCK
_LEAST_STAGES = np.where(_HEIGHT * _WIDTH < 128 * 192, 4.0, 3.0)
_SHARED_MEMORY = 232448.0 - 256.0  # bytes of an SM, less barriers
_L1_BYTES, _L2_BYTES = 128.0 * NUM_SM, 6153.0  # a cycle, as the library has them
_SUM_M, _SUM_N = (side.ravel() for side in np.meshgrid([64.0, 128.0], np.arange(16.0, 161.0, 8.0)))


def block_sizes(kernel: Gemm | GroupedGemm) -> Columns:
    """The columns of a block-scaled GEMM: floats, or arrays where its sizes are.

    rows, experts, width and depth; tiles of 64, 128 and 256 rows; bytes read and written; rows of the longest
    expert; and whether it is of experts.
    """
    if isinstance(kernel, Gemm):
        return _dense_sizes(kernel)
    rows_QE = np.asarray(kernel.rows_per_expert, float)
    aligned_QE = np.ceil(rows_QE / BLOCK) * BLOCK
    rows, k, n, experts = aligned_QE.sum(-1), float(kernel.k), float(kernel.n), np.count_nonzero(rows_QE, axis=-1)
    longest = aligned_QE.max(-1)
    if kernel.direction == "wgrad":
        read, written = rows * (k + n), 8.0 * k * n * experts
        found = (rows, experts, k, n, 0.0, 0.0, 0.0, read, written, longest, 1.0)
    else:
        depth, width = (k, n) if kernel.direction == "forward" else (n, k)
        read, written = rows * depth + experts * (k * n), 2.0 * rows * width
        found = (rows, experts, width, depth, _NEVER, rows / BLOCK, _NEVER, read, written, longest, 1.0)
    return tuple(_plain(column) for column in found)


def _dense_sizes(kernel: Gemm) -> Columns:
    if kernel.direction == "wgrad":
        rows, k, n = (_plain(side) for side in (kernel.m, kernel.k, kernel.n))
        aligned = _plain(np.ceil(np.asarray(rows) / BLOCK) * BLOCK)
        return (aligned, 1.0, k, n, 0.0, 0.0, 0.0, aligned * (k + n), 8.0 * k * n, aligned, 0.0)
    sides = gemm_sides(kernel.m, kernel.k, kernel.n, kernel.direction)
    rows, width, depth = (_plain(side) for side in sides)
    tiles = (_plain(np.ceil(np.asarray(rows) / height)) for height in (64.0, 128.0, 256.0))
    return (rows, 1.0, width, depth, *tiles, rows * depth + width * depth, 2.0 * rows * width, rows, 0.0)


def _plain(value: ArrayLike) -> Any:
    array = np.asarray(value, float)
    return float(array) if array.ndim == 0 else array


def _blended(sharp: float, compute_QT: Any, *others_QT: Any) -> Any:
    """A smooth maximum, and of all tiles the one that is done first."""
    total_QT = sum((other_QT**sharp for other_QT in others_QT), start=compute_QT**sharp)
    return np.min(total_QT, axis=-1) ** (1.0 / sharp)


def _logs(seconds: Any) -> Any:
    return math.log(seconds) if np.ndim(seconds) == 0 else np.log(seconds)


def block_log_seconds(parameters: Parameters, columns: Columns) -> Any:
    """Forward GEMMs and input gradients, by the best tile.

    parameters: launch (s), tensor rate of an SM (FLOP/s), floor of a block of the depth (s), epilogue of a tile (s) and
    per output (s), memory bandwidth (bytes/s), L2 bandwidth (bytes/s), exponent of the blend between what limits.
    """
    rows, _, width, depth, tiles_64, tiles_128, tiles_256, read, written = _along_tiles(columns[:9])
    tiles_m = _of_height(_TILE_M, tiles_64, tiles_128, tiles_256)
    sizes = (rows, width, depth, read, written)
    return _block_seconds(parameters, sizes, (_TILE_M, _TILE_N, tiles_m), slower=1.0)


def deep_gemm_log_seconds(parameters: Parameters, columns: Columns) -> Any:
    """Forward GEMMs and input gradients, by the tile that DeepGEMM takes.

    parameters: as `block_log_seconds`, and how much longer a block takes in tiles of odd multiples of 16 columns.
    """
    *others, odd = parameters
    rows, _, width, depth, tiles_64, tiles_128, tiles_256, read, written = _along_tiles(columns[:9])
    tiles_m = _of_height(_HEIGHT, tiles_64, tiles_128, tiles_256)
    taken = np.argmin(_expected_cycles(width, depth, tiles_m), axis=-1)[..., None]
    height, columns_of = _HEIGHT[taken], _WIDTH[taken]
    tiles_m = np.take_along_axis(np.broadcast_to(tiles_m, (*taken.shape[:-1], len(_HEIGHT))), taken, axis=-1)
    slower = 1.0 + odd * (columns_of % 32.0 == 16.0)
    return _block_seconds(
        tuple(others), (rows, width, depth, read, written), (height, columns_of, tiles_m), slower=slower
    )


def _of_height(heights: FloatArray, tiles_64: Any, tiles_128: Any, tiles_256: Any) -> Any:
    return np.where(heights == 64.0, tiles_64, np.where(heights == 128.0, tiles_128, tiles_256))


def _expected_cycles(width: Any, depth: Any, tiles_m: Any) -> FloatArray:
    """What the library expects of each layout; infinite where it does not take it."""
    tiles = tiles_m * np.ceil(width / _WIDTH)
    waves = np.ceil(tiles / NUM_SM)
    fed = depth * (_HEIGHT + _WIDTH)
    l1 = (2.0 * fed + 2.0 * _OUTPUT_BYTES) * tiles / _L1_BYTES
    l2 = (depth * (_HEIGHT / _SHARE_M + _WIDTH / _SHARE_N) + _OUTPUT_BYTES) * tiles / _L2_BYTES
    cycles = np.floor(np.maximum(l1, l2) / np.maximum(tiles, 1.0) * waves * NUM_SM)
    scales = np.ceil(depth / BLOCK) * np.where(BLOCK % _WIDTH == 0.0, 4.0, 8.0)
    stages = np.floor((_SHARED_MEMORY - np.ceil(_OUTPUT_BYTES / 1024.0) * 1024.0 - scales) / _STAGE_BYTES)
    shared_in_one_wave = (_SHARE_M * _SHARE_N > 1.0) & (waves <= 1.0)
    return np.asarray(np.where(shared_in_one_wave | (stages < _LEAST_STAGES) | (tiles_m >= _NEVER), np.inf, cycles))


def _block_seconds(parameters: Parameters, sizes: Columns, tiles: Columns, *, slower: Any) -> Any:
    """Log seconds of the best of these tiles: their heights, widths and numbers along the rows."""
    launch, rate, floor, epilogue, per_output, memory, l2, sharp = parameters
    rows, width, depth, read, written = sizes
    tile_m, tile_n, tiles_m = tiles
    tiles_n = np.ceil(width / tile_n)
    block = np.maximum(2.0 * BLOCK * tile_m * tile_n / rate * slower, floor)
    waves = np.ceil(tiles_m * tiles_n / NUM_SM)
    compute = waves * (np.ceil(depth / BLOCK) * block + epilogue + per_output * tile_m * tile_n)
    shared = (tiles_n * (rows * depth) + tiles_m * (width * depth)) / l2
    return _logs(launch + _blended(sharp, compute, shared, (read + written) / memory))


def block_wgrad_log_seconds(parameters: Parameters, columns: Columns) -> Any:
    """Weight gradients.

    parameters: launch (s), tensor rate of an SM (FLOP/s), epilogue of a tile (s), memory bandwidth for operands and L2
    bandwidth (bytes/s), bandwidth at which sums are read and written, exponent of the blend between what limits. Of a
    last, partly filled wave half is paid.
    """
    launch, rate, epilogue, memory, l2, sums, sharp = parameters
    rows, experts, width, depth, _, _, _, read, written, longest = _along_tiles(columns[:10])
    tiles_m, tiles_n = np.ceil(depth / _SUM_M), np.ceil(width / _SUM_N)
    tiles = tiles_m * tiles_n * np.maximum(experts, 1.0)
    waves = np.ceil(tiles / NUM_SM)
    work = tiles_m * tiles_n * rows  # blocks of all tiles, times their length
    steps = 0.5 * np.maximum(work / NUM_SM, longest) + 0.5 * waves / tiles * work
    compute = steps * (2.0 * _SUM_M * _SUM_N / rate) + waves * epilogue
    shared = (tiles_n * (rows * depth) + tiles_m * (width * rows)) / l2
    return _logs(launch + _blended(sharp, compute, shared, read / memory + written / sums))


def _along_tiles(columns: Columns) -> Columns:
    """Arrays with an axis for the candidate tiles."""
    return tuple(column[:, None] if isinstance(column, np.ndarray) else column for column in columns)


def block_features(columns: Columns) -> tuple[Any, ...]:
    """Where a GEMM lies among others: sizes, experts, and how uneven their rows are."""
    rows, experts, width, depth, longest, grouped = *columns[:4], columns[9], columns[10]
    some, many = np.maximum(rows, 1.0), np.maximum(experts, 1.0)
    found = (
        np.log(some),
        np.log(many),
        np.log(width),
        np.log(depth),
        np.log((longest + BLOCK) * many / (some + BLOCK)),
    )
    return (*(_plain(value / 4.0) for value in found), 0.3 * grouped)


def block_work(columns: Columns) -> Any:
    """FLOPs, those of rows that fill up the blocks included."""
    return 2.0 * columns[0] * columns[2] * columns[3]


def published_errors(model: Any, *, least_seconds: float = 0.0) -> FloatArray:
    """Log of published over predicted seconds of the published rows that take so long, by the model of their GPU."""
    kernels = [(Gemm(m=m, k=k, n=n, dtype=BLOCK_SCALED), tflops) for m, n, k, tflops in PUBLISHED_ROWS]
    rows = [(kernel, float(kernel.flops) / (1e12 * rate)) for kernel, rate in kernels]
    chosen = [(kernel, seconds) for kernel, seconds in rows if seconds >= least_seconds]
    return np.array([np.log(seconds / float(model.seconds(kernel).seconds)) for kernel, seconds in chosen])
