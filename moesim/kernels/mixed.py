"""Kernels of a cluster of several kinds of GPU: a model for each."""

from collections.abc import Mapping
from dataclasses import dataclass

from moesim.kernels.estimate import Contention, Estimate, HostCosts, KernelModel
from moesim.kernels.families import Kernel
from moesim.kernels.jitter import Jitter


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
