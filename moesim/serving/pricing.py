"""What one kernel of serving takes: the kernels of training, with weights that are stored in fewer bits."""

from typing import Any

from moesim.kernels import Gemm, Kernel, KernelModel, MemoryBound, kernel_model, memory_bytes
from moesim.kernels.estimate import SOURCES
from moesim.scenario import BYTES_PER_ELEMENT
from moesim.serving.memory import SCALES, WEIGHT_BYTES
from moesim.serving.schema import ServingScenario


class Pricing:
    """Seconds of kernels on a scenario's GPU, with a note of the sources that they rest on."""

    def __init__(self, scenario: ServingScenario) -> None:
        self.load, self.gpu = scenario.workload, scenario.cluster.pools[0].spec
        self.kernels: KernelModel = kernel_model(self.gpu, scenario.compute.profile)
        self._sources: set[str] = set()

    @property
    def rests_on(self) -> tuple[str, ...]:
        """Sources of kernel durations, the firmest first."""
        return tuple(source for source in SOURCES if source in self._sources)

    def seconds(self, kernel: Kernel) -> Any:
        """Of a kernel: a float, or an array in the shape of its sizes."""
        estimate = self.kernels.seconds(kernel)
        self._sources.add(estimate.source)
        return estimate.seconds

    def gemm(self, m: float, k: int, n: int, *, wide: bool = False) -> float:
        """Seconds of a product whose weights are stored in workload.weights (bf16 where `wide`)."""
        if wide:
            return float(self.seconds(Gemm(m=m, k=k, n=n)))
        seconds = float(self.seconds(Gemm(m=m, k=k, n=n, dtype=self.load.gemm)))
        return seconds - self.spared(k * n, floor=seconds)

    def spared(self, weights: float, *, floor: float) -> float:
        """Seconds that narrower weights spare the memory: at most 0.8 of a product's, which still computes."""
        stored = WEIGHT_BYTES[self.load.weights] + SCALES[self.load.weights]
        spared = weights * (BYTES_PER_ELEMENT[self.load.gemm] - stored)
        return min(max(0.0, spared) / self.gpu.memory_bandwidth, 0.8 * floor)

    def moved(self, kind: str, rows: float, width: float) -> float:
        """Seconds of a memory-bound kernel."""
        return float(self.seconds(MemoryBound(kind, memory_bytes(kind, rows=rows, width=width))))
