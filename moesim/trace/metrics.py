"""What a trace says about balance and spread: one definition each (spec, "Metrics").

Legend: L layers, S sequences, T tokens, K selections, E experts.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.scenario.routing import RouterShape
from moesim.seeding import stream
from moesim.trace.draws import draw_distinct_in_groups
from moesim.trace.record import TraceStep, group_of_expert

Array = NDArray[Any]

_FLOOR_ROWS = 4_000_000  # rows drawn for one floor: its standard error stays below 0.003
_MIN_TRIALS = 4
_WORD_BITS = 64
_NUM_BITS_OF_BYTE = np.array([byte.bit_count() for byte in range(256)], dtype=np.uint8)


def domain_masks(expert_ids_TK: Array, *, domain_of_expert_E: Array, num_domains: int) -> Iterator[tuple[int, Array]]:
    """Masks of the domains that each token's experts lie in, 64 domains at a time: one bit per group, rank or node, so
    that distinct ones are counted without sorting.

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


def imbalance(loads: Array, *, axis: int = -1) -> NDArray[np.float64]:
    """max / mean along `axis`, 1.0 is perfect; an axis without any load counts as perfect."""
    means = np.mean(loads, axis=axis, dtype=np.float64)
    ratios = np.max(loads, axis=axis) / np.where(means > 0, means, 1.0)
    return np.asarray(np.where(means > 0, ratios, 1.0))


def mean_distinct_groups_L(step: TraceStep, router: RouterShape) -> NDArray[np.float64]:
    """Distinct router groups per token, mean over the tokens of each layer."""
    group_of_expert_E = group_of_expert(router)
    return np.array(
        [distinct_domains(ids, domain_of_expert_E=group_of_expert_E).mean() for ids in step.expert_ids_LSTK]
    )


@lru_cache(maxsize=64)
def uniform_floor(
    num_experts: int,
    *,
    top_k: int,
    tokens: int,
    num_groups: int = 1,
    group_limit: int = 1,
    num_bins: int | None = None,
    rows: int = _FLOOR_ROWS,
) -> float:
    """The imbalance that a uniform router has over `tokens` tokens: what chance alone leaves.

    Mean of max / mean over `num_bins` equal runs of experts (ranks; by default the experts themselves) by Monte Carlo
    with a fixed stream, in which about `rows` rows are drawn. With a group limit each token draws its experts from
    `group_limit` random groups.
    """
    bins = num_bins or num_experts
    trials = max(_MIN_TRIALS, rows // (tokens * top_k))
    rng = stream(0, "uniform-floor", num_experts, top_k, tokens, num_groups, group_limit, bins)
    bin_of_expert_E = np.arange(num_experts) * bins // num_experts
    ratios = []
    per_draw = max(1, 1_000_000 // (tokens * top_k))  # trials drawn together, to keep memory small
    for start in range(0, trials, per_draw):
        batch = min(per_draw, trials - start)
        ids_TK = draw_distinct_in_groups(
            batch * tokens,
            num_experts=num_experts,
            top_k=top_k,
            num_groups=num_groups,
            group_limit=group_limit,
            rng=rng,
        )
        bins_BR = bin_of_expert_E[ids_TK].reshape(batch, -1) + bins * np.arange(batch)[:, None]
        loads_BX = np.bincount(bins_BR.reshape(-1), minlength=batch * bins).reshape(batch, bins)
        ratios.append(imbalance(loads_BX))
    return float(np.concatenate(ratios).mean())
