"""The real thing beside its prediction: torch training runs, measured, and simulated with the same routing.

Importing this package does not import torch; measuring does.
"""

from moesim.validation.command import validate_command
from moesim.validation.table import recompute, shipped_table

__all__ = ["recompute", "shipped_table", "validate_command"]
