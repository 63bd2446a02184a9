"""KernelWriter: from a kernel's sizes to an operation with its duration and the source of that duration."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.kernels import Attention, Gemm, GroupedGemm, KernelModel, MemoryBound, memory_bytes
from moesim.kernels.families import AttentionDirection, GemmDirection
from moesim.program.operations import MAIN, Operation, compute

FloatArray = NDArray[np.float64]

TILE_ROWS = 256  # rows that grouped products round up to at most: two tiles of 128
FEWEST_ENDS = 8  # remainders of a tile whose mean is taken


def _ends_in_a_tile(slots: int) -> FloatArray:
    """[X, P]: evenly spaced in (-1/2, 1/2), at least eight in all, in each X as far apart as can be."""
    times = -(-FEWEST_ENDS // slots)
    return ((np.arange(slots * times) + 0.5) / (slots * times) - 0.5).reshape(slots, times).T


class KernelWriter:
    """Writes operations of one category and layer with the durations of one kernel model.

    `dtype` is that of the large matrix products. In the samples of `spread_S`, the counterfactuals
    without imbalance, every rank takes the mean of its rank group for a kernel whose duration follows what was routed
    to it, and less where experts with equal rows would take less (`_even_experts`).
    """

    def __init__(
        self,
        model: KernelModel,
        *,
        dtype: str,
        category: str,
        layer: int,
        chain: int = MAIN,
        spread_S: Sequence[bool] = (),
    ) -> None:
        self.model = model
        self.dtype = dtype
        self.category = category
        self.layer = layer
        self.chain = chain
        self.spread_S = np.array(spread_S, dtype=bool)

    @property
    def wide_dtype(self) -> str:
        """Of head, router gate and attention, which stay in bf16 where the large products are in fp8."""
        return "bf16" if self.dtype == "fp8" else self.dtype

    def part(self, category: str, *, chain: int = MAIN) -> "KernelWriter":
        """A writer of the same layer for another category."""
        return KernelWriter(
            self.model,
            dtype=self.dtype,
            category=category,
            layer=self.layer,
            chain=chain,
            spread_S=self.spread_S.tolist(),
        )

    def _operation(self, name: str, seconds: float | FloatArray, source: str, launches: int) -> Operation:
        return compute(
            name,
            self.category,
            self._spread(seconds),
            layer=self.layer,
            source=source,
            chain=self.chain,
            launches=launches,
        )

    def _spread(self, seconds: float | FloatArray) -> float | FloatArray:
        """Seconds of all ranks, or [M, S, R], with those of counterfactual samples spread evenly over the ranks."""
        if not self.spread_S.any() or not isinstance(seconds, np.ndarray) or seconds.ndim < 3:
            return seconds
        spread_MSR = seconds.copy()
        spread_MSR[:, self.spread_S] = seconds[:, self.spread_S].mean(axis=2, keepdims=True)
        return spread_MSR

    def gemm(
        self, name: str, *, m: int, k: int, n: int, dtype: str | None = None, direction: GemmDirection = "forward"
    ) -> Operation:
        """Y[m, n] = X[m, k] W[k, n], or one of its gradients."""
        estimate = self.model.seconds(Gemm(m=m, k=k, n=n, dtype=dtype or self.dtype, direction=direction))
        return self._operation(name, estimate.seconds, estimate.source, 1)

    def gemm_backward(self, name: str, *, m: int, k: int, n: int, dtype: str | None = None) -> list[Operation]:
        """The gradients of `gemm`, dX[m, k] = dY W^T and dW[k, n] = X^T dY, priced by the rows measured of each."""
        return [
            self.gemm(f"{name}.dgrad", m=m, k=k, n=n, dtype=dtype, direction="dgrad"),
            self.gemm(f"{name}.wgrad", m=m, k=k, n=n, dtype=dtype, direction="wgrad"),
        ]

    def grouped_gemm(
        self, name: str, *, rows: NDArray[np.int64], k: int, n: int, direction: GemmDirection = "forward"
    ) -> Operation:
        """One launch over the local experts; rows [..., slots], seconds [...]."""
        kernel = GroupedGemm(rows_per_expert=rows, k=k, n=n, dtype=self.dtype, direction=direction)
        estimate = self.model.seconds(kernel)
        operation = self._operation(name, estimate.seconds, estimate.source, 1)
        if not self.spread_S.any():
            return operation
        return replace(operation, seconds_MSR=self._even_experts(operation, kernel, rows=rows))

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
        estimate = self.model.seconds(kernel)
        return self._operation(name, estimate.seconds, estimate.source, 1)

    def memory(self, name: str, kind: str, *, rows: ArrayLike, width: ArrayLike = 1, launches: int = 1) -> Operation:
        """A memory-bound kernel over `rows` rows of `width` elements."""
        return self.moved(name, kind, bytes_=memory_bytes(kind, rows=rows, width=width), launches=launches)

    def moved(self, name: str, kind: str, *, bytes_: ArrayLike, launches: int = 1) -> Operation:
        """A memory-bound kernel that reads and writes `bytes_` at the efficiency of `kind`."""
        estimate = self.model.seconds(MemoryBound(kind, bytes_))
        return self._operation(name, estimate.seconds, estimate.source, launches)
