"""The real thing beside its prediction: torch training runs, measured, and simulated with the same routing.

Importing this package does not import torch; measuring does.
"""

from moesim.validation.comparison import recompute, shipped_table, validate_command

__all__ = ["recompute", "shipped_table", "validate_command"]
