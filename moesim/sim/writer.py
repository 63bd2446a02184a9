"""KernelWriter: from a kernel's sizes to an operation with its duration and the source of that duration."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.compute import KernelModel
from moesim.compute.estimate import AttentionDirection, GemmDirection
from moesim.compute.memory_kinds import memory_bytes
from moesim.sim.operations import MAIN, Operation, compute

FloatArray = NDArray[np.float64]


class KernelWriter:
    """Writes operations of one category and layer with the durations of one kernel model.

    `dtype` is that of the large matrix products; others name theirs.
    """

    def __init__(self, model: KernelModel, *, dtype: str, category: str, layer: int, chain: int = MAIN) -> None:
        self.model = model
        self.dtype = dtype
        self.category = category
        self.layer = layer
        self.chain = chain

    def part(self, category: str, *, chain: int = MAIN) -> "KernelWriter":
        """A writer of the same layer for another category."""
        return KernelWriter(self.model, dtype=self.dtype, category=category, layer=self.layer, chain=chain)

    def _operation(self, name: str, seconds: float | FloatArray, source: str, launches: int) -> Operation:
        return compute(
            name,
            self.category,
            seconds,
            layer=self.layer,
            source=source,
            chain=self.chain,
            launches=launches,
        )

    def gemm(self, name: str, *, m: int, k: int, n: int, dtype: str | None = None) -> Operation:
        """Y[m, n] = X[m, k] W[k, n]."""
        estimate = self.model.gemm(m=m, k=k, n=n, dtype=dtype or self.dtype)
        return self._operation(name, estimate.seconds, estimate.source, 1)

    def gemm_backward(self, name: str, *, m: int, k: int, n: int, dtype: str | None = None) -> list[Operation]:
        """The gradients of `gemm`: dX[m, k] = dY W^T, and dW[k, n] = X^T dY."""
        return [
            self.gemm(f"{name}.dgrad", m=m, k=n, n=k, dtype=dtype),
            self.gemm(f"{name}.wgrad", m=k, k=m, n=n, dtype=dtype),
        ]

    def grouped_gemm(
        self, name: str, *, rows: NDArray[np.int64], k: int, n: int, direction: GemmDirection = "forward"
    ) -> Operation:
        """One launch over the local experts; rows [..., slots], seconds [...]."""
        estimate = self.model.grouped_gemm(rows_per_expert=rows, k=k, n=n, dtype=self.dtype, direction=direction)
        return self._operation(name, estimate.seconds, estimate.source, 1)

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
        """Fused attention in bf16."""
        estimate = self.model.attention(
            batch=batch,
            sequence=sequence,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            value_dim=value_dim,
            causal=causal,
            direction=direction,
        )
        return self._operation(name, estimate.seconds, estimate.source, 1)

    def memory(self, name: str, kind: str, *, rows: ArrayLike, width: ArrayLike = 1, launches: int = 1) -> Operation:
        """A memory-bound kernel over `rows` rows of `width` elements."""
        return self.moved(name, kind, bytes_=memory_bytes(kind, rows=rows, width=width), launches=launches)

    def moved(self, name: str, kind: str, *, bytes_: ArrayLike, launches: int = 1) -> Operation:
        """A memory-bound kernel that reads and writes `bytes_` at the efficiency of `kind`."""
        estimate = self.model.memory_bound(kind=kind, bytes=bytes_)
        return self._operation(name, estimate.seconds, estimate.source, launches)
