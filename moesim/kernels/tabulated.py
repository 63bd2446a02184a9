"""A GPU known from published tables of kernels; what they lack is scaled from a measured GPU by measured ratios.

- Forward GEMMs (bf16, and fp8 where the chip has it) and forward attention are classes fitted to the tables' rows.
- Their gradients take as much longer than the forward kernel of the same sides as on the measured GPU ("scaled").
- Grouped GEMMs scale with the ratio of the peaks, each times the share of it that dense GEMMs reach ("scaled").
- Memory-bound kernels scale with the bandwidths, times the share of it that the tables' casts reach, and with the SMs
  ("scaled"); host and contention are as measured.
- All follow one clock of the kind's own law (`moesim.kernels.clock_laws`).
"""

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np

from moesim.kernels.calibrated import CalibratedModel
from moesim.kernels.clock_laws import ClockLaw
from moesim.kernels.estimate import Contention, Estimate, HostCosts, as_result, weakest
from moesim.kernels.families import (
    Attention,
    Gemm,
    GroupedGemm,
    Kernel,
    MemoryBound,
    chip_format,
    gemm_sides,
    is_narrow,
    peak_format,
)
from moesim.kernels.jitter import Jitter, spread_of
from moesim.kernels.power import LEAST_EXPONENT
from moesim.kernels.profile import Profile
from moesim.kernels.roofline import GpuRates, Rates, Roofline
from moesim.kernels.scaled import ScaledModel

# Whose scales cost the tensor cores nothing, so that gradients are as per-tensor ones.
AS_PER_TENSOR = ("mxfp8", "nvfp4")
MEMORY = "memory"  # among the shares


def reached_rates(gpu: GpuRates, shares: Mapping[str, float]) -> Rates:
    """Rates of a GPU as far as its kernels reach them where the measured GPU's do: peaks, and the bandwidth under
    `memory`, times `shares`. Formats without a share of their own have that of bf16, mxfp8 that of fp8.
    """
    common = shares["bf16"]
    known = {"mxfp8": shares.get("fp8", common)} | dict(shares)
    peaks = {dtype: peak * known.get(dtype, common) for dtype, peak in gpu.peak_flops.items()}
    return Rates(gpu.name, peaks, gpu.memory_bandwidth * shares.get(MEMORY, 1.0), gpu.sm_count, gpu.clock_hz)


