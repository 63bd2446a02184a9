"""Copies of an expert: which share of its rows each of them gets, and the sum of their gradients.

Legend: Z slots, D ranks of an expert group, E experts, C ranks with a copy of an expert.
"""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.expert_map import ExpertMap
from moesim.scenario import Scenario

FloatArray = NDArray[np.float64]
MapOfLayer = Callable[[int], ExpertMap | None]

MOST_ROUNDS = 200
NEAR = 1e-6  # of the mean load: a round that changes no rank by more is the last


def balanced_weights(held: ExpertMap, load_E: NDArray[np.generic], *, speed_D: FloatArray) -> FloatArray:
    """Weights of all slots [Z] that load ranks as evenly as these allow; an expert's have a sum of 1, and one without
    rows splits evenly.

    The loads whose squares over speed have the least sum are also those whose busiest rank has least to do: what ranks
    can be given with fixed slots is the base of a polymatroid (Fujishige, Math. Oper. Res. 5(2), 1980). They are found
    expert by expert, each time filling the ranks of its copies up to one level, until nothing changes.
    """
    rank_Z, expert_Z = held.placement.rank_of_expert_E, held.expert_Z
    weight_Z = held.share_Z.copy()
    rows_E = np.asarray(load_E, dtype=np.float64)
    load_D: FloatArray = np.zeros(len(speed_D))
    np.add.at(load_D, rank_Z, weight_Z * rows_E[expert_Z])
    copied = [np.flatnonzero(expert_Z == expert) for expert in np.flatnonzero((held.copies_E > 1) & (rows_E > 0))]
    near = NEAR * load_D.mean()
    for _ in range(MOST_ROUNDS):
        before_D = load_D.copy()
        for slots in copied:
            rows = rows_E[expert_Z[slots[0]]]
            ranks, index = np.unique(rank_Z[slots], return_inverse=True)
            np.subtract.at(load_D, rank_Z[slots], weight_Z[slots] * rows)
            given_C = _fill(load_D[ranks], speed_D[ranks], rows)
            np.add.at(load_D, ranks, given_C)
            weight_Z[slots] = (given_C / rows / np.bincount(index))[index]  # copies on one rank share its part
        if np.abs(load_D - before_D).max() <= near:
            break
    return weight_Z


def _fill(load_C: FloatArray, speed_C: FloatArray, rows: float) -> FloatArray:
    """Rows for every rank so that all that get some are done at the same time, no later than the others."""
    order_C = np.argsort(load_C / speed_C, kind="stable")
    load, speed = np.cumsum(load_C[order_C]), np.cumsum(speed_C[order_C])
    level_C = (rows + load) / speed  # with the first one, two, three ... ranks
    fits = np.append(level_C[:-1] <= (load_C / speed_C)[order_C][1:], True)
    level = level_C[np.argmax(fits)]
    return np.asarray(np.maximum(speed_C * level - load_C, 0.0))


def copy_gradient_bytes_DD(maps: Iterable[ExpertMap | None], *, expert_bytes: float, num_ranks: int) -> FloatArray:
    """Bytes from rank to rank in each of the two halves, of all layers together, zero on the diagonal.

    Ranks that hold copies of an expert all-reduce its gradient among themselves as NCCL does: every rank sends each
    other one its part (reduce-scatter), then the sum of its own part to each of them (all-gather). Copies on one rank
    are summed there; data-parallel ranks with the same slots have reduced theirs before. With C ranks that hold an
    expert every ordered pair of them moves `expert_bytes` / C in each half.
    """
    bytes_DD = np.zeros((num_ranks, num_ranks))
    for held in maps:
        if held is None:
            continue
        holders_E = held.holds_DE.sum(axis=0)
        share_E = np.where(holders_E > 1, expert_bytes / holders_E, 0.0)
        holds_DE = held.holds_DE.astype(np.float64)
        bytes_DD += (holds_DE * share_E) @ holds_DE.T
    np.fill_diagonal(bytes_DD, 0.0)
    return bytes_DD


def layers_of_stages(scenario: Scenario, stages: Sequence[int]) -> list[int]:
    """The layers with a router of some stages, numbered among those; prediction layers lie on the last stage."""
    model = scenario.model
    layers = [layer for stage in stages for layer in scenario.stage_layers[stage] if not model.is_dense(layer)]
    if scenario.parallelism.num_stages - 1 in stages:
        layers += range(model.layers, model.layers + model.mtp_layers)
    return [model.moe_number(layer) for layer in layers]
