"""The roofline: max(FLOPs / reachable peak, bytes / reachable bandwidth), and never less than a launch.

The reachable shares are plain constants, set once for all GPUs: a large GEMM on Hopper reaches about 80 % of
the datasheet peak and a large copy about 90 % of the datasheet bandwidth; fused attention reaches less. They are a
first approximation by intent; a calibrated profile replaces them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moesim.errors import UserError
from moesim.kernels.estimate import Beside, Contention, Estimate, HostCosts, as_result
from moesim.kernels.families import Attention, Gemm, GroupedGemm, Kernel, MemoryBound, peak_format
from moesim.kernels.jitter import NO_JITTER

GEMM_SHARE = 0.80  # of the dense peak
GROUPED_GEMM_SHARE = 0.70
ATTENTION_SHARE = {"forward": 0.60, "backward": 0.45}
MEMORY_SHARE = 0.85  # of the datasheet bandwidth
HOST = HostCosts(launch=6e-6, backward_launch=9e-6, readback=15e-6, kernel_floor=3e-6, source="roofline")
# A collective that keeps 16 of 132 SMs busy leaves 88 % of them to the kernel beside it.
CONTENTION = Contention(by_family={}, other=Beside(compute=1.14), source="roofline")


class GpuRates(Protocol):
    """What the roofline reads of a GPU's catalogue entry."""

    @property
    def name(self) -> str: ...
    @property
    def peak_flops(self) -> Mapping[str, float]: ...
    @property
    def memory_bandwidth(self) -> float: ...
    @property
    def sm_count(self) -> int: ...
    @property
    def clock_hz(self) -> float: ...


@dataclass(frozen=True)
class Rates:
    """Those of no entry of the catalogue: of a device that it does not know, or of another share of a GPU's peaks."""

    name: str
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    sm_count: int = 1
    clock_hz: float = 1.0


class Roofline:
    """Durations from the datasheet of one GPU; every source is "roofline"."""

    def __init__(self, gpu: GpuRates) -> None:
        self.gpu = gpu
        self.host, self.contention, self.jitter = HOST, CONTENTION, NO_JITTER

    @property
    def name(self) -> str:
        """The GPU's catalogue name."""
        return self.gpu.name

    def power_share(self, dtype: str) -> float:
        """All alike: a datasheet knows no power limit."""
        del dtype
        return 1.0

    def at_load(self, flops_per_second: float) -> "Roofline":
        """Itself: a datasheet knows no power limit."""
        del flops_per_second
        return self

    def seconds(self, kernel: Kernel) -> Estimate:
        """What bounds the kernel: its FLOPs, its bytes or a launch; no difference between memory-bound kinds.

        Raises UserError when the GPU has no matrix units for its dtype.
        """
        rate = 1.0 if isinstance(kernel, MemoryBound) else self._peak(kernel.dtype) * _share_of_peak(kernel)
        memory = self.gpu.memory_bandwidth * MEMORY_SHARE
        busy = np.maximum(kernel.flops / rate, kernel.moved_bytes / memory)
        return Estimate(as_result(np.maximum(busy, HOST.kernel_floor)), "roofline")

    def _peak(self, dtype: str) -> float:
        dtype = peak_format(dtype)
        if dtype not in self.gpu.peak_flops:
            known = ", ".join(sorted(self.gpu.peak_flops))
            raise UserError(f"{self.gpu.name} has no {dtype} matrix units; use one of: {known}")
        return self.gpu.peak_flops[dtype]


def _share_of_peak(kernel: Gemm | GroupedGemm | Attention) -> float:
    match kernel:
        case Gemm():
            return GEMM_SHARE
        case GroupedGemm():
            return GROUPED_GEMM_SHARE
        case Attention():
            return ATTENTION_SHARE[kernel.direction]
