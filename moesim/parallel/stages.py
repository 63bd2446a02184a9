"""Copies that travel from rank to rank, per stage of a dispatch, for all micro-batches of a layer at once.

The array form of `LayerTraffic.send_stages` (bytes of one micro-batch). Legend: see `moesim.parallel.arrays`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.arrays import TrafficArrays
from moesim.parallel.placement import ExpertPlacement
from moesim.parallel.traffic import Deduplicate, node_stages, sum_columns, without_diagonal

Array = NDArray[Any]


def held_copies(arrays: TrafficArrays, placement: ExpertPlacement, deduplicate: Deduplicate) -> Array:
    """Copies of rank r's tokens that rank d gets in the end, own rank included: [B, R, D]."""
    if deduplicate == "per_expert":
        return sum_columns(arrays.rows_BRE, placement.rank_of_expert_E, placement.num_ranks)
    return arrays.rank_copies_BRD


def stage_copies(
    arrays: TrafficArrays, placement: ExpertPlacement, deduplicate: Deduplicate
) -> tuple[NDArray[np.float64], ...]:
    """Copies sent from rank to rank, float64 [B, R, D] with zero diagonals, one array per stage of the dispatch.

    per_expert and per_rank: one stage. per_node: two (`node_stages`). Combine uses the transposes in reverse order.
    """
    if deduplicate == "per_node":
        return node_stages(arrays.rank_copies_BRD, arrays.node_copies_BRM, arrays.layout)
    return (without_diagonal(held_copies(arrays, placement, deduplicate)),)
