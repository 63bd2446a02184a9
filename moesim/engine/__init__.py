"""WHEN it runs: a SimPy process per rank group, one executor, clocks as vectors."""

from moesim.engine.samples import simulate_samples
from moesim.engine.step import StepOutcome, simulate_step
from moesim.engine.step_clock import step_kernels

__all__ = ["StepOutcome", "simulate_samples", "simulate_step", "step_kernels"]
