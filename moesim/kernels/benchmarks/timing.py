"""What a call takes on a device: percentiles over groups of calls issued back to back, its rate and clock when it runs
without pause, and the names of the kernels that it launches."""

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from moesim.kernels.benchmarks.device import Sampler

_Event: Any = torch.cuda.Event  # untyped in torch
_sleep: Any = getattr(torch.cuda, "_sleep", None)
_PROBE_CYCLES = 400_000
Call = Callable[[int], object]  # the argument counts calls, so that operands can rotate


@dataclass(frozen=True)
class Timing:
    """Seconds per call: percentiles over `groups` groups of `inner` calls each."""

    p20: float
    p50: float
    p80: float
    groups: int
    inner: int
    clock_mhz: float | None = None  # of the device's processors, right before and after the measured calls

    def as_row(self) -> dict[str, Any]:
        """The fields of a profile row; nanosecond digits are noise."""
        seconds = {name: float(f"{getattr(self, name):.5g}") for name in ("p20", "p50", "p80")}
        row: dict[str, Any] = seconds | {"repeats": self.groups * self.inner}
        return row if self.clock_mhz is None else row | {"clock_mhz": round(self.clock_mhz)}


def summarise(seconds: list[float], inner: int, *, clock_mhz: float | None = None) -> Timing:
    """Percentiles of seconds per call."""
    p20, p50, p80 = np.percentile(np.asarray(seconds), [20, 50, 80])
    return Timing(float(p20), float(p50), float(p80), len(seconds), inner, clock_mhz)


class CpuTimer:
    """Wall-clock timing for a CPU; the clock is an argument so that tests can supply their own."""

    def __init__(self, *, target: float = 0.004, clock: Callable[[], float] = time.perf_counter) -> None:
        self._target, self._clock = target, clock
        self.started = 0.0

    def time(self, call: Call) -> Timing:
        """One warm-up call, then groups of calls for about the target time."""
        begin = self._clock()
        call(0)
        first = max(self._clock() - begin, 1e-7)
        inner = int(np.clip(self._target / 8 / first, 1, 200))
        return self.time_fixed(call, warm=1, groups=5, inner=inner)

    def time_fixed(self, call: Call, *, warm: int, groups: int, inner: int) -> Timing:
        """The given number of calls."""
        for index in range(warm):
            call(index)
        seconds = []
        for group in range(groups):
            begin = self._clock()
            for index in range(inner):
                call(warm + group * inner + index)
            seconds.append((self._clock() - begin) / inner)
        return summarise(seconds, inner)


