"""Profiles of GPUs that this project could not measure, from the tables of the package aiconfigurator-core."""

from moesim.kernels.tables.command import from_tables
from moesim.kernels.tables.package import TABLE_GPUS

__all__ = ["TABLE_GPUS", "from_tables"]
