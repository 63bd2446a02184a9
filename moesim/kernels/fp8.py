"""Block-scaled FP8 products, which stock PyTorch cannot run: a tile model of the published kernels, few parameters.

The rows are those of DeepGEMM's README at commit a9967bc (2025-04-09): H800 SXM5, e4m3 operands with 1 x 128 and
128 x 128 scales, bf16 output, FLOP/s as published. A product is cut into output tiles of 64 or 128 rows and 16 to 160
columns, the choice with the least time in waves over the SMs; a tile sums blocks of 128 along the depth, none of which
takes less than a floor, and ends with an epilogue. Beside that stands the memory's time, and before both a launch.

A grouped product rounds each expert's rows up to the kernels' row alignment and reads every active expert's weight.
A weight gradient scales both operands along the depth and adds to fp32 values in memory: H800s reach about 640 TFLOP/s
there where forward products of the same step reach 1,140 (stated with this project's requirements, no rows published).

Legend: R ranks, E local experts, P published rows, Q products, T candidate tiles.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from moesim.kernels.estimate import Estimate, as_result
from moesim.kernels.families import FloatArray, Gemm, GroupedGemm, gemm_sides
from moesim.kernels.fitting import least_squares
from moesim.kernels.roofline import GpuRates

# m, n, k, TFLOP/s: github:deepseek-ai/DeepGEMM@a9967bc:README.md (2025-04-09), H800 SXM5, NVCC 12.8
PUBLISHED_ROWS = (
    (64, 2112, 7168, 206), (64, 24576, 1536, 289), (64, 32768, 512, 219), (64, 7168, 16384, 336),
    (64, 4096, 7168, 287), (64, 7168, 2048, 295), (128, 2112, 7168, 352), (128, 24576, 1536, 535),
    (128, 32768, 512, 358), (128, 7168, 16384, 645), (128, 4096, 7168, 533), (128, 7168, 2048, 510),
    (4096, 2112, 7168, 1127), (4096, 24576, 1536, 1212), (4096, 32768, 512, 775), (4096, 7168, 16384, 1520),
    (4096, 4096, 7168, 1410), (4096, 7168, 2048, 1168),
)  # fmt: skip
FASTEST_PUBLISHED = 1e12 * max(row[3] for row in PUBLISHED_ROWS)  # FLOP/s
_H800_PEAK, _H800_BANDWIDTH = 1978.9e12, 3.35e12  # datasheet: dense fp8 FLOP/s, HBM3 bytes/s
_SM = 132.0  # of the published GPU; others are taken to have as many waves
FP8_ROW_ALIGNMENT = 128  # rows per expert of the published kernels
WEIGHT_GRADIENT_SHARE = 640 / 1140  # of the forward rate
_SHARP = 3.0  # exponent of the blend between what limits
_BLOCK = 128.0  # values along the depth that share a scale
_TILE_M, _TILE_N = (side.ravel() for side in np.meshgrid([64.0, 128.0], np.arange(16.0, 161.0, 8.0)))
_START = np.log([3e-6, 0.8, 0.8, 5e-7, 8e-8])


class _Products(NamedTuple):
    """Columns [Q] of products: output rows by tile height (64, 128), output columns, depth, bytes moved."""

    tiles_of_64: FloatArray
    tiles_of_128: FloatArray
    columns: FloatArray
    depth: FloatArray
    bytes_: FloatArray


def _log_seconds(
    theta: FloatArray, products: _Products, peak: float, bandwidth: float, *, share: float = 1.0
) -> FloatArray:
    """theta: logs of launch (s), share of the peak in a tile, share of the bandwidth, epilogue of a tile (s) and floor
    of a block of the depth (s); `share` of its rate is what the arithmetic reaches.
    """
    launch, peak_share, memory_share, epilogue, floor = np.exp(theta)
    tiles_m_QT = np.where(_TILE_M == 64.0, products.tiles_of_64[:, None], products.tiles_of_128[:, None])
    waves_QT = np.ceil(tiles_m_QT * np.ceil(products.columns[:, None] / _TILE_N) / _SM)
    block_T = np.maximum(2.0 * _BLOCK * _TILE_M * _TILE_N * _SM / (peak * peak_share), floor) / share
    compute_Q = (waves_QT * (np.ceil(products.depth / _BLOCK)[:, None] * block_T + epilogue)).min(axis=1)
    memory_Q = products.bytes_ / (bandwidth * memory_share)
    return np.asarray(np.log(launch + (compute_Q**_SHARP + memory_Q**_SHARP) ** (1.0 / _SHARP)))


def _dense(m: FloatArray, k: FloatArray, n: FloatArray, *, output_bytes: float = 2.0) -> _Products:
    return _Products(np.ceil(m / 64), np.ceil(m / 128), n, k, m * k + k * n + output_bytes * m * n)


def _published() -> tuple[_Products, FloatArray]:
    m, n, k, tflops = np.array(PUBLISHED_ROWS, float).T
    return _dense(m, k, n), np.log(2.0 * m * n * k / (tflops * 1e12))


@cache
def published_fit(*, left_out: int | None = None) -> tuple[float, ...]:
    """Theta of the published rows, or of those that are not every third, beginning with row `left_out`."""
    products, logs_P = _published()
    kept_P = np.ones(len(logs_P), bool) if left_out is None else np.arange(len(logs_P)) % 3 != left_out
    some = _Products(*(column[kept_P] for column in products))
    theta = least_squares(
        lambda theta: _log_seconds(theta, some, _H800_PEAK, _H800_BANDWIDTH), logs_P[kept_P], _START, steps=60
    )
    return tuple(theta.tolist())


def published_errors(*, left_out: int | None = None) -> FloatArray:
    """Log of published over fitted seconds: of every row by the fit to all, or of every third by the fit to others."""
    products, logs_P = _published()
    errors_P = logs_P - _log_seconds(np.array(published_fit(left_out=left_out)), products, _H800_PEAK, _H800_BANDWIDTH)
    return errors_P if left_out is None else errors_P[left_out::3]


def fp8_gemm(kernel: Gemm, *, gpu: GpuRates) -> Estimate:
    """Seconds of a block-scaled dense GEMM on `gpu`, at the shares of peak and bandwidth of the published kernels.

    Source "scaled": clocks and software of another machine. A KeyError for a GPU without FP8 units is the caller's to
    prevent.
    """
    sides = gemm_sides(kernel.m, kernel.k, kernel.n, kernel.direction)
    sizes = np.broadcast_arrays(*(np.asarray(size, float) for size in sides))
    rows_Q, columns_Q, depth_Q = (size.reshape(-1) for size in sizes)
    is_wgrad = kernel.direction == "wgrad"
    # Accumulated weight gradients are read and written as fp32.
    products = _dense(rows_Q, depth_Q, columns_Q, output_bytes=8.0 if is_wgrad else 2.0)
    share = WEIGHT_GRADIENT_SHARE if is_wgrad else 1.0
    theta = np.array(published_fit())
    logs_Q = _log_seconds(theta, products, gpu.peak_flops["fp8"], gpu.memory_bandwidth, share=share)
    return Estimate(as_result(np.exp(logs_Q).reshape(sizes[0].shape)), "scaled")


def fp8_grouped_gemm(kernel: GroupedGemm, *, gpu: GpuRates) -> Estimate:
    """Seconds on `gpu` of a block-scaled grouped GEMM; source "scaled", as `fp8_gemm`."""
    rows_RE, k, n = np.asarray(kernel.rows_per_expert, float), kernel.k, kernel.n
    aligned_RE = np.ceil(rows_RE / FP8_ROW_ALIGNMENT) * FP8_ROW_ALIGNMENT
    shape = aligned_RE.shape[:-1]
    aligned_QE = aligned_RE.reshape(-1, aligned_RE.shape[-1])
    rows_Q, active_Q = aligned_QE.sum(-1), np.count_nonzero(aligned_QE, axis=-1)
    weights_Q = active_Q * float(k * n)
    if kernel.direction == "wgrad":
        # Every expert has the same outputs, as deep as it has rows; their time adds up to that of the mean depth.
        depth_Q = rows_Q / np.maximum(active_Q, 1)
        small_Q, large_Q = (active_Q * np.ceil(k / tile) for tile in (64.0, 128.0))
        bytes_Q = rows_Q * (k + n) + 8.0 * weights_Q
        products = _Products(small_Q, large_Q, np.full_like(rows_Q, n), depth_Q, bytes_Q)
        share = WEIGHT_GRADIENT_SHARE
    else:
        read, written = (k, n) if kernel.direction == "forward" else (n, k)
        small_Q, large_Q = (np.ceil(aligned_QE / tile).sum(-1) for tile in (64.0, 128.0))
        columns_Q, depth_Q = np.full_like(rows_Q, written), np.full_like(rows_Q, read)
        products = _Products(small_Q, large_Q, columns_Q, depth_Q, rows_Q * (read + 2.0 * written) + weights_Q)
        share = 1.0
    theta = np.array(published_fit())
    logs_Q = _log_seconds(theta, products, gpu.peak_flops["fp8"], gpu.memory_bandwidth, share=share)
    return Estimate(as_result(np.exp(logs_Q).reshape(shape)), "scaled")
