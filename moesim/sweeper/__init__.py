"""Sweeps: a base scenario and axes over any of its keys, simulated point by point into a folder that can be resumed."""

from moesim.sweeper.folder import SweepFolder, SweepOutcome, sweep
from moesim.sweeper.study import Study, load_study
from moesim.sweeper.table import print_points, print_sweep

__all__ = [
    "Study",
    "SweepFolder",
    "SweepOutcome",
    "load_study",
    "print_points",
    "print_sweep",
    "sweep",
]
