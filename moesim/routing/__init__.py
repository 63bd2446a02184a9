"""Real MoE layers in torch, the thin language model, its training, and the recording of its routing.

Importing this package, a `TrainingRequest` or the cache does not import torch; `train_router` does.
"""

from typing import TYPE_CHECKING, Any

from moesim.routing.request import StepReport, TrainingRequest, cache_directory, cached_trace, show_training, trace_path

if TYPE_CHECKING:
    from moesim.routing.training import train_router

__all__ = [
    "StepReport",
    "TrainingRequest",
    "cache_directory",
    "cached_trace",
    "show_training",
    "trace_path",
    "train_router",
]


def __getattr__(name: str) -> Any:
    if name == "train_router":
        from moesim.routing.training import train_router

        return train_router
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
