"""Rows and token copies per block of tokens, counted with bit masks.

A block is one sequence (counts add up over sequences, so a trace is counted once and every draw sums its choice) or
one rank's micro-batch. Id -1 is no row: a dropped one, or an expert-choice token with fewer experts.
Legend: S blocks, T tokens per block, K selections per token, E experts, D ranks, M nodes.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_WORD_BITS = 64
_BITS_OF_BYTE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.int64)


class BlockCounts(NamedTuple):
    """int64 counts per block: rows per expert, distinct (token, rank) and distinct (token, node) pairs."""

    rows_SE: NDArray[np.int64]
    rank_copies_SD: NDArray[np.int64]
    node_copies_SM: NDArray[np.int64]


def count_blocks(expert_ids_STK: Array, *, rank_of_expert_E: Array, node_of_rank_D: Array) -> BlockCounts:
    """The counts of every block of tokens; additive over disjoint sets of tokens."""
    num_nodes = int(node_of_rank_D.max()) + 1
    rank_copies_SD = count_distinct(
        expert_ids_STK, domain_of_expert_E=rank_of_expert_E, num_domains=len(node_of_rank_D)
    )
    node_of_expert_E = node_of_rank_D[rank_of_expert_E]
    node_copies_SM = count_distinct(expert_ids_STK, domain_of_expert_E=node_of_expert_E, num_domains=num_nodes)
    return BlockCounts(count_rows(expert_ids_STK, num_experts=len(rank_of_expert_E)), rank_copies_SD, node_copies_SM)


def count_rows(expert_ids_STK: Array, *, num_experts: int) -> NDArray[np.int64]:
    """Rows of every expert in each block, int64 [S, E]."""
    blocks = expert_ids_STK.shape[0]
    first_bin_S = np.arange(blocks, dtype=np.int64) * (num_experts + 1) + 1  # bin 0 of a block takes the ids -1
    bins_SR = expert_ids_STK.reshape(blocks, -1) + first_bin_S[:, None]
    counts = np.bincount(bins_SR.reshape(-1), minlength=blocks * (num_experts + 1))
    return counts.reshape(blocks, num_experts + 1)[:, 1:]


def count_distinct(expert_ids_STK: Array, *, domain_of_expert_E: Array, num_domains: int) -> NDArray[np.int64]:
    """Tokens of each block that reach each domain (rank, node) at least once, int64 [S, num_domains]."""
    words = [
        _count_word(expert_ids_STK, domain_of_expert_E - first, min(_WORD_BITS, num_domains - first))
        for first in range(0, num_domains, _WORD_BITS)
    ]
    return np.concatenate(words, axis=1)


def _count_word(expert_ids_STK: Array, domain_of_expert_E: Array, num_bits: int) -> NDArray[np.int64]:
    word = next(dtype for dtype in (np.uint8, np.uint16, np.uint32, np.uint64) if np.iinfo(dtype).bits >= num_bits)
    in_word_E = (domain_of_expert_E >= 0) & (domain_of_expert_E < num_bits)
    shift_E = np.where(in_word_E, domain_of_expert_E, 0).astype(np.uint64)
    bit_E = np.append(np.where(in_word_E, np.uint64(1) << shift_E, np.uint64(0)), np.uint64(0)).astype(word)
    bits_STK = np.take(bit_E, expert_ids_STK)  # index -1 takes the last entry, which sets nothing
    mask_ST = bits_STK[..., 0].copy()
    for column in range(1, bits_STK.shape[-1]):
        mask_ST |= bits_STK[..., column]
    blocks = mask_ST.shape[0]
    num_bytes = mask_ST.dtype.itemsize
    # Count every value of every byte, then spread the values over their bits: 256 bins instead of one pass per bit.
    bytes_STB = mask_ST.reshape(blocks, -1, 1).view(np.uint8)
    first_bin_SB = 256 * np.arange(blocks * num_bytes, dtype=np.int64).reshape(blocks, 1, num_bytes)
    histogram = np.bincount((bytes_STB + first_bin_SB).reshape(-1), minlength=256 * blocks * num_bytes)
    bits_SBb = histogram.reshape(blocks, num_bytes, 256) @ _BITS_OF_BYTE
    return np.asarray(bits_SBb.reshape(blocks, -1)[:, :num_bits])
