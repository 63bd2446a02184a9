"""How long a kernel takes: the roofline, and models calibrated by measured profiles."""

from moesim.compute.estimate import SOURCES, Contention, Estimate, KernelModel, total, weakest
from moesim.compute.memory_kinds import MEMORY_KINDS, memory_bytes
from moesim.compute.roofline import Roofline

__all__ = [
    "MEMORY_KINDS",
    "SOURCES",
    "Contention",
    "Estimate",
    "KernelModel",
    "Roofline",
    "kernel_model",
    "memory_bytes",
    "total",
    "weakest",
]


def kernel_model(gpu_name: str, profile: str | None = None) -> KernelModel:
    """The kernel model of a GPU of the catalogue."""
    from moesim.scenario import gpu_spec

    return Roofline(gpu_spec(gpu_name))
