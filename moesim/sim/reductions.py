"""Collectives on gradients and parameters among ranks of all groups, once per step.

Legend: W ranks of the world.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Members = tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class Reduction:
    """One collective among each of `members` (lists of global ranks): nobody is done before the last has come."""

    name: str
    members: Members
    seconds: float
    source: str


def last_arrivals(reduction: Reduction, ready_SW: FloatArray) -> FloatArray:
    """[S, W]: when the last member of each rank's collective is there."""
    last_SW = ready_SW.copy()
    for ranks in reduction.members:
        last_SW[:, ranks] = ready_SW[:, ranks].max(axis=1, keepdims=True)
    return last_SW


def parameter_shares(*, dense: float, expert: float, data: int, replicas: int, zero: Sequence[int]) -> float:
    """Parameters whose optimizer states a rank updates: ZeRO 1 and up divide them among the holders."""
    dense_share = dense / data if zero[0] else dense
    return dense_share + (expert / replicas if zero[1] else expert)
