"""Copies that travel from rank to rank, per stage of a dispatch, for all micro-batches of a layer at once.

The array form of `LayerTraffic.send_stages` (bytes of one micro-batch). Legend: see `moesim.parallel.arrays`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.arrays import TrafficArrays
from moesim.parallel.placement import ExpertPlacement
from moesim.parallel.traffic import node_stages, ring_copies, sum_columns, without_diagonal
from moesim.scenario.dispatch import Deduplicate

Array = NDArray[Any]


def held_copies(
    arrays: TrafficArrays, placement: ExpertPlacement, deduplicate: Deduplicate, *, tokens: int = 0
) -> Array:
    """Copies of rank r's tokens (`tokens` of them) that rank d gets in the end, own rank included: [B, R, D]."""
    if deduplicate == "all_ranks":
        return np.full(arrays.rank_copies_BRD.shape, tokens, dtype=np.int64)
    if deduplicate == "per_expert":
        return sum_columns(arrays.rows_BRE, placement.rank_of_expert_E, placement.num_ranks)
    return arrays.rank_copies_BRD


def copies_out(held_BRD: Array, deduplicate: Deduplicate) -> Array:
    """Copies of its own tokens that a rank puts into its send buffer, [B, R]: for a gather each once."""
    return np.asarray(held_BRD[:, :, 0] if deduplicate == "all_ranks" else held_BRD.sum(axis=2))


def stage_copies(
    arrays: TrafficArrays, placement: ExpertPlacement, deduplicate: Deduplicate, *, tokens: int = 0
) -> tuple[NDArray[np.float64], ...]:
    """Copies sent from rank to rank, float64 [B, R, D] with zero diagonals, one array per stage of the dispatch.

    per_expert and per_rank: one stage. per_node: two (`node_stages`). all_ranks: one, round a ring (`ring_copies`).
    Combine uses the transposes in reverse order.
    """
    if deduplicate == "per_node":
        return node_stages(arrays.rank_copies_BRD, arrays.node_copies_BRJ, arrays.layout)
    if deduplicate == "all_ranks":
        batches, ranks, _ = arrays.rank_copies_BRD.shape
        return (np.broadcast_to(ring_copies(tokens, ranks), (batches, ranks, ranks)),)
    return (without_diagonal(held_copies(arrays, placement, deduplicate, tokens=tokens)),)
