"""The clock and rate of kernels that run without pause: what the law of `moesim.kernels.power` is fitted to.

A short benchmark ends before the power limit acts. Here one kernel runs alone for `WARM` seconds, then for `MEASURED`
seconds more, over which its rate is taken and the SM clock is sampled through NVML.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from moesim.kernels.benchmarks.device import Sampler
from moesim.kernels.benchmarks.timing import Call

WARM = MEASURED = 0.15  # seconds; the clock settles within a tenth of a second


def measure_sustained(call: Call, *, flops: float, probe: Callable[[Call], float], sampler: Sampler) -> dict[str, Any]:
    """p50 (s per call), flops_per_second, repeats, and mean clock_mhz and watts over the measured seconds.

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
    make_event: Any = torch.cuda.Event
    begin, end = make_event(enable_timing=True), make_event(enable_timing=True)
    begin.record()
    for index in range(count):
        call(index)
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
