"""What a duration is: seconds with the source it rests on, and the interface of everything that gives durations."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from moesim.kernels.families import FloatArray, Kernel

SOURCES = ("measured", "interpolated", "scaled", "extrapolated", "roofline")  # from the firmest to the weakest
_FIRMNESS = {source: index for index, source in enumerate(SOURCES)}


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


class Beside(NamedTuple):
    """What a kernel and a transfer cost each other while both run.

    compute, transfer: factors >= 1 on their durations. wait: seconds until the kernel's blocks have left the transfer
    its SMs; neither slows the other before.
    """

    compute: float
    transfer: float = 1.0
    wait: float = 0.0


@dataclass(frozen=True)
class Contention:
    """How much kernels of each family and transfers slow each other; `other` holds for families that are not there."""

    by_family: Mapping[str, Beside]
    other: Beside
    source: str

    def of(self, family: str) -> Beside:
        """That of a family of kernels."""
        return self.by_family.get(family, self.other)


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
    """How long kernels take on one GPU."""

    @property
    def name(self) -> str:
        """The GPU (and profile) that this model describes."""

    @property
    def host(self) -> HostCosts:
        """What an operation costs the host."""

    @property
    def contention(self) -> Contention:
        """Mutual slow-down of kernels and transfers that overlap."""

    def at_load(self, flops_per_second: float) -> "KernelModel":
        """The kernels of a step of this mean load, all at one clock; itself without a power limit."""

    def power_share(self, dtype: str) -> float:
        """Of the power of a bf16 FLOP, that of one in products of this dtype."""

    def seconds(self, kernel: Kernel) -> Estimate:
        """Seconds of a kernel, in the shape of its sizes; UserError where the GPU has no units for its dtype."""
