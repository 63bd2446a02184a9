"""The roofline: max(FLOPs / reachable peak, bytes / reachable bandwidth), and never less than a launch.

Legend: R ranks, E local experts.

The reachable shares are plain constants, set once for all GPUs: a large matrix product on Hopper reaches about 80 % of
the datasheet peak and a large copy about 90 % of the datasheet bandwidth; fused attention reaches less. They are a
first approximation by intent; a calibrated profile replaces them.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from moesim.errors import UserError
from moesim.kernels.estimate import (
    DTYPE_BYTES,
    AttentionDirection,
    Contention,
    Estimate,
    FloatArray,
    GemmDirection,
    HostCosts,
    as_result,
)
from moesim.kernels.memory_kinds import MEMORY_KINDS

GEMM_SHARE = 0.80  # of the dense peak
GROUPED_GEMM_SHARE = 0.70
ATTENTION_SHARE = {"forward": 0.60, "backward": 0.45}
MEMORY_SHARE = 0.85  # of the datasheet bandwidth
OUTPUT_BYTES = 2.0  # products are written as bf16, also those of fp8 operands
HOST = HostCosts(launch=6e-6, backward_launch=9e-6, readback=15e-6, kernel_floor=3e-6, source="roofline")
# A collective that keeps 16 of 132 SMs busy leaves 88 % of them to the kernel beside it.
CONTENTION = Contention(compute=1.14, transfer=1.0, source="roofline")


class GpuRates(Protocol):
    """What the roofline reads of a GPU's catalogue entry."""

    @property
    def name(self) -> str: ...
    @property
    def peak_flops(self) -> Mapping[str, float]: ...
    @property
    def memory_bandwidth(self) -> float: ...


def gemm_flops(m: ArrayLike, k: ArrayLike, n: ArrayLike) -> FloatArray:
    """2 m k n."""
    return np.asarray(2.0 * np.asarray(m, float) * np.asarray(k, float) * np.asarray(n, float))


def gemm_bytes(m: ArrayLike, k: ArrayLike, n: ArrayLike, *, dtype: str) -> FloatArray:
    """Both operands read once and the product written once."""
    m, k, n = np.asarray(m, float), np.asarray(k, float), np.asarray(n, float)
    return np.asarray((m * k + k * n) * DTYPE_BYTES[dtype] + m * n * OUTPUT_BYTES)


def grouped_gemm_bytes(rows_per_expert: ArrayLike, k: int, n: int, *, dtype: str, direction: str) -> FloatArray:
    """Bytes of one grouped product: activations of all rows, and weights of the experts that have rows.

    wgrad writes the gradient of every expert that has rows; torch hands back one zero-filled tensor for the others,
    whose bytes count too.
    """
    rows_RE = np.asarray(rows_per_expert, float)
    rows_R = rows_RE.sum(-1)
    size = DTYPE_BYTES[dtype]
    if direction == "wgrad":
        return np.asarray(rows_R * (k + n) * size + rows_RE.shape[-1] * k * n * OUTPUT_BYTES)
    read, written = (k, n) if direction == "forward" else (n, k)
    active_R = np.count_nonzero(rows_RE, axis=-1)
    return np.asarray(rows_R * (read * size + written * OUTPUT_BYTES) + active_R * (k * n * size))


def attention_flops(
    *,
    batch: ArrayLike,
    sequence: ArrayLike,
    heads: int,
    head_dim: int,
    value_dim: int,
    causal: bool,
    direction: AttentionDirection,
) -> FloatArray:
    """FLOPs of fused attention: Q K^T and P V forward; backward recomputes Q K^T and adds dP, dV, dQ, dK."""
    width = head_dim + value_dim if direction == "forward" else 3 * head_dim + 2 * value_dim
    pairs = np.asarray(batch, float) * np.square(np.asarray(sequence, float)) * (0.5 if causal else 1.0)
    return np.asarray(2.0 * heads * width * pairs)


def attention_bytes(
    *,
    batch: ArrayLike,
    sequence: ArrayLike,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: str,
    direction: AttentionDirection,
) -> FloatArray:
    """Queries, keys, values and output once; backward also reads the output's gradient and writes three gradients."""
    width = heads * (head_dim + value_dim) + kv_heads * (head_dim + value_dim)
    if direction == "backward":
        width = 2 * width + heads * value_dim
    return np.asarray(np.asarray(batch, float) * np.asarray(sequence, float) * width * DTYPE_BYTES[dtype])


