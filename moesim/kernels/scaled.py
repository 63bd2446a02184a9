"""A GPU that was not measured, derived from one that was: by the ratios of their datasheets.

What a kernel takes beyond a launch is scaled by the ratio of peaks where compute limits it and by the ratio of
bandwidths where memory does, as the roofline of the measured GPU tells: max(c rc, b rm) / max(c, b) with its compute
time c, memory time b and the ratios rc, rm. Memory-bound kernels that the SMs limit follow SMs times clock instead, as
far as their kind says (`MemoryKind.bandwidth`), up to REACHED of the bandwidth; so do GEMMs of experts whose weights
take longer to read than their FLOPs (GROUPED_BANDWIDTH). Tiles, waves and libraries stay those of the measured GPU.
Sources become "scaled".
"""

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from moesim.kernels.calibrated import CalibratedModel
from moesim.kernels.estimate import Contention, Estimate, HostCosts, as_result, weakest
from moesim.kernels.families import (
    MEMORY_KINDS,
    FloatArray,
    Gemm,
    GroupedGemm,
    Kernel,
    MemoryBound,
    chip_format,
    is_narrow,
    peak_format,
)
from moesim.kernels.fp8 import BLOCK_SCALED, FASTEST_PUBLISHED
from moesim.kernels.jitter import Jitter
from moesim.kernels.roofline import GpuRates, Roofline

if TYPE_CHECKING:
    from moesim.kernels.tabulated import TabulatedModel

REACHED = 0.9  # of the bandwidth, by kernels that only the memory limits
# Of GEMMs of experts that are short of bandwidth, the power of the bandwidth that their rate follows from H100 to
# H200: 0.04 to 0.34 in the median, whatever share of the bandwidth they reach. An SM goes from expert to expert, which
# takes it as long with faster memory. Dense GEMMs follow the bandwidth where they reach 0.7 of it and more.
GROUPED_BANDWIDTH = 0.2


