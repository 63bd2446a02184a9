"""One bit per group, rank or node that a token's experts lie in: distinct ones are counted without sorting.

Legend: T tokens (any leading axes), K selections, E experts.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_WORD_BITS = 64
_NUM_BITS_OF_BYTE = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


def domain_masks(expert_ids_TK: Array, *, domain_of_expert_E: Array, num_domains: int) -> Iterator[tuple[int, Array]]:
    """Masks of the domains that each token's experts lie in, 64 domains at a time.

    Yields (number of domains in the word, unsigned [T] with bit b set for domain 64 w + b), w = 0, 1, ... The type is
    the smallest with enough bits. Id -1 sets nothing.
    """
    for first in range(0, num_domains, _WORD_BITS):
        num_bits = min(_WORD_BITS, num_domains - first)
        word = next(dtype for dtype in (np.uint8, np.uint16, np.uint32, np.uint64) if np.iinfo(dtype).bits >= num_bits)
        bit_of_domain_E = domain_of_expert_E - first
        in_word_E = (bit_of_domain_E >= 0) & (bit_of_domain_E < num_bits)
        shift_E = np.where(in_word_E, bit_of_domain_E, 0).astype(np.uint64)
        bit_E = np.append(np.where(in_word_E, np.uint64(1) << shift_E, np.uint64(0)), np.uint64(0)).astype(word)
        bits_TK = np.take(bit_E, expert_ids_TK)  # index -1 takes the last entry
        mask_T = bits_TK[..., 0].copy()
        for column in range(1, bits_TK.shape[-1]):
            mask_T |= bits_TK[..., column]
        yield num_bits, mask_T


def distinct_domains(expert_ids_TK: Array, *, domain_of_expert_E: Array) -> NDArray[np.int64]:
    """Distinct groups (or ranks, or nodes) that each token's experts lie in, int64 [T]; -1 counts for nothing."""
    num_domains = int(domain_of_expert_E.max()) + 1
    distinct_T = np.zeros(expert_ids_TK.shape[:-1], dtype=np.int64)
    for _, mask_T in domain_masks(expert_ids_TK, domain_of_expert_E=domain_of_expert_E, num_domains=num_domains):
        bytes_TB = mask_T[..., None].view(np.uint8)
        for byte in range(bytes_TB.shape[-1]):
            distinct_T += _NUM_BITS_OF_BYTE[bytes_TB[..., byte]]
    return distinct_T
