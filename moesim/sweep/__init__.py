"""Sweeps: a base scenario and axes over any of its keys, simulated point by point into a folder that can be resumed."""

from moesim.sweep.folder import SweepFolder
from moesim.sweep.run import SweepOutcome, sweep
from moesim.sweep.study import Study, load_study
from moesim.sweep.table import print_points, print_sweep

__all__ = [
    "Study",
    "SweepFolder",
    "SweepOutcome",
    "load_study",
    "print_points",
    "print_sweep",
    "sweep",
]
