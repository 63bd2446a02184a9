"""Rows and token copies per block of tokens, counted with bit masks.

A block is one sequence (counts add up over sequences, so a trace is counted once and every draw sums its choice) or
one rank's micro-batch. Id -1 is no row: a dropped one, or an expert-choice token with fewer experts.
Legend: S blocks, T tokens per block, K selections per token, E experts, D ranks, J nodes.
"""

from typing import Any, NamedTuple

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
