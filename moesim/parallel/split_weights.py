"""Which share of an expert's rows each of its copies gets, so that ranks are loaded as evenly as the slots allow.

The loads whose squares over speed have the least sum are also those whose busiest rank has least to do: what ranks can
be given with fixed slots is the base of a polymatroid (Fujishige, Math. Oper. Res. 5(2), 1980). They are found expert
by expert, each time filling the ranks of its copies up to one level, until nothing changes.
Legend: X slots, D ranks, E experts, C ranks with a copy of an expert.
"""

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.expert_map import ExpertMap

FloatArray = NDArray[np.float64]

MOST_ROUNDS = 200
NEAR = 1e-6  # of the mean load: a round that changes no rank by more is the last


def balanced_weights(held: ExpertMap, load_E: NDArray[np.generic], *, speed_D: FloatArray) -> FloatArray:
    """Weights of all slots [X], those of an expert with a sum of 1; an expert without rows splits evenly."""
    rank_X, expert_X = held.placement.rank_of_expert_E, held.expert_X
    weight_X = held.share_X.copy()
    rows_E = np.asarray(load_E, dtype=np.float64)
    load_D: FloatArray = np.zeros(len(speed_D))
    np.add.at(load_D, rank_X, weight_X * rows_E[expert_X])
    copied = [np.flatnonzero(expert_X == expert) for expert in np.flatnonzero((held.copies_E > 1) & (rows_E > 0))]
    near = NEAR * load_D.mean()
    for _ in range(MOST_ROUNDS):
        before_D = load_D.copy()
        for slots in copied:
            rows = rows_E[expert_X[slots[0]]]
            ranks, index = np.unique(rank_X[slots], return_inverse=True)
            np.subtract.at(load_D, rank_X[slots], weight_X[slots] * rows)
            given_C = _fill(load_D[ranks], speed_D[ranks], rows)
            np.add.at(load_D, ranks, given_C)
            weight_X[slots] = (given_C / rows / np.bincount(index))[index]  # copies on one rank share its part
        if np.abs(load_D - before_D).max() <= near:
            break
    return weight_X


def _fill(load_C: FloatArray, speed_C: FloatArray, rows: float) -> FloatArray:
    """Rows for every rank so that all that get some are done at the same time, no later than the others."""
    order_C = np.argsort(load_C / speed_C, kind="stable")
    load, speed = np.cumsum(load_C[order_C]), np.cumsum(speed_C[order_C])
    level_C = (rows + load) / speed  # with the first one, two, three ... ranks
    fits = np.append(level_C[:-1] <= (load_C / speed_C)[order_C][1:], True)
    level = level_C[np.argmax(fits)]
    return np.asarray(np.maximum(speed_C * level - load_C, 0.0))
