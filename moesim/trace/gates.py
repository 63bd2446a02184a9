"""How a router weighs the experts that it selected, by its facts: from affinities to gates.

Legend: L layers, S sequences, T tokens, K selections.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import RouterShape

Array = NDArray[Any]

_LEAST = np.finfo(np.float32).min


def gates_of(router: RouterShape, expert_ids_LSTK: Array, affinities_LSTK: Array) -> NDArray[np.float32]:
    """The gates that the router's formula makes of the selected experts' affinities, float32; 0 where the id is -1."""
    facts = ROUTERS[router.kind]
    valid = expert_ids_LSTK >= 0
    values = np.where(valid, affinities_LSTK.astype(np.float64), 0.0)
    if facts.affinity == "none":
        values = np.where(valid, 1 / router.top_k, 0.0)
    if facts.affinity == "logits":
        below_top = np.where(valid, values, -np.inf) - values.max(axis=-1, keepdims=True, where=valid, initial=_LEAST)
        values = np.exp(below_top)
    if facts.normalised:
        values = values / np.maximum(values.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    if facts.scaled:
        values = values * router.routed_scaling_factor
    return values.astype(np.float32)
