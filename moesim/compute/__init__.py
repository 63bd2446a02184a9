"""How long a kernel takes: the roofline, and models calibrated by measured profiles.

from moesim.compute import load_profile
load_profile("h200").gemm(m=4096, k=2048, n=3072, dtype="bf16")     # Estimate(seconds, source)
"""

from moesim.compute.calibrated import CalibratedModel
from moesim.compute.command import calibrate_command
from moesim.compute.estimate import SOURCES, Contention, Estimate, HostCosts, KernelModel, total, weakest
from moesim.compute.loading import kernel_model, load_profile
from moesim.compute.measured import contention_of
from moesim.compute.memory_kinds import MEMORY_KINDS, memory_bytes
from moesim.compute.report import leave_one_out_rows
from moesim.compute.roofline import Roofline
from moesim.compute.scaled import ScaledModel

__all__ = [
    "MEMORY_KINDS",
    "SOURCES",
    "CalibratedModel",
    "Contention",
    "Estimate",
    "HostCosts",
    "KernelModel",
    "Roofline",
    "ScaledModel",
    "calibrate_command",
    "contention_of",
    "kernel_model",
    "leave_one_out_rows",
    "load_profile",
    "memory_bytes",
    "total",
    "weakest",
]
