"""Kernel durations from a measured profile, with the roofline where the profile has nothing.

Legend: R ranks, E local experts, Q queried kernels.
"""

import hashlib
import math
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import physics
from moesim.kernels.clock_laws import KIND_POWER
from moesim.kernels.estimate import Contention, Estimate, HostCosts, as_result, weakest
from moesim.kernels.families import (
    DTYPE_BYTES,
    MEMORY_KINDS,
    Attention,
    FloatArray,
    Gemm,
    GroupedGemm,
    Kernel,
    MemoryBound,
    chip_format,
    gemm_sides,
    is_narrow,
    kernel_of,
)
from moesim.kernels.fitting import SUSTAINED, class_rows, fit_class, fit_sustained
from moesim.kernels.fp8 import BLOCK_SCALED, block_sizes
from moesim.kernels.jitter import NO_JITTER, Jitter, spread_of
from moesim.kernels.kernel_classes import (
    BLOCK_CLASSES,
    TENSOR_DTYPES,
    KernelClass,
    deep_gemm_class,
    gemm_class,
    grouped_class,
    kind_of,
    stored_fit,
)
from moesim.kernels.measured import contention_of, host_costs_of, typical_widths
from moesim.kernels.physics import RowTotals
from moesim.kernels.power import PowerCap
from moesim.kernels.profile import Profile
from moesim.kernels.roofline import Roofline
from moesim.seeding import stream

if TYPE_CHECKING:
    from moesim.kernels.scaled import ScaledModel

FAMILIES = ("gemm", "grouped_gemm", "attention", "memory_bound", "host")
# Memory-bound kernels below this share of the bandwidth (index-adds, strided GEMMs) wait for the SMs and the L2, and
# slow down with their clock; faster ones do not.
SLOW_SHARE = 0.5
_CACHED_CALLS = 4096
_CACHED_STEPS = 4
_CACHED_ROWS = 16  # the directions of both GEMMs of a layer follow each other
_MANY_ROWS = 512  # values of rows_per_expert from which it pays to look for equal ranks
_SINGLE = (int, float, str, np.integer, np.floating, type(None))  # no array
_LONG_KEY = 512  # bytes from which on a digest stands for an array in a cache


