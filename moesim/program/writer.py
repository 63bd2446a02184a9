"""KernelWriter: from a kernel's sizes to an operation with its duration and the source of that duration.

Behind it single kernels of eager PyTorch, forward and backward, with what they cost the host.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.kernels import Attention, Gemm, GroupedGemm, Kernel, KernelModel, MemoryBound, memory_bytes
from moesim.kernels.families import FAMILY_OF, AttentionDirection, GemmDirection, error_family
from moesim.program.host import backward, forward
from moesim.program.operations import MAIN, Operation, compute
from moesim.program.sizes import Passes
from moesim.results.spans import CATEGORY_OF_PART, Label, Part, Phase, Stream
from moesim.scenario.software import RECIPE_OF_KERNELS, Recipe

FloatArray = NDArray[np.float64]

BF16, FP32, INT64 = 2, 4, 8  # bytes
SMALL = 4096.0  # bytes of a kernel on a few numbers: it takes the floor

GEMM_PHASES: dict[GemmDirection, tuple[Phase, str]] = {  # and how names end
    "forward": (Phase.FORWARD, ""),
    "dgrad": (Phase.INPUT_GRADIENT, ".dgrad"),
    "wgrad": (Phase.WEIGHT_GRADIENT, ".wgrad"),
}
TILE_ROWS = 256  # rows that grouped GEMMs round up to at most: two tiles of 128
FEWEST_ENDS = 8  # remainders of a tile whose mean is taken


def _ends_in_a_tile(slots: int) -> FloatArray:
    """[X, P]: evenly spaced in (-1/2, 1/2), at least eight in all, in each X as far apart as can be."""
    times = -(-FEWEST_ENDS // slots)
    return ((np.arange(slots * times) + 0.5) / (slots * times) - 0.5).reshape(slots, times).T


class KernelWriter:
    """Writes operations of one part and layer with the durations of one kernel model.

    Names end with what the kernel is in the backward pass. `dtype` is what kernel models call the large GEMMs' format.
    In the samples of `spread_S`, the counterfactuals without imbalance, every rank takes the mean of its rank group for
    a kernel whose duration follows what was routed to it, and less where experts with equal rows would take less
    (`_even_experts`).
    """

    def __init__(
        self, model: KernelModel, *, dtype: str, part: Part, layer: int = -1, spread_S: Sequence[bool] = ()
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.part = part
        self.category = CATEGORY_OF_PART[part]
        self.phase = Phase.FORWARD
        self.layer = layer
        self.chain = MAIN
        self.again: tuple[str, ...] = ()
        self.spread_S = np.array(spread_S, dtype=bool)

    def _with(self, **changes: object) -> "KernelWriter":
        other = copy(self)
        vars(other).update(changes)
        return other

    def at(self, part: Part, *, chain: int | None = None) -> "KernelWriter":
        """A writer of the same layer for another part, whose time counts to the surrounding one if it has no own."""
        category = CATEGORY_OF_PART.get(part, self.category)
        return self._with(part=part, category=category, chain=self.chain if chain is None else chain)

    def during(self, phase: Phase) -> "KernelWriter":
        """A writer of the same part for another phase."""
        return self._with(phase=phase)

    @property
    def backward(self) -> "KernelWriter":
        """Of gradients with respect to inputs."""
        return self.during(Phase.INPUT_GRADIENT)

    def repeated_by(self, word: str) -> "KernelWriter":
        """A writer of kernels that this word of workload.recompute repeats in the backward pass."""
        return self._with(again=(*self.again, word))

    def label(self, name: str) -> Label:
        """The label of a kernel."""
        name += ".backward" if self.phase is Phase.INPUT_GRADIENT else ""
        return Label(name, self.category, Stream.COMPUTE, self.layer, phase=self.phase, part=self.part)

    @property
    def wide_dtype(self) -> str:
        """Of head, router gate and attention, which stay in bf16 where the large GEMMs are in fp8 or fp4."""
        return "bf16" if self.recipe else self.dtype

    @property
    def recipe(self) -> Recipe | None:
        """How the large GEMMs are scaled; None for GEMMs of two bytes and more."""
        return RECIPE_OF_KERNELS.get(self.dtype)

    def _operation(self, label: Label, kernel: Kernel, launches: float = 1) -> Operation:
        estimate = self.model.seconds(kernel)
        return compute(
            label,
            self._spread(estimate.seconds),
            source=estimate.source,
            chain=self.chain,
            launches=launches,
            again=self.again,
            family=FAMILY_OF[type(kernel)],
            error_family=error_family(kernel),
        )

    def _spread(self, seconds: float | FloatArray) -> float | FloatArray:
        """Seconds of all ranks, or [M, S, R], with those of counterfactual samples spread evenly over the ranks."""
        if not self.spread_S.any() or not isinstance(seconds, np.ndarray) or seconds.ndim < 3:
            return seconds
        spread_MSR = seconds.copy()
        spread_MSR[:, self.spread_S] = seconds[:, self.spread_S].mean(axis=2, keepdims=True)
        return spread_MSR

    def gemm(
        self,
        name: str,
        launches: float = 1,
        *,
        m: int,
        k: int,
        n: int,
        dtype: str | None = None,
        direction: GemmDirection = "forward",
    ) -> Operation:
        """Y[m, n] = X[m, k] W[k, n], or a gradient: dX[m, k] = dY W^T (dgrad), dW[k, n] = X^T dY (wgrad)."""
        kernel = Gemm(m=m, k=k, n=n, dtype=dtype or self.dtype, direction=direction)
        return self._operation(self._gemm_label(name, direction), kernel, launches)

    def _gemm_label(self, name: str, direction: GemmDirection) -> Label:
        phase, ending = GEMM_PHASES[direction]
        return self.label(name)._replace(name=name + ending, phase=phase)

    def grouped_gemm(
        self,
        name: str,
        launches: float = 1,
        *,
        rows: NDArray[np.int64],
        k: int,
        n: int,
        direction: GemmDirection = "forward",
    ) -> Operation:
        """One launch over the local experts; rows [..., slots], seconds [...]."""
        kernel = GroupedGemm(rows_per_expert=rows, k=k, n=n, dtype=self.dtype, direction=direction)
        operation = self._operation(self._gemm_label(name, direction), kernel, launches)
        if not self.spread_S.any():
            return operation
        return replace(operation, seconds_MSR=self._even_experts(operation, kernel, rows=rows))

    def gemm_of_each(
        self,
        name: str,
        launches: float = 1,
        *,
        rows: NDArray[np.int64],
        k: int,
        n: int,
        direction: GemmDirection = "forward",
    ) -> Operation:
        """One GEMM for each local expert, behind each other; rows [..., slots], seconds [...]."""
        kernel = Gemm(m=np.maximum(rows, 1), k=k, n=n, dtype=self.dtype, direction=direction)
        estimate = self.model.seconds(kernel)
        seconds = (np.asarray(estimate.seconds) * (rows > 0)).sum(-1)
        operation = self._operation(self._gemm_label(name, direction), kernel, launches)
        return replace(operation, seconds_MSR=np.asarray(self._spread(seconds)))

    def _even_experts(self, operation: Operation, kernel: GroupedGemm, *, rows: NDArray[np.int64]) -> FloatArray:
        """Seconds [M, S, R] where counterfactual samples take no longer than experts with equal rows.

        Kernels compute whole tiles, so that equal rows just above a multiple of a tile cost much more than uneven ones,
        and just at it much less. Neither is due to balance: the dearer counts of exactly equal rows, and of rows that
        end anywhere in a tile.
        """
        assert operation.seconds_MSR is not None
        slots = rows.shape[-1]
        mean_MSRP = rows[:, self.spread_S].mean(axis=(2, 3), keepdims=True).repeat(slots, axis=3)
        width_MSRP = np.minimum(TILE_ROWS, 2 * mean_MSRP)
        exact, *anywhere = (
            np.asarray(self.model.seconds(replace(kernel, rows_per_expert=even)).seconds)
            for even in (mean_MSRP, *(mean_MSRP + ends_P * width_MSRP for ends_P in _ends_in_a_tile(slots)))
        )
        seconds_MSR = operation.seconds_MSR.copy()
        seconds_MSR[:, self.spread_S] = np.minimum(
            seconds_MSR[:, self.spread_S], np.maximum(exact, np.mean(anywhere, axis=0))
        )
        return seconds_MSR

    def attention(
        self,
        name: str,
        launches: float = 1,
        *,
        batch: float,
        sequence: float,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        causal: bool = True,
        direction: AttentionDirection = "forward",
    ) -> Operation:
        """Fused attention."""
        kernel = Attention(
            batch=batch,
            sequence=sequence,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            causal=causal,
            dtype=self.wide_dtype,
            direction=direction,
        )
        writer = self.backward if direction == "backward" else self
        return writer._operation(writer.label(name), kernel, launches)

    def memory(self, name: str, kind: str, launches: float = 1, *, rows: ArrayLike, width: ArrayLike = 1) -> Operation:
        """A memory-bound kernel over `rows` rows of `width` elements."""
        return self.moved(name, kind, launches, bytes_=memory_bytes(kind, rows=rows, width=width))

    def moved(self, name: str, kind: str, launches: float = 1, *, bytes_: ArrayLike) -> Operation:
        """A memory-bound kernel that reads and writes `bytes_` at the efficiency of `kind`."""
        return self._operation(self.label(name), MemoryBound(kind, bytes_), launches)

    def small(self, name: str, launches: float, *, count: int = 1) -> Operation:
        """`count` kernels on a few numbers, one behind the other."""
        estimate = self.model.seconds(MemoryBound("elementwise", SMALL))
        seconds = np.asarray(estimate.seconds) * count
        return compute(self.label(name), seconds, source=estimate.source, chain=self.chain, launches=launches)


def accumulated(w: KernelWriter, name: str, tokens: int, width: int) -> Passes:
    """Backward only: a second gradient of bf16 activations is added to the first."""
    bytes_ = 3.0 * BF16 * tokens * width
    return [], [w.backward.moved(name, "elementwise", backward("accumulate"), bytes_=bytes_)]


def reordered(w: KernelWriter, name: str, launches: float, *, numbers: float) -> Operation:
    """A strided copy of bf16 numbers: unvectorised, as fast as the row scaling of kind `mul`."""
    return w.moved(name, "mul", launches, bytes_=2.0 * BF16 * numbers)


def copied(w: KernelWriter, name: str, numbers: float, *, both: bool = True) -> Passes:
    """A copy into another order; backward either copies too or only looks at the gradient differently."""
    back = [reordered(w.backward, name, backward("cat"), numbers=numbers)] if both else []
    return [reordered(w, name, forward("cat", "view"), numbers=numbers)], back
