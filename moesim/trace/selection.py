"""Random selections of K distinct experts per token, vectorised over tokens.

Legend: T tokens, K selections, E experts, G groups, M group limit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_CHUNK_VALUES = 1 << 23  # random keys drawn at a time: 32 MiB
_MAX_REDRAWS = 30
_TABLE_CELLS = 1 << 13


def draw_distinct(num_tokens: int, *, num_experts: int, top_k: int, rng: np.random.Generator) -> Array:
    """K distinct experts per token, all sets equally likely, in random order: int64 [T, K].

    Each choice is a number among the experts still free; stepping it over those taken, smallest first, names it.
    """
    assert top_k <= num_experts
    narrow = np.int16 if num_experts < 2**15 else np.int64  # many values at a time
    ids_KT = np.empty((top_k, num_tokens), dtype=narrow)
    taken: list[Array] = []  # the columns so far, each token's smallest first
    for column in range(top_k):
        choice_T: Array = rng.integers(num_experts - column, size=num_tokens).astype(narrow)
        for taken_T in taken:
            choice_T += choice_T >= taken_T
        ids_KT[column] = choice_T
        for place, taken_T in enumerate(taken):
            taken[place], choice_T = np.minimum(taken_T, choice_T), np.maximum(taken_T, choice_T)
        taken.append(choice_T)
    return np.ascontiguousarray(ids_KT.T, dtype=np.int64)


def draw_distinct_in_groups(
    num_tokens: int, *, num_experts: int, top_k: int, num_groups: int, group_limit: int, rng: np.random.Generator
) -> Array:
    """K distinct experts per token out of M groups chosen at random: int64 [T, K]."""
    if num_groups <= 1 or group_limit >= num_groups:
        return draw_distinct(num_tokens, num_experts=num_experts, top_k=top_k, rng=rng)
    group_size = num_experts // num_groups
    assert top_k <= group_limit * group_size
    groups_TM = draw_distinct(num_tokens, num_experts=num_groups, top_k=group_limit, rng=rng)
    within_TK = draw_distinct(num_tokens, num_experts=group_limit * group_size, top_k=top_k, rng=rng)
    group_TK = np.take_along_axis(groups_TM, within_TK // group_size, axis=1)
    return np.asarray(group_TK * group_size + within_TK % group_size)


def draw_by_weight(num_tokens: int, *, weights_E: Array, top_k: int, rng: np.random.Generator) -> Array:
    """K distinct experts per token by Gumbel top-k on log weights, best first: int64 [T, K].

    That law equals drawing one after the other in proportion to the weights left, which is done here: draw, and
    draw again where the expert is taken; tokens still without one (a few experts hold nearly all the weight) are
    drawn from the weights of their free experts.
    """
    find = _inverse_of(np.cumsum(weights_E) / np.sum(weights_E), num_tokens)
    last = int(np.flatnonzero(weights_E)[-1])
    narrow = np.int16 if len(weights_E) < 2**15 else np.int64  # many values at a time
    ids_KT = np.empty((top_k, num_tokens), dtype=narrow)
    for column in range(top_k):
        open_T: Array | None = None  # tokens still without an expert; at first all
        for _ in range(_MAX_REDRAWS):
            drawn_T = rng.random(num_tokens if open_T is None else len(open_T))
            choice_T = np.minimum(find(drawn_T), last).astype(narrow)
            earlier = ids_KT[:column] if open_T is None else ids_KT[:column, open_T]
            taken_T = np.zeros(len(choice_T), dtype=bool)
            for earlier_T in earlier:
                taken_T |= earlier_T == choice_T
            if open_T is None:
                ids_KT[column] = choice_T
                open_T = np.flatnonzero(taken_T)
            else:
                ids_KT[column, open_T] = choice_T
                open_T = open_T[taken_T]
            if not len(open_T):
                break
        if open_T is not None and len(open_T):
            ids_KT[column, open_T] = _draw_free(ids_KT[:column, open_T].T.astype(np.int64), weights_E, rng)
    return np.ascontiguousarray(ids_KT.T, dtype=np.int64)


def _inverse_of(cumulative_E: Array, num_tokens: int) -> Callable[[Array], Array]:
    """What numpy's searchsorted (side right) finds for numbers in [0, 1), for many from a table: most cells of it lie
    between two values, and only the others need the search."""
    if num_tokens < _TABLE_CELLS:
        return lambda drawn_T: np.searchsorted(cumulative_E, drawn_T, side="right")
    edges = np.arange(_TABLE_CELLS + 1) / _TABLE_CELLS
    least_N = np.searchsorted(cumulative_E, edges[:-1], side="right")
    certain_N = least_N == np.searchsorted(cumulative_E, edges[1:], side="left")

    def find(drawn_T: Array) -> Array:
        cell_T = (drawn_T * _TABLE_CELLS).astype(np.int64)  # exact: a power of two
        found_T: Array = least_N[cell_T]
        unsure_U = np.flatnonzero(~certain_N[cell_T])
        found_T[unsure_U] = np.searchsorted(cumulative_E, drawn_T[unsure_U], side="right")
        return found_T

    return find


def draw_by_weight_in_groups(
    num_tokens: int,
    *,
    weights_E: Array,
    top_k: int,
    num_groups: int,
    group_limit: int,
    rng: np.random.Generator,
) -> Array:
    """Gumbel top-k on log weights among the M groups with the highest maximum: int64 [T, K].

    The keys are exponential with rate weight, smallest first: the same order as Gumbel keys, largest first.
    """
    if num_groups <= 1 or group_limit >= num_groups:
        return draw_by_weight(num_tokens, weights_E=weights_E, top_k=top_k, rng=rng)
    num_experts = len(weights_E)
    with np.errstate(divide="ignore"):
        scale_E = (1.0 / np.asarray(weights_E, dtype=np.float64)).astype(np.float32)  # infinite: never before others
    ids_TK = np.empty((num_tokens, top_k), dtype=np.int64)
    chunk = max(1, _CHUNK_VALUES // num_experts)
    for start in range(0, num_tokens, chunk):
        tokens = min(chunk, num_tokens - start)
        keys_TE = rng.standard_exponential((tokens, num_experts), dtype=np.float32) * scale_E
        best_TG = keys_TE.reshape(tokens, num_groups, -1).min(axis=2)
        limit_T1 = np.partition(best_TG, group_limit - 1, axis=1)[:, group_limit - 1 : group_limit]
        keys_TE.reshape(tokens, num_groups, -1)[best_TG > limit_T1] = np.inf
        ids_TK[start : start + tokens] = np.argpartition(keys_TE, top_k - 1, axis=1)[:, :top_k]
    return ids_TK


def _draw_free(taken_TC: Array, weights_E: Array, rng: np.random.Generator) -> Array:
    """One expert per token in proportion to the weights of those not taken."""
    free_TE = np.tile(np.asarray(weights_E, dtype=np.float64), (len(taken_TC), 1))
    np.put_along_axis(free_TE, taken_TC, 0.0, axis=1)
    cumulative_TE = np.cumsum(free_TE, axis=1)
    target_T = rng.random(len(taken_TC)) * cumulative_TE[:, -1]
    return np.asarray((cumulative_TE <= target_T[:, None]).sum(axis=1))


Floats = NDArray[np.float64]

_MOST_SHARE = 0.999  # of the tokens that may choose one expert
_LOG_TIME_G = np.linspace(-12.0, 16.0, 161)
_ROUNDS = 12
_CELLS = 4_000_000  # numbers in memory at once


def shares_of_counts(counts_LE: Floats, *, top_k: int) -> Floats:
    """Shares of the tokens that choose each expert: in proportion to the counts, at most 0.999, K in sum."""
    most = _MOST_SHARE if top_k < counts_LE.shape[1] else 1.0
    share_LE = counts_LE * (top_k / counts_LE.sum(axis=1, keepdims=True))
    for _ in range(counts_LE.shape[1]):
        full_LE = share_LE >= most
        rest_L = top_k - most * full_LE.sum(axis=1)
        free_L = np.where(full_LE, 0.0, share_LE).sum(axis=1)
        factor_L = np.divide(rest_L, free_L, out=np.ones_like(rest_L), where=free_L > 0)
        share_LE = np.where(full_LE, most, share_LE * factor_L[:, None])
        if (share_LE <= most * (1 + 1e-12)).all():
            break
    return np.asarray(np.minimum(share_LE, most))


def weights_of_shares(share_LE: Floats, *, top_k: int) -> Floats:
    """Weights of a draw of K distinct experts, one after the other in proportion to the weights left, that chooses
    every expert with its share's probability.

    A fixed point: each weight is raised where its probability is too low, until they agree.
    """
    layers, experts = share_LE.shape
    if top_k == experts:
        return np.ones_like(share_LE)
    weight_LE = share_LE if top_k == 1 else -np.log1p(-share_LE)
    at_once = max(1, _CELLS // (experts * top_k * len(_LOG_TIME_G)))
    for _ in range(_ROUNDS if top_k > 1 else 0):
        chance_LE = np.concatenate(
            [chances(weight_LE[start : start + at_once], top_k=top_k) for start in range(0, layers, at_once)]
        )
        found_LE = np.log1p(-np.minimum(chance_LE, 1 - 1e-12))
        weight_LE = weight_LE * np.divide(np.log1p(-share_LE), found_LE, out=np.ones_like(share_LE), where=share_LE > 0)
    return np.asarray(weight_LE)


def chances(weight_LE: Floats, *, top_k: int) -> Floats:
    """The probability that an expert is among the K.

    Experts arrive at exponential times of rate w, and the first K count: expert e is one of them if at its time t fewer
    than K others have come. Hence the integral over t of w exp(-w t) P(fewer than K of the others by t), here over
    log t.
    """
    time_G = np.exp(_LOG_TIME_G)
    late_ELG = np.exp(-weight_LE.T[:, :, None] * time_G)  # has not come yet
    before, after = _numbers(late_ELG, top_k), _numbers(late_ELG[::-1], top_k)[::-1]
    fewer_ELG = (before * np.cumsum(after, axis=1)[:, ::-1]).sum(axis=1)
    rate_ELG = weight_LE.T[:, :, None] * time_G * late_ELG
    return np.asarray((rate_ELG * fewer_ELG).sum(axis=2).T * (_LOG_TIME_G[1] - _LOG_TIME_G[0]))


def _numbers(late_ELG: Floats, top_k: int) -> Floats:
    """P(n of the experts before E in the list have come), n from 0 to K - 1: [E, K, L, G]."""
    experts, layers, times = late_ELG.shape
    found = np.zeros((experts, top_k, layers, times))
    found[0, 0] = 1.0
    for expert in range(experts - 1):
        late_LG = late_ELG[expert]
        found[expert + 1] = found[expert] * late_LG
        found[expert + 1, 1:] += found[expert, :-1] * (1.0 - late_LG)
    return found
