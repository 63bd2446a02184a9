"""How long a kernel takes: the roofline, and models calibrated by measured profiles.

from moesim.kernels import load_profile
load_profile("h200").seconds(Gemm(m=4096, k=2048, n=3072))     # Estimate(seconds, source)
"""

from moesim.kernels.calibrated import CalibratedModel
from moesim.kernels.command import calibrate_command
from moesim.kernels.estimate import (
    SOURCES,
    Beside,
    BesideSend,
    Contention,
    Estimate,
    HostCosts,
    KernelModel,
    MixedKernels,
    kernels_of_kind,
    slowed_at,
    total,
    wait_of,
    weakest,
)
from moesim.kernels.families import MEMORY_KINDS, Attention, Gemm, GroupedGemm, Kernel, MemoryBound, memory_bytes
from moesim.kernels.loading import compute_model, gpu_of_device, in_regime, kernel_model, load_profile
from moesim.kernels.measured import contention_of
from moesim.kernels.report import leave_one_out_rows
from moesim.kernels.roofline import Roofline
from moesim.kernels.scaled import ScaledModel

__all__ = [
    "MEMORY_KINDS",
    "SOURCES",
    "Attention",
    "Beside",
    "BesideSend",
    "CalibratedModel",
    "Contention",
    "Estimate",
    "Gemm",
    "GroupedGemm",
    "HostCosts",
    "Kernel",
    "KernelModel",
    "MemoryBound",
    "MixedKernels",
    "Roofline",
    "ScaledModel",
    "calibrate_command",
    "compute_model",
    "contention_of",
    "gpu_of_device",
    "in_regime",
    "kernel_model",
    "kernels_of_kind",
    "leave_one_out_rows",
    "load_profile",
    "memory_bytes",
    "slowed_at",
    "total",
    "wait_of",
    "weakest",
]
