"""What a duration is: seconds with the source it rests on, and the interface of everything that gives durations.

Legend: R ranks, E local experts.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
GemmDirection = Literal["forward", "dgrad", "wgrad"]
AttentionDirection = Literal["forward", "backward"]

SOURCES = ("measured", "interpolated", "scaled", "extrapolated", "roofline")  # from the firmest to the weakest
_FIRMNESS = {source: index for index, source in enumerate(SOURCES)}
DTYPE_BYTES = {"fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0}


class Estimate(NamedTuple):
    """Seconds (a float, or one per rank) and what they rest on; a vector carries the weakest source among its parts."""

    seconds: float | FloatArray
    source: str


def weakest(*sources: str) -> str:
    """The least firm of `sources`, in the order of SOURCES."""
    return max(sources, key=_FIRMNESS.__getitem__)


def total(*estimates: Estimate) -> Estimate:
    """The sum of durations with the weakest source among them."""
    seconds = sum((part.seconds for part in estimates), start=0.0)
    return Estimate(seconds, weakest(*(part.source for part in estimates)))


def as_result(values: FloatArray) -> float | FloatArray:
    """A float for a 0-d array, else the array: scalars in, scalars out."""
    return float(values) if values.ndim == 0 else values


@dataclass(frozen=True)
class Contention:
    """How much a compute kernel and a transfer slow each other while both run, as factors >= 1 on their durations."""

    compute: float
    transfer: float
    source: str


@dataclass(frozen=True)
class HostCosts:
    """Seconds that the host needs, per operation of eager PyTorch.

    launch: one forward operation (dispatch, autograd bookkeeping, launch); backward_launch: one autograd node;
    readback: a synchronising copy to the host beyond waiting for the device; kernel_floor: the shortest kernel on the
    device, launch gap included.
    """

    launch: float
    backward_launch: float
    readback: float
    kernel_floor: float
    source: str


class KernelModel(Protocol):
    """How long kernels take on one GPU. Sizes may be arrays (one value per rank): seconds then have their shape."""

    @property
    def name(self) -> str:
        """The GPU (and profile) that this model describes."""

    @property
    def launch_seconds(self) -> float:
        """Host time of one eager forward operation."""

    @property
    def backward_launch_seconds(self) -> float:
        """Host time of one operation in the backward pass."""

    @property
    def readback_seconds(self) -> float:
        """Host time of a synchronising read-back, on top of waiting for the device."""

    @property
    def kernel_floor_seconds(self) -> float:
        """The shortest time a kernel occupies its stream."""

    @property
    def contention(self) -> Contention:
        """Mutual slow-down of a compute kernel and a transfer that overlap."""

    def at_load(self, flops_per_second: float) -> "KernelModel":
        """The kernels of a step of this mean load, all at one clock; itself without a power limit."""

    def gemm(
        self, *, m: ArrayLike, k: ArrayLike, n: ArrayLike, dtype: str = "bf16", direction: GemmDirection = "forward"
    ) -> Estimate:
        """Out[m, n] = A[m, k] @ B[k, n], or a gradient of it (m, k, n stay those of the forward); 2 m k n FLOPs."""

    def grouped_gemm(
        self, *, rows_per_expert: ArrayLike, k: int, n: int, dtype: str = "bf16", direction: GemmDirection = "forward"
    ) -> Estimate:
        """One launch over all local experts; rows_per_expert is [E] or [R, E].

        Weights are [E, k, n] in every direction: forward Y[r, n] = X[r, k] W, dgrad dX = dY W^T, wgrad dW = X^T dY.
        """

    def attention(
        self,
        *,
        batch: ArrayLike,
        sequence: ArrayLike,
        heads: int,
        kv_heads: int,
        head_dim: int,
        value_dim: int,
        causal: bool = True,
        dtype: str = "bf16",
        direction: AttentionDirection = "forward",
    ) -> Estimate:
        """Fused attention of `heads` query heads; head_dim is that of queries and keys, value_dim that of values."""

    def memory_bound(self, *, kind: str, bytes: ArrayLike) -> Estimate:
        """A kernel limited by memory; bytes read plus written, as `moesim.kernels.memory_kinds` counts them."""
