"""From a scenario to days of training: what failures, checkpoints and slow parts leave of the step's speed."""

from moesim.reliability.answers import Goodput, goodput, goodput_of_step, kept_share
from moesim.reliability.job import LEAST_WORK, Step, check_failures, checkpoint_bytes, daly_seconds, young_seconds

__all__ = [
    "LEAST_WORK",
    "Goodput",
    "Step",
    "check_failures",
    "checkpoint_bytes",
    "daly_seconds",
    "goodput",
    "goodput_of_step",
    "kept_share",
    "young_seconds",
]
