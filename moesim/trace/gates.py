"""How a router of each kind weighs the experts that it selected: one table, from affinities to gates.

Legend: L layers, S sequences, T tokens, K selections.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.scenario.routing import RouterShape

Array = NDArray[Any]

_LEAST = np.finfo(np.float32).min


@dataclass(frozen=True, kw_only=True)
class Weighing:
    """Gates are affinities: divided by their sum over the token (`normalised`), times the router's factor (`scaled`).

    `logits`: affinities are logits, of which the softmax is taken, and not probabilities. `even`: gates are 1/K.
    """

    logits: bool = False
    normalised: bool = False
    scaled: bool = False
    even: bool = False


WEIGHINGS: Mapping[str, Weighing] = MappingProxyType(
    {
        "switch": Weighing(),
        "gshard": Weighing(normalised=True),
        "topk_softmax": Weighing(logits=True, normalised=True),
        "deepseek_moe": Weighing(),
        "deepseek_v2": Weighing(scaled=True),
        "deepseek_v3": Weighing(normalised=True, scaled=True),
        "expert_choice": Weighing(),
        "hash": Weighing(even=True),
        "uniform": Weighing(even=True),
        "popularity": Weighing(even=True),
        "recorded": Weighing(),  # by others, with the gates that they recorded
        "selections": Weighing(even=True),  # by others, without gates
    }
)


def gates_of(router: RouterShape, expert_ids_LSTK: Array, affinities_LSTK: Array) -> NDArray[np.float32]:
    """The gates that the router's formula makes of the selected experts' affinities, float32; 0 where the id is -1."""
    weighing = WEIGHINGS[router.kind]
    valid = expert_ids_LSTK >= 0
    values = np.where(valid, affinities_LSTK.astype(np.float64), 0.0)
    if weighing.even:
        values = np.where(valid, 1 / router.top_k, 0.0)
    if weighing.logits:
        below_top = np.where(valid, values, -np.inf) - values.max(axis=-1, keepdims=True, where=valid, initial=_LEAST)
        values = np.exp(below_top)
    if weighing.normalised:
        values = values / np.maximum(values.sum(axis=-1, keepdims=True), np.finfo(np.float32).tiny)
    if weighing.scaled:
        values = values * router.routed_scaling_factor
    return values.astype(np.float32)
