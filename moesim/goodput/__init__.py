"""From a scenario to days of training: what failures, checkpoints and slow parts leave of the step's speed."""

from moesim.goodput.answers import Goodput, goodput, goodput_of_step
from moesim.goodput.interval import daly_seconds, young_seconds
from moesim.goodput.job_of_scenario import checkpoint_bytes

__all__ = ["Goodput", "checkpoint_bytes", "daly_seconds", "goodput", "goodput_of_step", "young_seconds"]