class CalibratedModel:
    """The kernel model of one profile. Source: "measured" for a shape of the profile, "interpolated" near measured
    ones, "extrapolated" beyond, "roofline" for what the profile lacks.

    Durations are those of kernels that run without pause, at the clock that the power limit leaves each; `at_load`
    gives the kernels of a step, which share one clock, and `at_clock` those at any clock.
    """

    def __init__(
        self,
        profile: Profile,
        *,
        fallback: Roofline,
        clock_mhz: float | None = None,
        expected_families: Sequence[str] = FAMILIES,
        relative: "ScaledModel | None" = None,
    ) -> None:
        """`relative`: another measured GPU scaled to this one, for kinds of kernels that this profile lacks."""
        self.profile = profile
        self.relative = relative
        self.fallback = fallback
        self.clock_mhz = clock_mhz
        self.regime: str | None = None  # one that a scenario asks for, which no step's load changes
        self._shared_clock = False
        self._log_fall = 0.0  # of a step's clock below that of low loads
        self._rows = class_rows(profile)
        self._classes: dict[str, KernelClass] = {}
        self._fastest: list[dict[str, float]] = []  # one at most, shared by copies at other clocks as classes are
        self._widths = typical_widths(profile)
        self.host: HostCosts = host_costs_of(profile)
        self.contention: Contention = contention_of(profile)
        if relative is not None and not self.contention.collectives:
            facts = relative.contention
            self.contention = replace(
                self.contention,
                collectives=facts.collectives,
                collective_rate=facts.collective_rate,
                sends=self.contention.sends or facts.sends,
            )
        present = {row["family"] for row in profile.rows}
        self.missing_families = tuple(family for family in expected_families if family not in present)
        if self.missing_families:
            names = ", ".join(self.missing_families)
            warnings.warn(f"profile {profile.name}: no rows for {names}; the roofline answers instead", stacklevel=2)
        self._forget()

    def _forget(self) -> None:
        """Calls repeat over layers and micro-batches; caches, empty now, make the repetitions free."""
        self._estimates: dict[Any, Estimate] = {}
        self._row_totals: dict[Any, tuple[RowTotals, NDArray[np.int64] | None]] = {}
        self._in_steps: dict[float, CalibratedModel] = {}

    @property
    def name(self) -> str:
        """The profile's name."""
        return self.profile.name

    @cached_property
    def collectives(self) -> list[dict[str, Any]]:
        """Measured collectives: kind, bytes of one rank's buffer, ranks, p20/p50/p80 seconds of the slowest rank."""
        return self.profile.family("collective")

    @property
    def jitter(self) -> Jitter:
        """How far GPUs are apart at the step's clock; none of a device that no table of kinds has, as a CPU."""
        kind = self.fallback.gpu.name
        return spread_of(kind).at_fall(self._log_fall) if kind in KIND_POWER else NO_JITTER

    def at_clock(self, mhz: float) -> "CalibratedModel":
        """The same kernels at another SM clock: seconds scale by clock ** -alpha, with alpha measured per class."""
        model = self._copied(lambda other: other.at_clock(mhz))
        model.clock_mhz = mhz
        return model

    def at_benchmark_clock(self) -> "CalibratedModel":
        """The same kernels at the clocks that their benchmarks, which were short, ran at."""
        model = self._copied(CalibratedModel.at_benchmark_clock)
        model._cap, model._shared_clock = None, False
        return model

    def power_share(self, dtype: str) -> float:
        """Of a bf16 FLOP's power, one of this dtype's."""
        cap = PowerCap(0.0, 0.0, 0.0, 0.0) if self._cap is None else self._cap
        return cap.share_of(dtype)

    def without_relative(self) -> "CalibratedModel":
        """What this GPU's own rows tell alone."""
        model = self._copied()
        model.relative = None
        return model

    @cached_property
    def _cap(self) -> PowerCap | None:
        """The clock under the power limit; None where no sustained rows tell it."""
        stored = self.profile.fits.get(SUSTAINED)
        return (
            fit_sustained(self.profile.family(SUSTAINED), self.kernel_class)
            if stored is None
            else PowerCap.from_json(stored)
        )

    def at_load(self, flops_per_second: float) -> "CalibratedModel":
        """The same kernels in a step of this mean load, half of its time at the memory's full bandwidth."""
        if self._cap is None or self.regime is not None:
            return self
        load = self._cap.load_of_step(flops_per_second, bandwidth=self.fallback.gpu.memory_bandwidth)
        return self.in_step(math.exp(self._cap.log_clock(load)))

    def in_step(self, mhz: float) -> "CalibratedModel":
        """The same kernels in a step that runs at this clock.

        Steps are mostly simulated one after the other that have kernels of the same sizes, and first all at the clock
        of low loads: the latest models come again, without their many rows of experts.
        """
        model = self._in_steps.get(mhz)
        if model is not None:
            model._estimates = {
                key: found for key, found in model._estimates.items() if isinstance(found.seconds, float)
            }
            model._row_totals.clear()
            return model
        model = self._copied(lambda other: other.in_step(mhz))
        model._log_fall = 0.0 if self._cap is None else max(0.0, self._cap.free - math.log(mhz))
        model._cap, model._shared_clock = PowerCap(math.log(mhz), threshold=0.0, slope=0.0, traffic=0.0), True
        _keep(self._in_steps, mhz, model, limit=_CACHED_STEPS)
        return model

    @property
    def step_clock_mhz(self) -> float | None:
        """The clock that the kernels of a step share; None for kernels that have each its own."""
        return math.exp(self._cap.free) if self._shared_clock and self._cap is not None else None

    def _copied(self, of_relative: "Callable[[CalibratedModel], CalibratedModel] | None" = None) -> "CalibratedModel":
        """With the same classes, and nothing remembered of what depends on the clock; `of_relative` acts there too."""
        model = copy(self)
        model._forget()
        if of_relative is not None and self.relative is not None:
            base = self.relative.base
            assert isinstance(base, CalibratedModel)
            model.relative = self.relative.of_base(of_relative(base))
        return model

    def kernel_class(self, name: str) -> KernelClass | None:
        """The fitted class, made at first use; None when the profile has no such rows."""
        if name not in self._classes:
            rows = self._rows.get(name)
            if rows is None:
                return None
            kind = kind_of(name)
            fit = stored_fit(kind, self.profile.fits.get(name)) or fit_class(kind, rows)
            self._classes[name] = KernelClass(kind, rows, fit)
        return self._classes[name]

    def _predict(
        self, kernel_class: KernelClass, columns: physics.Columns, shape: tuple[int, ...], cap: PowerCap | None = None
    ) -> Estimate:
        """Of floats (shape empty), or of arrays that broadcast to `shape`."""
        if not shape:
            return Estimate(*kernel_class.predict_one(columns, clock_mhz=self.clock_mhz, cap=cap))
        flat = tuple(_flat(column, shape) if isinstance(column, np.ndarray) else column for column in columns)
        seconds_Q, source = kernel_class.predict(flat, clock_mhz=self.clock_mhz, cap=cap)
        return Estimate(seconds_Q.reshape(shape), source)

    def seconds(self, kernel: Kernel) -> Estimate:
        """Seconds of a kernel; what the profile has no rows of, the roofline answers. UserError as the roofline's.

        Block-scaled GEMMs of experts are DeepGEMM's, dense ones the library's; `deep_gemm` has those of DeepGEMM.
        """
        if isinstance(kernel, GroupedGemm):
            return self._known_grouped(kernel)
        key = _key(kernel)
        found = self._estimates.get(key)
        if found is None:
            seconds, source = self._estimate(kernel)
            found = Estimate(_frozen(seconds), source)
            _keep(self._estimates, key, found, limit=_CACHED_CALLS)
        return found

    def _estimate(self, kernel: Gemm | Attention | MemoryBound) -> Estimate:
        match kernel:
            case Gemm():
                return self._gemm(kernel)
            case Attention():
                return self._attention(kernel)
            case MemoryBound():
                return self._memory_bound(kernel)

    def _gemm(self, kernel: Gemm) -> Estimate:
        name = gemm_class(kernel.dtype, kernel.direction)
        kernel_class = self.kernel_class(name)
        if kernel_class is None:
            return self._without_class(kernel)
        if name in BLOCK_CLASSES:
            return self._in_blocks(kernel_class, kernel)
        sizes, shape = _floats(*gemm_sides(kernel.m, kernel.k, kernel.n, kernel.direction))
        found = self._predict(kernel_class, (*sizes, DTYPE_BYTES[kernel.dtype]), shape, self._cap)
        return self._as_measured(kernel, found)

    def _in_blocks(self, kernel_class: KernelClass, kernel: Gemm) -> Estimate:
        """A dense GEMM whose depth is summed in blocks with scales of their own."""
        columns = block_sizes(kernel)
        shape = np.broadcast_shapes(*(np.shape(column) for column in columns))
        return self._as_measured(kernel, self._predict(kernel_class, columns, shape, self._cap))

    def deep_gemm(self, kernel: Gemm) -> Estimate:
        """A dense block-scaled GEMM by DeepGEMM's kernels; without rows of them as `seconds`."""
        kernel_class = self.kernel_class(deep_gemm_class(kernel.direction))
        return self.seconds(kernel) if kernel_class is None else self._in_blocks(kernel_class, kernel)

    def _as_measured(self, kernel: Gemm | GroupedGemm, found: Estimate) -> Estimate:
        """No FP8 GEMM runs faster than any that was measured; the law of a step's clock is that of bf16."""
        if not is_narrow(kernel.dtype):
            return found
        least = kernel.flops / self.fastest.get(chip_format(kernel.dtype), math.inf)
        return Estimate(as_result(np.maximum(found.seconds, least)), found.source)

    @property
    def fastest(self) -> dict[str, float]:
        """FLOP/s of the fastest measured GEMM by the units it runs on, of those with operands of a byte or less."""
        if self._fastest:
            return self._fastest[0]
        rates: dict[str, float] = {}
        for row in self.profile.rows:
            if is_narrow(row.get("dtype", "bf16")) and "p50" in row:
                units, rate = chip_format(row["dtype"]), float(kernel_of(row).flops) / row["p50"]
                rates[units] = max(rate, rates.get(units, 0.0))
        self._fastest.append(rates)
        return rates

    def _without_class(self, kernel: Kernel) -> Estimate:
        """Of a kind that this profile has no rows of: by the relative that has, or by the roofline.

        A dense FP8 GEMM takes as much longer as there than the library's forward GEMM of the same sides.
        """
        if self.relative is None or not self.relative.has(kernel):
            return self.fallback.seconds(kernel)
        if not isinstance(kernel, Gemm) or self.kernel_class(gemm_class("fp8", "forward")) is None:
            return self.relative.seconds(kernel)
        rows, columns, depth = gemm_sides(kernel.m, kernel.k, kernel.n, kernel.direction)
        plain = Gemm(m=rows, k=depth, n=columns, dtype="fp8")
        found, other = self._gemm(plain), self.relative.at_benchmark_clock()
        ratio = np.asarray(other.seconds(kernel).seconds) / other.seconds(plain).seconds
        return self._as_measured(kernel, Estimate(as_result(np.asarray(found.seconds * ratio)), "scaled"))

    def _attention(self, kernel: Attention) -> Estimate:
        """FP32 takes the roofline."""
        kernel_class = (
            self.kernel_class(f"attention/{kernel.direction}") if TENSOR_DTYPES.get(kernel.dtype) == "bf16" else None
        )
        if kernel_class is None:
            return self.fallback.seconds(kernel)
        (batch, sequence), shape = _floats(kernel.batch, kernel.sequence)
        columns = physics.attention_sizes(
            batch=batch,
            sequence=sequence,
            heads=kernel.heads,
            kv_heads=kernel.kv_heads,
            head_dim=kernel.head_dim,
            value_dim=kernel.value_dim,
            causal=float(kernel.causal),
            direction=kernel.direction,
        )
        return self._predict(kernel_class, columns, shape, self._cap)

    def _memory_bound(self, kernel: MemoryBound) -> Estimate:
        kernel_class = self.kernel_class(f"memory_bound/{kernel.kind}")
        if kernel_class is None:
            return self._without_class(kernel)
        width = self._widths[kernel.kind] if kernel.width is None else kernel.width
        columns, shape = _floats(kernel.bytes, width)
        follows = self._shared_clock and kernel_class.parameters[1] < SLOW_SHARE * self.fallback.gpu.memory_bandwidth
        found = self._predict(kernel_class, columns, shape, self._cap if follows else None)
        share = MEMORY_KINDS[kernel.kind].clock
        return found if share == 0.0 else found._replace(seconds=found.seconds * math.exp(share * self._log_fall))

    def _known_grouped(self, kernel: GroupedGemm) -> Estimate:
        if is_narrow(kernel.dtype) and not self._has_grouped(kernel):
            return self._without_class(kernel)
        rows_RE = np.asarray(kernel.rows_per_expert, float)
        rows_key = _array_key(rows_RE)
        key = (rows_key, kernel.k, kernel.n, kernel.dtype, kernel.direction)
        found = self._estimates.get(key)
        if found is None:
            totals, source_Q = self._distinct_rows(rows_key, rows_RE)
            seconds, source = self._grouped(totals, kernel)
            if source_Q is not None:
                seconds = np.asarray(seconds)[source_Q]
            found = Estimate(_frozen(seconds, rows_RE.shape[:-1]), source)
            _keep(self._estimates, key, found, limit=_CACHED_CALLS)
        return found

    def _distinct_rows(self, key: Any, rows_RE: FloatArray) -> tuple[RowTotals, NDArray[np.int64] | None]:
        """Totals of the distinct ranks among many, and which of them each rank is; None where each is its own.

        A GEMM does not care which expert has which rows, and model layers give the same rows to other ranks.
        """
        found = self._row_totals.get(key)
        if found is None:
            source_Q = None
            rows_QE = rows_RE if rows_RE.ndim == 1 else rows_RE.reshape(-1, rows_RE.shape[-1])
            if rows_RE.ndim > 1 and rows_RE.size >= _MANY_ROWS:
                rows_QE = np.sort(rows_QE, axis=1)
                mark_Q = np.einsum("qe,e->q", rows_QE, stream(0, "distinct rows").uniform(1.0, 2.0, rows_QE.shape[1]))
                _, first_U, source_Q = np.unique(mark_Q, return_index=True, return_inverse=True)
                rows_QE = rows_QE[first_U]
            found = RowTotals.of(rows_QE), source_Q
            _keep(self._row_totals, key, found, limit=_CACHED_ROWS)
        return found

    def _grouped(self, totals: RowTotals, kernel: GroupedGemm) -> Estimate:
        if kernel.dtype == BLOCK_SCALED:
            return self._block_scaled(replace(kernel, rows_per_expert=totals.rows_QE))
        experts = totals.rows_QE.shape[-1]
        tiles_Q = physics.grouped_tiles(
            totals.rows / experts, kernel.k, kernel.n, direction=kernel.direction, fp8=is_narrow(kernel.dtype)
        )
        if not isinstance(tiles_Q, np.ndarray):
            return self._grouped_alike(totals, kernel, tiles=tiles_Q)
        first, *others = np.unique(tiles_Q).tolist()
        if not others:
            return self._grouped_alike(totals, kernel, tiles=first)
        seconds_Q, sources = np.empty(len(tiles_Q)), []
        for tiles in (first, *others):
            chosen_Q = tiles_Q == tiles
            part = self._grouped_alike(totals.chosen(chosen_Q), kernel, tiles=tiles)
            seconds_Q[chosen_Q] = part.seconds
            sources.append(part.source)
        return Estimate(seconds_Q, weakest(*sources))

    def _grouped_alike(self, totals: RowTotals, kernel: GroupedGemm, *, tiles: int) -> Estimate:
        """GEMMs that all take the same tiles; where a profile has too few rows of those, its large ones stand in."""
        known = kernel.dtype in ("bf16", "fp16", "fp8")
        name = grouped_class(kernel.direction, dtype=kernel.dtype, tiles=tiles)
        if tiles == physics.LONG and name not in self._rows:
            tiles = physics.LARGE
            name = grouped_class(kernel.direction, dtype=kernel.dtype, tiles=tiles)
        kernel_class = self.kernel_class(name) if known else None
        if kernel_class is None:
            return self.fallback.seconds(replace(kernel, rows_per_expert=totals.rows_QE))
        sizes = (float(kernel.k), float(kernel.n))
        fp8 = is_narrow(kernel.dtype)
        columns = physics.grouped_sizes(totals, *sizes, direction=kernel.direction, tiles=tiles, fp8=fp8)
        found = self._predict(kernel_class, columns, totals.rows_QE.shape[:-1], self._cap)
        return self._as_measured(replace(kernel, rows_per_expert=totals.rows_QE), found) if fp8 else found

    def _block_scaled(self, kernel: GroupedGemm) -> Estimate:
        kernel_class = self.kernel_class(deep_gemm_class(kernel.direction))
        assert kernel_class is not None, "has_grouped was asked before"
        shape = np.shape(kernel.rows_per_expert)[:-1]
        return self._as_measured(kernel, self._predict(kernel_class, block_sizes(kernel), shape, self._cap))

    def _has_grouped(self, kernel: GroupedGemm) -> bool:
        if kernel.dtype == BLOCK_SCALED:
            return deep_gemm_class(kernel.direction) in self._rows
        names = (
            grouped_class(kernel.direction, dtype=kernel.dtype, tiles=tiles)
            for tiles in range(len(physics.GROUPED_TILES))
        )
        return any(name in self._rows for name in names)

    def has(self, kernel: Kernel) -> bool:
        """Whether rows of such kernels were measured."""
        match kernel:
            case Gemm():
                return gemm_class(kernel.dtype, kernel.direction) in self._rows
            case GroupedGemm():
                return self._has_grouped(kernel)
            case MemoryBound():
                return f"memory_bound/{kernel.kind}" in self._rows
        return f"attention/{kernel.direction}" in self._rows