class TabulatedModel:
    """The kernel model of `target` from a profile that `moesim calibrate --from-tables` made."""

    def __init__(self, profile: Profile, *, base: CalibratedModel, measured: GpuRates, target: GpuRates) -> None:
        assert profile.tables is not None
        self.profile, self.base, self.target = profile, base, target
        self.law = ClockLaw.from_json(profile.tables["clock"])
        self.tables = CalibratedModel(profile, fallback=Roofline(target), expected_families=())
        self.fallback = self.tables.fallback
        # At the clock of benchmarks: the law of this kind, not that of the measured GPU, is applied on top.
        self._base_free = base.at_benchmark_clock()
        self._measured, self._reached = measured, reached_rates(target, profile.tables["peak_shares"])
        self._scaled = ScaledModel(self._base_free, measured=measured, target=self._reached)
        self.log_clock: float | None = None  # of a step, relative to the tables'
        self.regime: str | None = None  # one that a scenario asks for, which no step's load changes
        # Of kernels without pause: that of large GEMMs, which reach about so much of the peak in short runs.
        self.clock_error = self.law.error_at(0.65 * target.peak_flops["bf16"])

    @property
    def name(self) -> str:
        """The target GPU and where its durations come from."""
        return f"{self.target.name} (tables, rest scaled from {self.base.name})"

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
    def collectives(self) -> list[dict[str, Any]]:
        """NCCL calls of the tables."""
        return self.profile.family("collective")

    @property
    def jitter(self) -> Jitter:
        """As measured on another GPU, at the clock of this kind."""
        return spread_of(self.target.name).at_fall(-self.log_clock if self.log_clock is not None else 0.0)

    def at_load(self, flops_per_second: float) -> "TabulatedModel":
        """The kernels of a step of this mean load, at the clock that the kind's law leaves it."""
        if self.regime is not None:
            return self
        model = copy(self)
        model.tables = self.tables.at_load(flops_per_second)
        load = self.law.cap.load_of_step(flops_per_second, bandwidth=self.target.memory_bandwidth)
        model.log_clock, model.clock_error = float(self.law.cap.log_clock(load)), self.law.error_at(load)
        return model

    def at_benchmark_clock(self) -> "TabulatedModel":
        """The same kernels at the clocks of the tables' short runs, of which no law has to be known."""
        model = copy(self)
        model.tables, model.log_clock, model.clock_error = self.tables.at_benchmark_clock(), 0.0, 0.0
        return model

    @property
    def fastest(self) -> dict[str, float]:
        """FLOP/s of the fastest GEMM of the tables, by its units."""
        return self.tables.fastest

    def seconds(self, kernel: Kernel) -> Estimate:
        """From the tables, or scaled; a dtype that the GPU lacks raises UserError."""
        if isinstance(kernel, Gemm) and self._has_forward(kernel):
            return self._narrow(kernel) if is_narrow(kernel.dtype) else self._dense(kernel)
        if isinstance(kernel, GroupedGemm) and kernel.dtype in AS_PER_TENSOR:
            return self._narrow_grouped(kernel)
        if isinstance(kernel, Attention) and self.tables.kernel_class("attention/forward") is not None:
            if kernel.direction == "forward":
                return self.tables.seconds(kernel)
            return self._relative(kernel, replace(kernel, direction="forward"))
        return self._at_own_clock(kernel)

    def _has_forward(self, kernel: Gemm) -> bool:
        formats = ("bf16", "fp16", "fp8", "fp8_block", "mxfp8", "nvfp4")
        return kernel.dtype in formats and peak_format(kernel.dtype) in self.target.peak_flops

    def _dense(self, kernel: Gemm) -> Estimate:
        return self.tables.seconds(kernel) if kernel.direction == "forward" else self._gradient(kernel)

    def _narrow(self, kernel: Gemm) -> Estimate:
        """FP8 from per-tensor rows: block-scaled GEMMs take as much longer as on the measured GPU, mxfp8 as long.

        nvfp4 has rows of its own. Gradients of both have the ratios of per-tensor ones: their scales are applied by the
        tensor cores.
        """
        rows, columns, depth = gemm_sides(kernel.m, kernel.k, kernel.n, kernel.direction)
        table = "nvfp4" if kernel.dtype == "nvfp4" else "fp8"
        found = self.tables.seconds(Gemm(m=rows, k=depth, n=columns, dtype=table))
        ours = replace(kernel, dtype="fp8" if kernel.dtype in AS_PER_TENSOR else kernel.dtype)
        plain = Gemm(m=rows, k=depth, n=columns, dtype="fp8")
        source = found.source if kernel.dtype == table else weakest(found.source, "scaled")
        if (ours.dtype, ours.direction) == (plain.dtype, plain.direction):
            return Estimate(found.seconds, source)
        ratio = np.asarray(self._base_free.seconds(ours).seconds) / self._base_free.seconds(plain).seconds
        least = kernel.flops / self.fastest[chip_format(kernel.dtype)]
        seconds = np.maximum(np.asarray(found.seconds * ratio), least)
        return Estimate(as_result(seconds), weakest(found.source, "scaled"))

    def _narrow_grouped(self, kernel: GroupedGemm) -> Estimate:
        """As per-tensor GEMMs of the measured GPU, by the ratio of its fp8 peak to the peak of this format."""
        peak = self._reached.peak_flops[peak_format(kernel.dtype)]
        gpu = self.target
        target = Rates(gpu.name, {**gpu.peak_flops, "fp8": peak}, gpu.memory_bandwidth, gpu.sm_count, gpu.clock_hz)
        model = ScaledModel(self._base_free, measured=self._measured, target=target)
        seconds, source = model.seconds(replace(kernel, dtype="fp8"))
        log_clock = self._own_log_clock(kernel, seconds)
        least = kernel.flops / self.fastest[chip_format(kernel.dtype)]
        seconds = np.maximum(seconds * np.exp(-LEAST_EXPONENT * log_clock), least)
        return Estimate(as_result(np.asarray(seconds)), source)

    def _gradient(self, kernel: Gemm) -> Estimate:
        rows, columns, depth = gemm_sides(kernel.m, kernel.k, kernel.n, kernel.direction)
        return self._relative(kernel, Gemm(m=rows, k=depth, n=columns, dtype=kernel.dtype))

    def _relative(self, kernel: Gemm | Attention, forward: Gemm | Attention) -> Estimate:
        """The tables' forward kernel times what `kernel` takes over it on the measured GPU."""
        found = self.tables.seconds(forward)
        ratio = np.asarray(self._base_free.seconds(kernel).seconds) / self._base_free.seconds(forward).seconds
        return Estimate(as_result(np.asarray(found.seconds * ratio)), weakest(found.source, "scaled"))

    def _at_own_clock(self, kernel: Kernel) -> Estimate:
        """Scaled, at this kind's clock: compute follows it as the measured classes do, the memory does not."""
        seconds, source = self._scaled.seconds(kernel)
        if isinstance(kernel, MemoryBound):
            return Estimate(seconds, source)
        seconds = seconds * np.exp(-LEAST_EXPONENT * self._own_log_clock(kernel, seconds))
        if is_narrow(kernel.dtype):
            seconds = np.maximum(seconds, kernel.flops / self.fastest.get(chip_format(kernel.dtype), math.inf))
        return Estimate(as_result(np.asarray(seconds)), source)

    def _own_log_clock(self, kernel: Kernel, seconds: Any) -> Any:
        if self.log_clock is not None:
            return self.log_clock
        assert not isinstance(kernel, MemoryBound)
        work = kernel.flops * self.power_share(kernel.dtype) + self.law.cap.traffic * kernel.moved_bytes
        return self.law.cap.log_clock(np.asarray(work / np.maximum(seconds, 1e-12)))
