"""A GPU that was not measured, derived from one that was: by the ratios of their datasheets.

What a kernel takes beyond a launch is scaled by the ratio of peaks where compute limits it and by the ratio of
bandwidths where memory does, as the roofline of the measured GPU tells: max(c rc, b rm) / max(c, b) with its compute
time c, memory time b and the ratios rc, rm. Tiles, waves and libraries stay those of the measured GPU. Sources become
"scaled".

Legend: R ranks, E local experts.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moesim.kernels.calibrated import CalibratedModel
from moesim.kernels.cells import canonical
from moesim.kernels.estimate import (
    AttentionDirection,
    Contention,
    Estimate,
    FloatArray,
    GemmDirection,
    HostCosts,
    as_result,
    weakest,
)
from moesim.kernels.fp8 import FP8_ROW_ALIGNMENT, fp8_gemm, fp8_grouped_gemm
from moesim.kernels.roofline import (
    GpuRates,
    Roofline,
    attention_bytes,
    attention_flops,
    gemm_bytes,
    gemm_flops,
    grouped_gemm_bytes,
)


class ScaledModel:
    """The kernel model of `target`, from the calibrated model of `measured`.

    published_fp8: dense FP8 products are those of the published block-scaled kernels (`moesim.kernels.fp8`), as grouped
    ones always are; else they are the measured GPU's per-tensor products, scaled.
    """

    def __init__(
        self, base: CalibratedModel, *, measured: GpuRates, target: GpuRates, published_fp8: bool = False
    ) -> None:
        self.base, self._measured, self._target, self._published_fp8 = base, measured, target, published_fp8
        self.fallback = Roofline(target)
        self._memory_ratio = measured.memory_bandwidth / target.memory_bandwidth

    @property
    def name(self) -> str:
        """The target GPU and where its durations come from."""
        return f"{self._target.name} (scaled from {self.base.name})"

    @property
    def host(self) -> HostCosts:
        """The measured host: its processor is no part of the GPU."""
        return self.base.host

    @property
    def contention(self) -> Contention:
        """As measured, scaled in name only."""
        return Contention(self.base.contention.compute, self.base.contention.transfer, source="scaled")

    @property
    def launch_seconds(self) -> float:
        """Host time of one eager forward operation."""
        return self.base.launch_seconds

    @property
    def backward_launch_seconds(self) -> float:
        """Host time of one operation in the backward pass."""
        return self.base.backward_launch_seconds

    @property
    def readback_seconds(self) -> float:
        """Host time of a synchronising read-back."""
        return self.base.readback_seconds

    @property
    def kernel_floor_seconds(self) -> float:
        """The shortest time a kernel occupies its stream."""
        return self.base.kernel_floor_seconds

    def at_load(self, flops_per_second: float) -> "ScaledModel":
        """The kernels of a step that does this much in the mean: as far below its peak, the measured GPU does more."""
        ratio = self._measured.peak_flops["bf16"] / self._target.peak_flops["bf16"]
        base = self.base.at_load(flops_per_second * ratio)
        if base is self.base:
            return self
        return ScaledModel(base, measured=self._measured, target=self._target, published_fp8=self._published_fp8)

    def _scaled(self, found: Estimate, flops: FloatArray, bytes_: FloatArray, dtype: str) -> Estimate:
        peak = self._measured.peak_flops[dtype]
        compute, memory = flops / peak, bytes_ / self._measured.memory_bandwidth
        ratio = peak / self._target.peak_flops[dtype]
        limit = np.maximum(np.maximum(compute, memory), 1e-30)
        factor = np.maximum(compute * ratio, memory * self._memory_ratio) / limit
        floor = np.minimum(found.seconds, self.base.kernel_floor_seconds)
        seconds = np.asarray(floor + (found.seconds - floor) * factor)
        return Estimate(as_result(seconds), weakest(found.source, "scaled"))

    def gemm(
        self,
        *,
        m: ArrayLike,
        k: ArrayLike,
        n: ArrayLike,
        dtype: str = "bf16",
        direction: GemmDirection = "forward",
    ) -> Estimate:
        """Seconds of a dense product; a dtype that the target lacks raises UserError."""
        if dtype not in self._target.peak_flops:
            return self.fallback.gemm(m=m, k=k, n=n, dtype=dtype)
        rows, columns, depth = canonical(m, k, n, direction)
        if dtype == "fp8" and self._published_fp8:
            return fp8_gemm(rows, depth, columns, gpu=self._target, direction=direction)
        found = self.base.gemm(m=m, k=k, n=n, dtype=dtype, direction=direction)
        return self._scaled(
            found, gemm_flops(rows, depth, columns), gemm_bytes(rows, depth, columns, dtype=dtype), dtype
        )

    def grouped_gemm(
        self,
        *,
        rows_per_expert: ArrayLike,
        k: int,
        n: int,
        dtype: str = "bf16",
        direction: GemmDirection = "forward",
        row_alignment: int | None = None,
    ) -> Estimate:
        """Seconds of one grouped product; rows_per_expert [E] or [R, E]."""
        rows_RE = np.asarray(rows_per_expert, float)
        if dtype not in self._target.peak_flops:
            return self.fallback.grouped_gemm(rows_per_expert=rows_RE, k=k, n=n, dtype=dtype, direction=direction)
        if dtype == "fp8":
            return fp8_grouped_gemm(
                rows_RE, k, n, gpu=self._target, direction=direction, row_alignment=row_alignment or FP8_ROW_ALIGNMENT
            )
        found = self.base.grouped_gemm(
            rows_per_expert=rows_RE, k=k, n=n, dtype=dtype, direction=direction, row_alignment=row_alignment
        )
        bytes_R = grouped_gemm_bytes(rows_RE, k, n, dtype=dtype, direction=direction)
        return self._scaled(found, gemm_flops(rows_RE.sum(-1), k, n), bytes_R, dtype)

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
        """Seconds of fused attention; a dtype that the target lacks raises UserError."""
        sizes: dict[str, Any] = {"batch": batch, "sequence": sequence, "heads": heads, "head_dim": head_dim}
        sizes |= {"value_dim": value_dim, "direction": direction}
        if dtype not in self._target.peak_flops:
            return self.fallback.attention(kv_heads=kv_heads, causal=causal, dtype=dtype, **sizes)
        found = self.base.attention(kv_heads=kv_heads, causal=causal, dtype=dtype, **sizes)
        flops, bytes_ = (
            attention_flops(causal=causal, **sizes),
            attention_bytes(kv_heads=kv_heads, dtype=dtype, **sizes),
        )
        return self._scaled(found, flops, bytes_, dtype)

    def memory_bound(self, *, kind: str, bytes: ArrayLike, width: ArrayLike | None = None) -> Estimate:
        """Seconds of a memory-bound kernel."""
        found = self.base.memory_bound(kind=kind, bytes=bytes, width=width)
        return self._scaled(found, np.zeros(()), np.asarray(bytes, float), "bf16")
