# ruff: noqa: F403, F405
"""moesim: what will this Mixture-of-Experts model cost on that cluster, given how its router really routes?

The names below are those of `moesim.api`, which is imported when one of them is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesim.api import *

__version__ = "0.1.0"
__all__ = [
    "Goodput",
    "GpuSpec",
    "InfeasibleError",
    "PointRecord",
    "RoutingTrace",
    "RunRecord",
    "Scenario",
    "UserError",
    "command_line",
    "from_megatron",
    "goodput",
    "gpus",
    "load_scenario",
    "load_trace",
    "obtain_trace",
    "plan",
    "save_run",
    "simulate",
    "sweep",
    "what_if",
]


def __getattr__(name: str) -> Any:
    """A name of `moesim.api`; other modules of the package are imported as always."""
    if name not in __all__:
        raise AttributeError(f"module 'moesim' has no attribute {name!r}")
    from moesim import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
