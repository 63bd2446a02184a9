"""FP8 grouped products, which stock PyTorch cannot run: from published dense rates of block-scaled FP8 kernels.

The rows are those of DeepGEMM's README at commit a9967bc (2025-04-09): H800 SXM5, e4m3 operands with 1 x 128 and
128 x 128 scales, bf16 output, FLOP/s as published. A grouped product is taken as a dense one of all rows, each
expert's rounded up to the kernels' row alignment, that also reads every active expert's weight.

Legend: R ranks, E local experts, P published rows.
"""

from functools import cache

import numpy as np

from moesim.kernels.estimate import Estimate, FloatArray, as_result
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
_H800_PEAK, _H800_BANDWIDTH = 1978.9e12, 3.35e12  # datasheet: dense fp8 FLOP/s, HBM3 bytes/s
_START = np.log([3e-6, 0.75, 0.75])
FP8_ROW_ALIGNMENT = 128  # rows per expert of the published kernels
_SHARP = 3.0  # exponent of the blend between what limits


def _log_seconds(
    theta: FloatArray, flops_P: FloatArray, bytes_P: FloatArray, peak: float, bandwidth: float
) -> FloatArray:
    launch, peak_share, memory_share = np.exp(theta)
    compute_P, memory_P = flops_P / (peak * peak_share), bytes_P / (bandwidth * memory_share)
    return np.asarray(np.log(launch + (compute_P**_SHARP + memory_P**_SHARP) ** (1.0 / _SHARP)))


def _published() -> tuple[FloatArray, FloatArray, FloatArray]:
    m, n, k, tflops = np.array(PUBLISHED_ROWS, float).T
    return 2.0 * m * n * k, m * k + k * n + 2.0 * m * n, 2.0 * m * n * k / (tflops * 1e12)


@cache
def published_fit() -> tuple[float, float, float]:
    """(log launch seconds, log share of the FP8 peak, log share of the bandwidth) of the published rows."""
    flops_P, bytes_P, seconds_P = _published()
    theta = least_squares(
        lambda theta: _log_seconds(theta, flops_P, bytes_P, _H800_PEAK, _H800_BANDWIDTH), np.log(seconds_P), _START
    )
    return float(theta[0]), float(theta[1]), float(theta[2])


def published_errors() -> FloatArray:
    """Log of published over fitted seconds, per published row."""
    flops_P, bytes_P, seconds_P = _published()
    fitted_P = _log_seconds(np.array(published_fit()), flops_P, bytes_P, _H800_PEAK, _H800_BANDWIDTH)
    return np.asarray(np.log(seconds_P) - fitted_P)


def fp8_grouped_gemm(
    rows_RE: FloatArray, k: int, n: int, *, gpu: GpuRates, direction: str, row_alignment: int
) -> Estimate:
    """Seconds on `gpu`, at the shares of peak and bandwidth that the published kernels reach; source "scaled".

    Raises UserError through the caller's roofline when the GPU has no FP8 units: then the source is "roofline".
    """
    aligned_RE = np.ceil(np.asarray(rows_RE, float) / row_alignment) * row_alignment
    rows_R = aligned_RE.sum(-1)
    weights_R = np.count_nonzero(aligned_RE, axis=-1) * float(k * n)
    if direction == "wgrad":
        bytes_R = rows_R * (k + n) + 2.0 * weights_R
    else:
        read, written = (k, n) if direction == "forward" else (n, k)
        bytes_R = rows_R * (read + 2.0 * written) + weights_R
    theta = np.array(published_fit())
    logs_R = _log_seconds(theta, 2.0 * rows_R * k * n, bytes_R, gpu.peak_flops["fp8"], gpu.memory_bandwidth)
    return Estimate(as_result(np.exp(logs_R)), "scaled")
