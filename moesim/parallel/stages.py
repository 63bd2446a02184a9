"""Copies that travel from rank to rank, per stage of a dispatch, for all micro-batches of a layer at once.

The array form of `LayerTraffic.send_stages` (which gives bytes for one micro-batch). Legend: see `moesim.parallel.arrays`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.arrays import TrafficArrays, sum_columns
from moesim.parallel.placement import ExpertPlacement
from moesim.parallel.traffic import Deduplicate, relay_ranks

Array = NDArray[Any]
FloatArray = NDArray[np.float64]


def held_copies(arrays: TrafficArrays, placement: ExpertPlacement, deduplicate: Deduplicate) -> Array:
    """Copies of rank r's tokens that rank d gets in the end, own rank included: [B, R, D]."""
    if deduplicate == "per_expert":
        return sum_columns(arrays.rows_BRE, placement.rank_of_expert_E, placement.num_ranks)
    return arrays.rank_copies_BRD


def stage_copies(
    arrays: TrafficArrays, placement: ExpertPlacement, deduplicate: Deduplicate
) -> tuple[FloatArray, ...]:
    """Copies sent from rank to rank, float64 [B, R, D] with zero diagonals, one array per stage of the dispatch.

    per_expert and per_rank: one stage. per_node: first to the relay of each remote node (beside the copies that stay on
    the own node), then from the relay to the ranks of its node. Combine uses the transposes in reverse order.
    """
    if deduplicate != "per_node":
        return (_without_diagonal(held_copies(arrays, placement, deduplicate)),)
    layout = arrays.layout
    relay_RM = relay_ranks(layout.node_of_rank_R, layout.local_rank_R)
    first_BRD = np.where(layout.same_node_RD, arrays.rank_copies_BRD, 0).astype(np.float64)
    fan_out_BRD = np.zeros_like(first_BRD)
    for node in range(relay_RM.shape[1]):
        members = np.flatnonzero(layout.node_of_rank_R == node)
        remote = np.flatnonzero(layout.node_of_rank_R != node)
        relay = relay_RM[remote, node]
        first_BRD[:, remote, relay] += arrays.node_copies_BRM[:, remote, node]
        from_relay = np.equal.outer(members, relay).astype(np.float64)
        fan_out_BRD[:, members[:, None], members] = from_relay @ arrays.rank_copies_BRD[:, remote[:, None], members]
    return _without_diagonal(first_BRD), _without_diagonal(fan_out_BRD)


def _without_diagonal(copies_BRD: Array) -> FloatArray:
    off_diagonal = copies_BRD.astype(np.float64)
    index = np.arange(copies_BRD.shape[1])
    off_diagonal[:, index, index] = 0.0
    return off_diagonal
