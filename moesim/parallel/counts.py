"""Rows and token copies per block of tokens, counted with bit masks, and which rows are kept when capacity is limited.

A block is one sequence (counts add up over sequences, so a trace is counted once and every draw sums its choice) or
one rank's micro-batch. A row is one (token, expert) selection, in token order; id -1 is no row, and never kept: a
dropped one, or an expert-choice token with fewer experts (formulas: spec, "Capacity and dropping").

Legend: S blocks (where rows are dropped: sequences of one expert-parallel group and micro-batch), N blocks of one
rank's tokens each, T tokens per block, K selections per token, E experts, D ranks of the group, J nodes.
"""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.trace.metrics import domain_masks

Array = NDArray[Any]

_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.int64)


class BlockCounts(NamedTuple):
    """int64 counts per block: rows per expert, distinct (token, rank) and distinct (token, node) pairs."""

    rows_SE: NDArray[np.int64]
    rank_copies_SD: NDArray[np.int64]
    node_copies_SJ: NDArray[np.int64]


def count_blocks(expert_ids_STK: Array, *, rank_of_expert_E: Array, node_of_rank_D: Array) -> BlockCounts:
    """The counts of every block of tokens; additive over disjoint sets of tokens."""
    num_nodes = int(node_of_rank_D.max()) + 1
    rank_copies_SD = count_distinct(
        expert_ids_STK, domain_of_expert_E=rank_of_expert_E, num_domains=len(node_of_rank_D)
    )
    node_of_expert_E = node_of_rank_D[rank_of_expert_E]
    node_copies_SJ = count_distinct(expert_ids_STK, domain_of_expert_E=node_of_expert_E, num_domains=num_nodes)
    return BlockCounts(count_rows(expert_ids_STK, num_experts=len(rank_of_expert_E)), rank_copies_SD, node_copies_SJ)


def count_rows(expert_ids_STK: Array, *, num_experts: int) -> NDArray[np.int64]:
    """Rows of every expert in each block, int64 [S, E]."""
    blocks = expert_ids_STK.shape[0]
    first_bin_S = np.arange(blocks, dtype=np.int64) * (num_experts + 1) + 1  # bin 0 of a block takes the ids -1
    bins_SR = expert_ids_STK.reshape(blocks, -1) + first_bin_S[:, None]
    counts = np.bincount(bins_SR.reshape(-1), minlength=blocks * (num_experts + 1))
    return counts.reshape(blocks, num_experts + 1)[:, 1:]


def count_distinct(expert_ids_STK: Array, *, domain_of_expert_E: Array, num_domains: int) -> NDArray[np.int64]:
    """Tokens of each block that reach each domain (rank, node) at least once, int64 [S, num_domains]."""
    masks = domain_masks(expert_ids_STK, domain_of_expert_E=domain_of_expert_E, num_domains=num_domains)
    return np.concatenate([_count_bits(mask_ST)[:, :num_bits] for num_bits, mask_ST in masks], axis=1)


def _count_bits(mask_ST: Array) -> NDArray[np.int64]:
    """How often each bit is set in each block."""
    blocks = mask_ST.shape[0]
    num_bytes = mask_ST.dtype.itemsize
    # Count every value of every byte, then spread the values over their bits: 256 bins instead of one pass per bit.
    bytes_STB = mask_ST.reshape(blocks, -1, 1).view(np.uint8)
    first_bin_SB = 256 * np.arange(blocks * num_bytes, dtype=np.int64).reshape(blocks, 1, num_bytes)
    histogram = np.bincount((bytes_STB + first_bin_SB).reshape(-1), minlength=256 * blocks * num_bytes)
    bits_SBb = histogram.reshape(blocks, num_bytes, 256) @ _BITS_OF_BYTE
    return np.asarray(bits_SBb.reshape(blocks, -1))


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