class CudaTimer:
    """Event timing on a CUDA stream that never waits for the host.

    The stream is first held by a sleep kernel while the host issues everything, so that short kernels run back to back
    as they do inside a step whose host is ahead. Groups of calls are long enough (100 us) for the events' resolution;
    warm-up calls of the same kernel bring clocks and power to where sustained work has them. The clock is read from
    sleep kernels of a known number of cycles around the measured calls: under a power limit it moves within
    milliseconds, faster than the management library samples.
    """

    def __init__(self, *, target: float = 0.014, warm: float = 0.012) -> None:
        self._target, self._warm = target, warm
        self._cycles_per_second = self._measure_sleep()
        self.started = 0.0  # monotonic seconds at the beginning of the last measurement, for the clock sampler

    def _measure_sleep(self) -> float:
        _sleep(10_000_000)
        torch.cuda.synchronize()
        begin, end = _Event(enable_timing=True), _Event(enable_timing=True)
        begin.record()
        _sleep(100_000_000)
        end.record()
        torch.cuda.synchronize()
        return 100_000_000 / float(begin.elapsed_time(end) / 1e3)

    def sleep(self, seconds: float) -> None:
        """Hold the current stream for about this long."""
        _sleep(int(seconds * self._cycles_per_second))

    def _probe_clock(self, begin: Any, end: Any) -> None:
        begin.record()
        _sleep(_PROBE_CYCLES)
        end.record()

    def probe(self, call: Call) -> tuple[float, float]:
        """(seconds on the device, seconds on the host) of one call, roughly."""
        call(0)
        torch.cuda.synchronize()
        begin, end = _Event(enable_timing=True), _Event(enable_timing=True)
        self.sleep(1e-3)
        started = time.perf_counter()
        begin.record()
        for index in range(3):
            call(index)
        end.record()
        host = (time.perf_counter() - started) / 3
        torch.cuda.synchronize()
        return max(begin.elapsed_time(end) / 3e3, 1e-6), host

    def time(self, call: Call) -> Timing:
        """Adaptive counts: about `warm` seconds of warm-up and `target` seconds of measurement on the device."""
        device, host = self.probe(call)
        inner = int(np.clip(100e-6 / device, 1, 40))
        groups = int(np.clip(self._target / (inner * device), 5, 15))
        warm = int(np.clip(self._warm / device, 1, 60))
        ahead = max(0.0, host - device) * (warm + groups * inner) * 1.3 + 2e-4
        return self._run(call, warm=warm, groups=groups, inner=inner, ahead=min(ahead, 0.05))

    def time_fixed(self, call: Call, *, warm: int, groups: int, inner: int) -> Timing:
        """The given number of calls, issued behind a sleep long enough for the slowest host (150 us a call)."""
        call(0)
        return self._run(call, warm=warm, groups=groups, inner=inner, ahead=150e-6 * (warm + groups * inner))

    def _run(self, call: Call, *, warm: int, groups: int, inner: int, ahead: float) -> Timing:
        events = [_Event(enable_timing=True) for _ in range(groups + 1)]
        probes = [_Event(enable_timing=True) for _ in range(4)]
        self.started = time.monotonic()
        torch.cuda.synchronize()
        gc.disable()
        try:
            self.sleep(ahead)
            for index in range(warm):
                call(index)
            self._probe_clock(probes[0], probes[1])
            events[0].record()
            for group in range(groups):
                for index in range(inner):
                    call(warm + group * inner + index)
                events[group + 1].record()
            self._probe_clock(probes[2], probes[3])
            torch.cuda.synchronize()
        finally:
            gc.enable()
        spans = [a.elapsed_time(b) / 1e3 / inner for a, b in pairwise(events)]
        asleep = probes[0].elapsed_time(probes[1]) + probes[2].elapsed_time(probes[3])
        return summarise(spans, inner, clock_mhz=2 * _PROBE_CYCLES / (asleep * 1e3))


WARM = MEASURED = 0.15  # seconds; the clock settles within a tenth of a second


def measure_sustained(call: Call, *, flops: float, probe: Callable[[Call], float], sampler: Sampler) -> dict[str, Any]:
    """What the law of `moesim.kernels.power` is fitted to, for a short benchmark ends before the power limit acts.

    The kernel runs alone for `WARM` seconds, then for `MEASURED` seconds more, over which its rate is taken and the SM
    clock is sampled through NVML. Returns p50 (s per call), flops_per_second, repeats, mean clock_mhz and watts.

    `probe` gives the seconds of one call, roughly. Raises RuntimeError where no clock can be read.
    """
    seconds = probe(call)
    _issued(call, math.ceil(WARM / seconds))
    begin, count = time.monotonic(), math.ceil(MEASURED / seconds)
    per_call = _issued(call, count) / count
    facts = sampler.since(begin)
    if "clock_mhz" not in facts:
        raise RuntimeError("no SM clock: NVML (package nvidia-ml-py) is not there")
    return {
        "p50": float(f"{per_call:.5g}"),
        "repeats": count,
        "flops_per_second": float(f"{flops / per_call:.5g}"),
        **facts,
    }


def _issued(call: Call, count: int) -> float:
    """Seconds that the device takes for `count` calls, issued as fast as the host can."""
    begin, end = _Event(enable_timing=True), _Event(enable_timing=True)
    begin.record()
    for index in range(count):
        call(index)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


_MARKER_SIZE = 3


def kernel_names(calls: list[Call]) -> list[list[str]]:
    """Per call the kernels between it and the next, as the device ran them; empty lists when they cannot be told apart.

    A cosine of three numbers marks the border between two calls in the stream.
    """
    marker = torch.ones(_MARKER_SIZE, device="cuda", dtype=torch.float64)
    for call in calls:
        call(0)
    marker.cos()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as traced:
        marker.cos()
        for call in calls:
            call(0)
            marker.cos()
        torch.cuda.synchronize()
    found = _split(traced.events())
    return found if len(found) == len(calls) else [[] for _ in calls]


def _split(events: Any) -> list[list[str]]:
    kernels = sorted((event.time_range.start, event.name) for event in events if event.device_type.name == "CUDA")
    groups: list[list[str]] = []
    for _, name in kernels:
        if "cos_kernel" in name:
            groups.append([])
        elif groups and not name.startswith(("Memcpy", "Memset")):
            groups[-1].append(name)
    return groups[:-1]
