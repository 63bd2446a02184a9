"""The SimPy simulation of one optimizer step: operations as data, one executor, a process per rank group."""

from moesim.sim.build import build_program
from moesim.sim.program import StepProgram
from moesim.sim.step import StepOutcome, simulate_step
from moesim.sim.step_clock import step_kernels

__all__ = ["StepOutcome", "StepProgram", "build_program", "simulate_step", "step_kernels"]