def _key(kernel: Kernel) -> tuple[Any, ...]:
    """What tells a kernel from others in a cache."""
    sizes = vars(kernel).values()
    return (
        type(kernel),
        *(size if isinstance(size, _SINGLE) else _array_key(np.asarray(size, float)) for size in sizes),
    )


def _floats(*sizes: Any) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Sizes as floats, or as arrays where they are no single numbers, and the shape that they broadcast to."""
    if all(isinstance(size, int | float) for size in sizes):
        return tuple(map(float, sizes)), ()
    arrays = [np.asarray(size, float) for size in sizes]
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    return tuple(array if array.ndim else float(array) for array in arrays), shape


def _flat(column: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    return (column if column.shape == shape else np.broadcast_to(column, shape)).reshape(-1)


def _array_key(values: FloatArray) -> tuple[bytes, tuple[int, ...]]:
    """What stands for an array in a cache: its bytes, or their digest where there are many."""
    data = values.tobytes()
    if len(data) > _LONG_KEY:
        data = hashlib.sha1(data, usedforsecurity=False).digest()
    return data, values.shape


def _frozen(seconds: float | FloatArray, shape: tuple[int, ...] | None = None) -> float | FloatArray:
    """In the caller's shape; an array may be handed out many times, so nobody may write into it."""
    if isinstance(seconds, float):
        return seconds
    seconds = seconds if shape is None else seconds.reshape(shape)
    seconds.flags.writeable = False
    return seconds


def _keep(cache: dict[Any, Any], key: Any, value: Any, *, limit: int) -> None:
    """Remember; a full cache starts anew, which costs less than ordering every hit."""
    if len(cache) >= limit:
        cache.clear()
    cache[key] = value
