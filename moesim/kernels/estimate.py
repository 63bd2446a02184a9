"""What a duration is: seconds with the source it rests on, and the interface of everything that gives durations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from moesim.kernels.families import FloatArray, Kernel
from moesim.kernels.jitter import Jitter

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


MOST_WAIT = 1.5  # times what a collective takes alone: of those of 64 KiB to 8 MiB beside GEMMs on two H100s, one half


class Beside(NamedTuple):
    """What a kernel and a transfer cost each other while both run.

    compute, transfer: factors >= 1 on their durations. wait: seconds until the kernel's blocks have left the transfer
    its SMs; neither slows the other before.
    """

    compute: float
    transfer: float = 1.0
    wait: float = 0.0


class BesideSend(NamedTuple):
    """What a kernel and a message from GPU to GPU cost each other while both run.

    compute: factor >= 1 on the kernel. The message gets its SMs one by one as the kernel leaves them, and is later by a
    share of the kernel's duration, but not by more than `most` times what it takes alone.
    """

    compute: float
    share: float
    most: float

    def later(self, alone: Any, *, kernel: Any) -> FloatArray:
        """Seconds that a message of `alone` seconds loses beside kernels of `kernel` seconds each."""
        by_kernel, by_message = self.share * np.asarray(kernel, float), self.most * np.asarray(alone, float)
        return np.asarray(by_kernel * by_message / np.maximum(np.hypot(by_kernel, by_message), 1e-30))


@dataclass(frozen=True)
class Contention:
    """How much kernels of each family and transfers slow each other; `other` holds for families that are not there.

    `collectives`: the same beside all-reduces, all-gathers and reduce-scatters of a library; empty: as other transfers.
    `collective_rate`: bytes/s that a rank sent in them alone. One that a slower link holds up is slowed only as far as
    its blocks, slowed, would then be the slower part: its factor is max(1, transfer * its rate / this one).
    `sends`: beside messages from GPU to GPU, where they were measured; these slow no kernels in a step.
    """

    by_family: Mapping[str, Beside]
    other: Beside
    source: str
    collectives: Mapping[str, Beside] = field(default_factory=dict)
    collective_rate: float = 0.0
    sends: Mapping[str, BesideSend] = field(default_factory=dict)

    def of(self, family: str) -> Beside:
        """That of a family of kernels beside a dispatch or combine."""
        return self.by_family.get(family, self.other)

    def beside_collective(self, family: str) -> Beside:
        """That of a family of kernels beside a library's collective."""
        if not self.collectives:
            return self.of(family)
        return self.collectives.get(family, self.mean_collective)

    @property
    def mean_collective(self) -> Beside:
        """The middle of all families', for work that is not taken apart."""
        found = list(self.collectives.values()) or [self.other]
        return Beside(*(float(np.median([each[fact] for each in found])) for fact in range(len(Beside._fields))))


def slowed_at(transfer: Any, *, rate: float, measured_rate: float) -> Any:
    """The factors (a float or an array) on a transfer that sends `rate` bytes/s alone, of one measured at another rate.

    >>> float(slowed_at(1.5, rate=50e9, measured_rate=300e9)), float(slowed_at(1.5, rate=300e9, measured_rate=300e9))
    (1.0, 1.5)
    """
    if measured_rate <= 0.0 or rate <= 0.0:
        return transfer
    return np.maximum(1.0, transfer * min(1.0, rate / measured_rate))


def wait_of(wait: Any, *, alone: float) -> Any:
    """Seconds (a float or an array) until a collective of `alone` seconds has its SMs, of `wait` for long ones.

    It gets them one by one as blocks of the kernel end, and a short one is over before it has them all.
    """
    return np.minimum(wait, MOST_WAIT * alone)


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

    @property
    def jitter(self) -> Jitter:
        """How far GPUs of the kind, and their hosts, are apart that do the same."""

    def at_load(self, flops_per_second: float) -> "KernelModel":
        """The kernels of a step of this mean load, all at one clock; itself without a power limit."""

    def power_share(self, dtype: str) -> float:
        """Of the power of a bf16 FLOP, that of one in GEMMs of this dtype."""

    def seconds(self, kernel: Kernel) -> Estimate:
        """Seconds of a kernel, in the shape of its sizes; UserError where the GPU has no units for its dtype."""


@dataclass(frozen=True, eq=False)
class MixedKernels:
    """Models by kind of GPU, which is the number of the first pool of that kind.

    Where no kind is asked for, as of what the host does, the first stands for all.
    """

    models: Mapping[int, KernelModel]

    @property
    def first(self) -> KernelModel:
        """That of the first pool."""
        return next(iter(self.models.values()))

    @property
    def name(self) -> str:
        """All names."""
        return " and ".join(dict.fromkeys(model.name for model in self.models.values()))

    @property
    def host(self) -> HostCosts:
        """See `KernelModel`."""
        return self.first.host

    @property
    def contention(self) -> Contention:
        """See `KernelModel`."""
        return self.first.contention

    @property
    def jitter(self) -> Jitter:
        """See `KernelModel`."""
        return self.first.jitter

    def at_load(self, flops_per_second: float) -> "MixedKernels":
        """See `KernelModel`: every kind at the clock that this load leaves it."""
        return MixedKernels({kind: model.at_load(flops_per_second) for kind, model in self.models.items()})

    def power_share(self, dtype: str) -> float:
        """See `KernelModel`."""
        return self.first.power_share(dtype)

    def seconds(self, kernel: Kernel) -> Estimate:
        """See `KernelModel`."""
        return self.first.seconds(kernel)


def kernels_of_kind(model: KernelModel, kind: int) -> KernelModel:
    """The model of one kind of GPU."""
    return model.models[kind] if isinstance(model, MixedKernels) else model
