"""Which rows the simulated ranks keep when capacity is limited, in numpy (formulas: spec, "Capacity and dropping").

Legend: S sequences of one expert-parallel group and micro-batch, N blocks (one rank's tokens each), T tokens,
K selections per token, E experts, D ranks of the group.

A row is one (token, expert) selection, in token order; id -1 is no row and never kept.
"""

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Mask = NDArray[np.bool_]


def expert_capacity(*, factor: float, top_k: int, num_tokens: int, num_experts: int) -> int:
    """Rows that one expert computes for one rank's micro-batch: C = ceil(factor K T / E), but no more than T.

    A token chooses an expert once at most, so that further rows could only ever be padding.
    """
    return math.ceil(min(factor * top_k * num_tokens / num_experts, num_tokens))


def device_budget(*, factor: float, num_rows: int, num_ranks: int) -> int:
    """Rows that one rank computes for its group's micro-batch: floor(factor * mean rows per rank)."""
    return math.floor(factor * num_rows / num_ranks)


def expert_keep_mask(
    expert_ids_NTK: Array, affinities_NTK: Array, *, num_experts: int, capacity: int, by: Literal["position", "score"]
) -> Mask:
    """True [N, T, K] where a row is among the first `capacity` rows of its expert in its block.

    `position`: token order, all K choices alike. `score`: highest affinity first, ties to the earlier row.
    """
    blocks = expert_ids_NTK.shape[0]
    ids_NR = expert_ids_NTK.reshape(blocks, -1)
    bin_NR = np.where(ids_NR < 0, num_experts, ids_NR) + (num_experts + 1) * np.arange(blocks)[:, None]
    bin_R = bin_NR.reshape(-1).astype(_smallest_unsigned(blocks * (num_experts + 1)))  # narrow keys sort by radix
    order_R = np.argsort(bin_R, kind="stable")
    if by == "score":
        by_score_R = np.argsort(-affinities_NTK.reshape(-1), kind="stable")
        order_R = by_score_R[np.argsort(bin_R[by_score_R], kind="stable")]
    sizes = np.bincount(bin_R, minlength=blocks * (num_experts + 1))
    first = np.cumsum(sizes) - sizes
    place_R = np.empty(len(bin_R), dtype=np.int64)
    place_R[order_R] = np.arange(len(bin_R)) - np.repeat(first, sizes)
    return ((place_R < capacity) & (ids_NR.reshape(-1) >= 0)).reshape(expert_ids_NTK.shape)


def device_keep_mask(
    ranks_STK: Array, affinities_STK: Array, *, protected_S: Mask, num_ranks: int, factor: float
) -> Mask:
    """True [S, T, K] where a row survives DeepSeek-V2's device budget.

    ranks_STK: unsigned, the rank that computes each row, `num_ranks` for no row; the S sequences are all that the
    group's ranks hold in one micro-batch. The budget of a rank is floor(factor * mean rows per rank). Rows of
    protected sequences are always kept and may alone exceed it; the others fill what is left, highest affinity first,
    ties to the earlier row.
    """
    rank_R = ranks_STK.reshape(-1)
    affinity_R = affinities_STK.reshape(-1)
    rows_D = np.bincount(rank_R, minlength=num_ranks + 1)[:num_ranks]
    protected_D = np.bincount(ranks_STK[protected_S].reshape(-1), minlength=num_ranks + 1)[:num_ranks]
    budget = device_budget(factor=factor, num_rows=int(rows_D.sum()), num_ranks=num_ranks)
    left_D = np.maximum(budget - protected_D, 0)
    open_D = rows_D - protected_D  # unprotected rows
    keep_R = rank_R < num_ranks
    if (open_D <= left_D).all():
        return keep_R.reshape(ranks_STK.shape)
    candidate_STK = ranks_STK.copy()
    candidate_STK[protected_S] = num_ranks
    order_R = np.argsort(candidate_STK.reshape(-1), kind="stable")
    first_D = np.cumsum(open_D) - open_D
    for rank in np.flatnonzero(open_D > left_D):
        rows = order_R[first_D[rank] : first_D[rank] + open_D[rank]]
        keep_R[rows[~_highest(affinity_R[rows], int(left_D[rank]))]] = False
    return keep_R.reshape(ranks_STK.shape)


def _highest(values: Array, num: int) -> Mask:
    """True where a value is among the `num` highest, ties to the earlier one; a selection, not a sort."""
    if num == 0:
        return np.zeros(len(values), dtype=bool)
    threshold = np.partition(values, len(values) - num)[len(values) - num]
    chosen: Mask = values > threshold
    ties = np.flatnonzero(values == threshold)
    chosen[ties[: num - int(chosen.sum())]] = True
    return chosen


def _smallest_unsigned(num_values: int) -> type[np.unsignedinteger[Any]]:
    return next(dtype for dtype in (np.uint8, np.uint16, np.uint32, np.uint64) if np.iinfo(dtype).max >= num_values - 1)


def ranks_of_rows(expert_ids: Array, *, rank_of_expert_E: Array, num_ranks: int) -> Array:
    """The rank that computes each row, in the smallest unsigned type; `num_ranks` where the id is -1."""
    rank_E = np.append(rank_of_expert_E, num_ranks).astype(_smallest_unsigned(num_ranks + 1))
    return np.take(rank_E, expert_ids)