class ScaledModel:
    """The kernel model of `target`, from the calibrated model of `measured`.

    by_deep_gemm: dense block-scaled FP8 GEMMs are DeepGEMM's (`moesim.kernels.fp8`), as grouped ones always are, and
    not the vendor library's. memory_follows: all kernels short of bandwidth follow this power of it, whatever their
    kind says: for rows of the pair of GPUs that told the kinds.
    """

    def __init__(
        self,
        base: "CalibratedModel | TabulatedModel",
        *,
        measured: GpuRates,
        target: GpuRates,
        by_deep_gemm: bool = False,
        memory_follows: float | None = None,
    ) -> None:
        self._memory_follows = memory_follows
        self.base, self._measured, self._target, self._by_deep_gemm = base, measured, target, by_deep_gemm
        self.fallback = Roofline(target)
        self._memory_ratio = measured.memory_bandwidth / target.memory_bandwidth
        self._sm_ratio = measured.sm_count * measured.clock_hz / (target.sm_count * target.clock_hz)
        self._known: dict[tuple[object, ...], Estimate] = {}  # of kernels of one size each, which all groups have

    @property
    def name(self) -> str:
        """The target GPU and where its durations come from."""
        return f"{self._target.name} (scaled from {self.base.name})"

    @property
    def is_same_chip(self) -> bool:
        """Whether peaks and memory are those of the measured GPU, so that scaling changes nothing."""
        same_memory = self._measured.memory_bandwidth == self._target.memory_bandwidth
        return same_memory and dict(self._measured.peak_flops) == dict(self._target.peak_flops)

    def power_share(self, dtype: str) -> float:
        """That of the measured GPU."""
        return self.base.power_share(dtype)

    @property
    def host(self) -> HostCosts:
        """The measured host: its processor is no part of the GPU."""
        return self.base.host

    @property
    def contention(self) -> Contention:
        """As measured, scaled in name only."""
        return replace(self.base.contention, source="scaled")

    @property
    def jitter(self) -> Jitter:
        """As of the measured GPU."""
        return self.base.jitter

    def at_load(self, flops_per_second: float) -> "ScaledModel":
        """The kernels of a step that does this much in the mean: as far below its peak, the measured GPU does more."""
        ratio = self._measured.peak_flops["bf16"] / self._target.peak_flops["bf16"]
        base = self.base.at_load(flops_per_second * ratio)
        if base is self.base:
            return self
        return self.of_base(base)

    def seconds(self, kernel: Kernel) -> Estimate:
        """What the measured GPU takes, scaled; a dtype that the target lacks raises UserError."""
        sizes = vars(kernel).values()
        if not all(np.isscalar(size) or size is None for size in sizes):
            return self._scaled(kernel)
        key = (type(kernel), *sizes)
        if key not in self._known:
            self._known[key] = self._scaled(kernel)
        return self._known[key]

    def _scaled(self, kernel: Kernel) -> Estimate:
        dtype = "bf16" if isinstance(kernel, MemoryBound) else peak_format(kernel.dtype)
        if dtype not in self._target.peak_flops:
            return self.fallback.seconds(kernel)
        found = self._of_base(kernel)
        peak = self._measured.peak_flops[dtype]
        compute, memory = kernel.flops / peak, kernel.moved_bytes / self._measured.memory_bandwidth
        ratio = peak / self._target.peak_flops[dtype]
        limit = np.maximum(np.maximum(compute, memory), 1e-30)
        floor = np.minimum(found.seconds, self.base.host.kernel_floor)
        busy = found.seconds - floor
        reached = memory / np.maximum(busy, 1e-30)
        if isinstance(kernel, MemoryBound):
            factor = self._of_memory(MEMORY_KINDS[kernel.kind].bandwidth, reached)
        else:
            follows = GROUPED_BANDWIDTH if isinstance(kernel, GroupedGemm) else 1.0
            factor = np.maximum(compute * ratio, memory * self._of_memory(follows, reached)) / limit
        seconds = np.asarray(floor + busy * factor)
        scaled = Estimate(as_result(seconds), weakest(found.source, "scaled"))
        return self._within(kernel, scaled) if isinstance(kernel, Gemm | GroupedGemm) else scaled

    def _of_base(self, kernel: Kernel) -> Estimate:
        of_library = self._by_deep_gemm and isinstance(kernel, Gemm) and kernel.dtype == BLOCK_SCALED
        if of_library and isinstance(kernel, Gemm) and isinstance(self.base, CalibratedModel):
            return self.base.deep_gemm(kernel)
        return self.base.seconds(kernel)

    def _of_memory(self, follows: float, reached: FloatArray) -> FloatArray:
        """How much longer a kernel takes that is short of bandwidth and reaches this share of the measured GPU's;
        `follows`: the power of the bandwidth that its rate follows."""
        follows = follows if self._memory_follows is None else self._memory_follows
        least = self._memory_ratio * np.minimum(reached / REACHED, 1.0)
        return np.asarray(np.maximum(self._memory_ratio**follows * self._sm_ratio ** (1.0 - follows), least))

    def has(self, kernel: Kernel) -> bool:
        """Whether the measured GPU has rows of such kernels."""
        return isinstance(self.base, CalibratedModel) and self.base.has(kernel)

    @property
    def regime(self) -> str | None:
        """That of the measured GPU, where a scenario asks for one."""
        return self.base.regime

    def of_base(self, base: "CalibratedModel | TabulatedModel") -> "ScaledModel":
        """The same scaling of other kernels of the measured GPU."""
        return ScaledModel(
            base,
            measured=self._measured,
            target=self._target,
            by_deep_gemm=self._by_deep_gemm,
            memory_follows=self._memory_follows,
        )

    def at_benchmark_clock(self) -> "ScaledModel":
        """The same at the clocks of the measured GPU's benchmarks, which were short."""
        return self.of_base(self.base.at_benchmark_clock())

    def _within(self, kernel: Gemm | GroupedGemm, found: Estimate) -> Estimate:
        """No faster than the fastest such GEMM known of the chip: published, or the measured GPU's, scaled."""
        fastest = self.fastest.get(chip_format(kernel.dtype), math.inf) if is_narrow(kernel.dtype) else math.inf
        return Estimate(as_result(np.maximum(found.seconds, kernel.flops / fastest)), found.source)

    @property
    def fastest(self) -> dict[str, float]:
        """FLOP/s of the fastest GEMM known, by its units."""
        ours, theirs = self._target.peak_flops, self._measured.peak_flops
        both = [units for units in self.base.fastest if units in ours and units in theirs]
        scaled = {units: self.base.fastest[units] * ours[units] / theirs[units] for units in both}
        return scaled | {"fp8": max(FASTEST_PUBLISHED, scaled["fp8"])} if self._by_deep_gemm else scaled