class Roofline:
    """Durations from the datasheet of one GPU; every source is "roofline"."""

    def __init__(self, gpu: GpuRates) -> None:
        self.gpu = gpu
        self.contention = CONTENTION

    @property
    def name(self) -> str:
        """The GPU's catalogue name."""
        return self.gpu.name

    @property
    def launch_seconds(self) -> float:
        """Host time of one eager forward operation."""
        return HOST.launch

    @property
    def backward_launch_seconds(self) -> float:
        """Host time of one operation in the backward pass."""
        return HOST.backward_launch

    @property
    def readback_seconds(self) -> float:
        """Host time of a synchronising read-back."""
        return HOST.readback

    @property
    def kernel_floor_seconds(self) -> float:
        """The shortest time a kernel occupies its stream."""
        return HOST.kernel_floor

    def at_load(self, flops_per_second: float) -> "Roofline":
        """Itself: a datasheet knows no power limit."""
        del flops_per_second
        return self

    def _peak(self, dtype: str) -> float:
        if dtype not in self.gpu.peak_flops:
            known = ", ".join(sorted(self.gpu.peak_flops))
            raise UserError(f"{self.gpu.name} has no {dtype} matrix units; use one of: {known}")
        return self.gpu.peak_flops[dtype]

    def _bound(self, flops: FloatArray, rate: float, bytes_: FloatArray) -> Estimate:
        busy = np.maximum(flops / rate, bytes_ / (self.gpu.memory_bandwidth * MEMORY_SHARE))
        return Estimate(as_result(np.maximum(busy, HOST.kernel_floor)), "roofline")

    def gemm(
        self, *, m: ArrayLike, k: ArrayLike, n: ArrayLike, dtype: str = "bf16", direction: GemmDirection = "forward"
    ) -> Estimate:
        """Seconds of a dense product. Raises UserError when the GPU has no matrix units for dtype."""
        rate = self._peak(dtype) * GEMM_SHARE
        if direction != "forward":
            m, k, n = (m, n, k) if direction == "dgrad" else (k, m, n)
        return self._bound(gemm_flops(m, k, n), rate, gemm_bytes(m, k, n, dtype=dtype))

    def grouped_gemm(
        self, *, rows_per_expert: ArrayLike, k: int, n: int, dtype: str = "bf16", direction: GemmDirection = "forward"
    ) -> Estimate:
        """Seconds of one grouped product; rows_per_expert [E] or [R, E]. Raises UserError as `gemm` does."""
        rate = self._peak(dtype) * GROUPED_GEMM_SHARE
        rows_R = np.asarray(rows_per_expert, float).sum(-1)
        bytes_R = grouped_gemm_bytes(rows_per_expert, k, n, dtype=dtype, direction=direction)
        return self._bound(gemm_flops(rows_R, k, n), rate, bytes_R)

    def attention(
        self,
        *,
        batch: ArrayLike,
        sequence: ArrayLike,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        causal: bool = True,
        dtype: str = "bf16",
        direction: AttentionDirection = "forward",
    ) -> Estimate:
        """Seconds of fused attention. Raises UserError as `gemm` does."""
        flops = attention_flops(
            batch=batch,
            sequence=sequence,
            heads=heads,
            head_dim=head_dim,
            value_dim=value_dim,
            causal=causal,
            direction=direction,
        )
        bytes_ = attention_bytes(
            batch=batch,
            sequence=sequence,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            dtype=dtype,
            direction=direction,
        )
        return self._bound(flops, self._peak(dtype) * ATTENTION_SHARE[direction], bytes_)

    def memory_bound(self, *, kind: str, bytes: ArrayLike) -> Estimate:
        """Seconds to move `bytes` (read plus written); the roofline makes no difference between kinds."""
        if kind not in MEMORY_KINDS:
            raise UserError(f"unknown memory-bound kernel {kind!r}; use one of: {', '.join(MEMORY_KINDS)}")
        moved = np.asarray(bytes, float)
        return self._bound(np.zeros(()), 1.0, moved)
