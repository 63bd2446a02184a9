"""WHAT runs in one optimizer step: operations, blocks and software as data, schedules bound to the loads of ranks."""

from moesim.program.build import build_program
from moesim.program.step_program import StepProgram

__all__ = ["StepProgram", "build_program"]
