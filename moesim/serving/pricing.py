"""What kernels of serving take: those of training as they run in a row, small kernels, narrower weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import Gemm, GroupedGemm, Kernel, KernelModel, MemoryBound, compute_model, memory_bytes
from moesim.kernels.estimate import SOURCES
from moesim.kernels.tabulated import TabulatedModel
from moesim.scenario import BYTES_PER_ELEMENT
from moesim.serving.decode_kernels import (
    Fitted,
    attention_of,
    batched_seconds,
    facts,
    fitted_of,
    fused_experts_seconds,
    small_on,
)
from moesim.serving.memory import SCALES, WEIGHT_BYTES
from moesim.serving.schema import ServingScenario
from moesim.serving.software import LISTS, Lists, ServingSoftware, Small, serving_software

# Beyond what was measured in the L2, a small kernel takes what its kind takes in memory.
IN_MEMORY = {
    "rms_norm": "rms_norm", "add": "elementwise", "mul": "elementwise", "copy": "copy", "cast": "cast", "roll": "copy",
    "silu_mul": "activation", "gather": "permute", "sum_of_8": "unpermute", "softmax": "softmax", "topk": "topk",
    "sort": "sort", "cast_wide": "cast", "softmax_wide": "softmax", "argmax_wide": "reduce", "greedy": "reduce",
    "drawn": "softmax", "top_50": "softmax", "norm_in_eight": "rms_norm", "rotary_in_five": "elementwise",
}  # fmt: skip
LARGE = 4e6  # elements
LEAST_SHARE = 0.5  # of a GEMM launched alone that it takes in a row of kernels at least


class Pricing:
    """Seconds of kernels on a scenario's GPU under its software, with a note of the sources that they rest on."""

    def __init__(self, scenario: ServingScenario) -> None:
        self.load, self.gpu = scenario.workload, scenario.cluster.main_pool.spec
        self.software: ServingSoftware = serving_software()[scenario.engine.software]
        self.lists: Lists = LISTS[self.software.kernels]
        self.kernels: KernelModel = compute_model(self.gpu, scenario.compute)
        # Tables were measured in a row already; a profile's kernels were launched alone.
        self._gaps = dict.fromkeys(facts()["gap"], 0.0) if isinstance(self.kernels, TabulatedModel) else facts()["gap"]
        self._sources: set[str] = set()

    @property
    def rests_on(self) -> tuple[str, ...]:
        """Sources of kernel durations, the firmest first."""
        return tuple(source for source in SOURCES if source in self._sources)

    def note(self, sources: Iterable[str]) -> None:
        """Durations that were found before rest on these."""
        self._sources.update(sources)

    @contextmanager
    def noting(self) -> Iterator[set[str]]:
        """The sources of what is asked for meanwhile."""
        before, self._sources = self._sources, set()
        try:
            yield self._sources
        finally:
            before |= self._sources
            self._sources = before

    def seconds(self, kernel: Kernel) -> Any:
        """Of a kernel: a float, or an array in the shape of its sizes."""
        estimate = self.kernels.seconds(kernel)
        self._sources.add(estimate.source)
        gap = self._gaps["gemm"] if isinstance(kernel, Gemm) else self._gaps["grouped"]
        if isinstance(kernel, Gemm | GroupedGemm):
            return np.maximum(estimate.seconds - gap, LEAST_SHARE * np.asarray(estimate.seconds))
        return estimate.seconds

    def attention(self, kind: str) -> tuple[float, ...]:
        """Parameters of the attention of generated tokens, of a kind as `moesim.serving.decode_kernels` has them."""
        fitted: Fitted = attention_of(self.gpu, stack=self.software.stack, kind=kind)
        self._sources.add(fitted.source)
        return fitted.parameters

    def gemm(self, m: float, k: int, n: int, *, wide: bool = False) -> float:
        """Seconds of a GEMM whose weights are stored in workload.weights (bf16 where `wide`)."""
        if wide:
            return float(self.seconds(Gemm(m=m, k=k, n=n)))
        seconds = float(self.seconds(Gemm(m=m, k=k, n=n, dtype=self.load.gemm)))
        seconds -= self.spared(k * n, floor=seconds)
        return seconds + (self.small([Small("cast", m, k)]) if self.load.gemm == "fp8" else 0.0)

    def batched(self, batch: int, tokens: float, k: int, n: int) -> float:
        """Seconds of a GEMM for each of a batch: queries into latents, and outputs out of them, head by head."""
        fitted = fitted_of("batched", self.gpu, self.load.gemm, "bf16", rates={1: "memory", 2: "peak"})
        self._sources.add(fitted.source)
        size = BYTES_PER_ELEMENT[self.load.gemm]
        return float(batched_seconds(fitted.parameters, batch, tokens, k, n, size=size))

    def experts(self, rows_RE: NDArray[np.int64], *, hidden: int, width: int, matrices: int) -> NDArray[np.float64]:
        """Seconds [R] of the routed experts of every rank: of an engine's kernels, or of torch's two GEMMs."""
        if self.software.stack == "engines":
            kind = "int4" if self.load.weights == "int4" else self.load.gemm
            fitted = fitted_of("experts", self.gpu, kind, "bf16", rates={2: "memory", 3: "memory", 4: "peak"})
            self._sources.add(fitted.source)
            size = WEIGHT_BYTES[self.load.weights] + SCALES[self.load.weights]
            sizes = {"hidden": hidden, "width": width, "matrices": matrices}
            return fused_experts_seconds(fitted.parameters, fitted.entry["block"], rows_RE, size=size, **sizes)
        seconds_R = np.zeros(len(rows_RE))
        for k, n in ((hidden, (matrices - 1) * width), (width, hidden)):
            found_R = np.asarray(self.seconds(GroupedGemm(rows_per_expert=rows_RE, k=k, n=n, dtype=self.load.gemm)))
            active_R = np.count_nonzero(rows_RE, axis=1)
            spared_R = [self.spared(a * k * n, floor=s) for a, s in zip(active_R, found_R, strict=True)]
            seconds_R += found_R - np.array(spared_R)
        return seconds_R

    def spared(self, weights: float, *, floor: float) -> float:
        """Seconds that narrower weights spare the memory: at most 0.8 of a GEMM's, which still computes."""
        stored = WEIGHT_BYTES[self.load.weights] + SCALES[self.load.weights]
        spared = weights * (BYTES_PER_ELEMENT[self.load.gemm] - stored)
        return min(max(0.0, spared) / self.gpu.memory_bandwidth, 0.8 * floor)

    def small(self, kernels: Iterable[Small]) -> float:
        """Seconds of small kernels in a row."""
        return sum(self._small(kernel) for kernel in kernels)

    def _small(self, kernel: Small) -> float:
        kind, rows, width = kernel
        seconds = small_on(self.gpu, kind, rows, width)
        self._sources.add("scaled")
        if rows * width <= LARGE or kind not in IN_MEMORY:
            return seconds
        name = IN_MEMORY[kind]
        return max(seconds, float(self.seconds(MemoryBound(name, memory_bytes(name, rows=rows, width=width)))))
