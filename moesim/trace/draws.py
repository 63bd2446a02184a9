"""Random selections of K distinct experts per token, vectorised over tokens: by popularity, or to stated loads.

Plain draws by popularity load experts as stated on average only: the busiest of many ranks is then above its share by
chance. `draw_with_quotas` loads every expert of every block of tokens as stated, to whole rows: tokens are drawn
likewise, and the few rows that a block has beyond the quota of their expert go to experts that miss some. Which experts
go together stays a matter of chance.

Legend: T tokens, K selections, E experts, G groups, M group limit, B blocks of tokens, N rows, C cells (an expert in a
block), F those beyond their quota.
"""

from collections.abc import Callable
from dataclasses import dataclass
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


def capped_shares(shares_E: Array, *, total: float, most: float = 1.0) -> Floats:
    """Numbers in proportion to `shares_E`, `total` in sum and none above `most`: what is cut off goes to the others.

    With total = K they are the shares of tokens that choose each expert. There are at least `total` positive shares.
    """
    shares_E = np.asarray(shares_E, dtype=np.float64)
    assert (shares_E > 0).sum() >= total
    full_E = np.zeros(len(shares_E), dtype=bool)
    while True:
        rest = shares_E[~full_E].sum()
        factor = (total - most * full_E.sum()) / rest if rest > 0 else 0.0
        capped_E = np.where(full_E, most, shares_E * factor)
        if (over_E := capped_E > most * (1 + 1e-12)).any():
            full_E |= over_E
            continue
        return np.minimum(capped_E, most)


def shares_of_counts(counts_LE: Floats, *, top_k: int) -> Floats:
    """Shares of the tokens that choose each expert: in proportion to the counts, at most 0.999, K in sum."""
    most = _MOST_SHARE if top_k < counts_LE.shape[1] else 1.0
    return np.stack([capped_shares(counts_E, total=top_k, most=most) for counts_E in counts_LE])


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


_MOST_CHOSEN = 1.0 - 1e-4  # of all tokens: beyond, weights grow without end; the settling does the rest
_GOLDEN = (5**0.5 - 1) / 2  # its multiples are spread evenly over 0 to 1 however many are taken
_NEVER = 1e-30  # weight of an expert that nobody chooses: it comes last among those of allowed groups
_EDGE = 1e-6  # of a row: more than the round-off of a sum of shares
_DIRECT_ROUNDS, _MOST_ROUNDS = 6, 60


def whole_quotas(chosen_E: Array, *, tokens_B: Array, order_E: Array, start: float) -> NDArray[np.int64]:
    """Rows of every expert in blocks of so many tokens, int64 [B, E], from the shares of tokens that choose each.

    They add up to K per token. Any run of experts in `order_E` has its exact rows rounded down or up in every block,
    and its mean over neighbouring blocks is exact but for the rows of a few: `start` (0 to 1) and the golden ratio say
    which blocks round up.
    """
    offset_B = np.clip((start + _GOLDEN * np.arange(len(tokens_B))) % 1.0, _EDGE, 1.0 - _EDGE)
    sums_BE = tokens_B[:, None] * np.cumsum(chosen_E[order_E]) + offset_B[:, None]
    quotas_BE = np.empty((len(tokens_B), len(order_E)), dtype=np.int64)
    quotas_BE[:, order_E] = np.diff(np.floor(sums_BE), axis=1, prepend=0.0).astype(np.int64)
    return quotas_BE


def draw_with_quotas(
    shares_E: Array,
    *,
    tokens_B: Array,
    top_k: int,
    order_E: Array | None = None,
    num_groups: int = 1,
    group_limit: int = 1,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Experts of the tokens of all blocks, [T, K], T the sum of `tokens_B`: rows in proportion to `shares_E`.

    Rows are those of `whole_quotas`, rarely one more or less in blocks of few tokens. No expert gets more rows than
    tokens; what it would have beyond goes to the others. `order_E`: experts whose sums (those of a rank)
    are to be even stand side by side in it. With a limit each token reaches M groups, which are themselves drawn by
    quota; quotas of experts then hold but for the few rows of a block for which no way is found.
    """
    num_experts = len(shares_E)
    order_E = np.arange(num_experts) if order_E is None else order_E
    tokens_B = np.asarray(tokens_B)
    chosen_E = capped_shares(shares_E, total=top_k)
    num_tokens = int(tokens_B.sum())
    allowed_TG = None
    if num_groups > 1 and group_limit < num_groups:
        shares_G = np.maximum(
            chosen_E.reshape(num_groups, -1).sum(axis=1), _NEVER
        )  # M groups even where fewer have rows
        within_E = chosen_E / np.repeat(capped_shares(shares_G, total=group_limit), num_experts // num_groups)
        groups_TM = draw_with_quotas(shares_G, tokens_B=tokens_B, top_k=group_limit, rng=rng)
        allowed_TG = np.zeros((num_tokens, num_groups), dtype=bool)
        np.put_along_axis(allowed_TG, groups_TM, True, axis=1)
        ids_TK = _draw_in_groups(_weights(within_E), allowed_TG, top_k=top_k, rng=rng)
    else:
        ids_TK = _draw_with_certain(chosen_E, num_tokens, top_k=top_k, rng=rng)
    quotas_BE = whole_quotas(chosen_E, tokens_B=tokens_B, order_E=order_E, start=rng.random())
    settling = _QuotaRebalancer(
        ids_TK=ids_TK,
        tokens_B=tokens_B,
        allowed_TG=allowed_TG,
        group_size=num_experts // num_groups,
        rng=rng,
    )
    settling.rebalance(quotas_BE)
    return ids_TK


def _weights(chosen_E: Array) -> NDArray[np.float64]:
    """Weights by which about that share of tokens chooses each expert: rates of exponential keys up to one moment."""
    return np.asarray(-np.log1p(-np.minimum(chosen_E, _MOST_CHOSEN)))


def _draw_with_certain(chosen_E: Array, num_tokens: int, *, top_k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """K distinct experts per token: those that every token chooses, and others by weight."""
    certain = np.flatnonzero(chosen_E >= 1.0)[:top_k]
    ids_TK = np.empty((num_tokens, top_k), dtype=np.int64)
    ids_TK[:, : len(certain)] = certain
    if len(certain) < top_k:
        others_E = np.where(chosen_E >= 1.0, 0.0, _weights(chosen_E))
        ids_TK[:, len(certain) :] = draw_by_weight(num_tokens, weights_E=others_E, top_k=top_k - len(certain), rng=rng)
    return ids_TK


def _draw_in_groups(weights_E: Array, allowed_TG: Array, *, top_k: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """K distinct experts per token by weight among those of its groups: exponential keys, the smallest first."""
    num_tokens, num_groups = allowed_TG.shape
    num_experts = len(weights_E)
    scale_E = (1.0 / np.maximum(weights_E, _NEVER)).astype(np.float32)
    ids_TK = np.empty((num_tokens, top_k), dtype=np.int64)
    chunk = max(1, _CHUNK_VALUES // num_experts)
    for first in range(0, num_tokens, chunk):
        allowed = allowed_TG[first : first + chunk]
        keys_TE = rng.standard_exponential((len(allowed), num_experts), dtype=np.float32) * scale_E
        keys_TE.reshape(len(allowed), num_groups, -1)[~allowed] = np.inf
        ids_TK[first : first + chunk] = np.argpartition(keys_TE, top_k - 1, axis=1)[:, :top_k]
    return ids_TK


@dataclass(frozen=True, kw_only=True, eq=False)
class _QuotaRebalancer:
    """Moves rows of `ids_TK` (in place) from experts beyond their quota in a block to those below it."""

    ids_TK: Array
    tokens_B: Array
    allowed_TG: Array | None
    group_size: int
    rng: np.random.Generator

    def rebalance(self, quotas_BE: Array) -> None:
        """Rows beyond a quota are paired with gaps of the same block, and paired anew where a pair does not fit.

        From the seventh round on through a third row of the block: it fills the gap, and its expert goes where the
        row beyond its quota was. Chance finds no such row where nearly all tokens have the expert of the gap: what is
        left is looked for in the whole block, unless groups are the reason.
        """
        rows_N, block_N, gap_N = self._beyond(quotas_BE)
        for number in range(_MOST_ROUNDS):
            if not len(rows_N):
                return
            shuffled_N = np.lexsort((self.rng.random(len(gap_N)), block_N))
            gap_N = gap_N[shuffled_N]  # rows are ordered by block, so blocks stay in place
            third_N = None if number < _DIRECT_ROUNDS else self._rows_in(block_N)
            fits_N = self._move(rows_N, gap_N, third_N)
            rows_N, block_N, gap_N = rows_N[~fits_N], block_N[~fits_N], gap_N[~fits_N]
        for row, block, gap in zip(rows_N, block_N, gap_N, strict=True) if self.allowed_TG is None else ():
            self._search(int(row), int(block), int(gap))

    def _beyond(self, quotas_BE: Array) -> tuple[Array, Array, Array]:
        """Rows beyond their quota, their blocks in ascending order, and as many experts that miss a row there."""
        num_experts, quota_C = quotas_BE.shape[1], quotas_BE.reshape(-1)
        first_N = np.repeat(np.arange(0, len(quota_C), num_experts), self.tokens_B * self.ids_TK.shape[1])
        cell_N = first_N + self.ids_TK.reshape(-1)
        count_C = np.bincount(cell_N, minlength=len(quota_C))
        full_C = count_C > quota_C
        candidates_N = self.rng.permutation(np.flatnonzero(full_C[cell_N]))
        number_C = np.cumsum(full_C) - 1
        narrow = np.uint16 if number_C[-1] < 2**16 else np.int64  # few cells are sorted by their digits
        order_N = np.argsort(number_C.astype(narrow)[cell_N[candidates_N]], kind="stable")
        candidates_N, count_F = candidates_N[order_N], count_C[full_C]  # those of a cell side by side
        place_N = np.arange(len(candidates_N)) - np.repeat(np.cumsum(count_F) - count_F, count_F)
        rows_N = candidates_N[place_N < np.repeat(count_F - quota_C[full_C], count_F)]
        missing = np.repeat(np.arange(len(quota_C)), np.maximum(quota_C - count_C, 0))
        return rows_N, cell_N[rows_N] // num_experts, missing % num_experts

    def _rows_in(self, block_N: Array) -> Array:
        """A random row of each of the blocks."""
        first_B = np.cumsum(self.tokens_B) - self.tokens_B
        tokens_N = first_B[block_N] + (self.rng.random(len(block_N)) * self.tokens_B[block_N]).astype(np.int64)
        top_k = self.ids_TK.shape[1]
        return np.asarray(tokens_N * top_k + self.rng.integers(top_k, size=len(block_N)))

    def _move(self, rows_N: Array, gap_N: Array, third_N: Array | None) -> Array:
        """Fill gaps where tokens stay with distinct experts of their groups; which were filled."""
        flat = self.ids_TK.reshape(-1)
        top_k = self.ids_TK.shape[1]
        if third_N is None:
            fits_N = self._may_take(rows_N // top_k, gap_N)
            fits_N &= _first_of(rows_N // top_k, fits_N)
            flat[rows_N[fits_N]] = gap_N[fits_N]
            return fits_N
        passed_N = flat[third_N].copy()
        token_N, other_N = rows_N // top_k, third_N // top_k
        fits_N = self._may_take(other_N, gap_N) & self._may_take(token_N, passed_N) & (token_N != other_N)
        both = np.stack([token_N, other_N], axis=1)
        fits_N &= _first_of(both.reshape(-1), np.repeat(fits_N, 2)).reshape(-1, 2).all(axis=1)
        flat[third_N[fits_N]] = gap_N[fits_N]
        flat[rows_N[fits_N]] = passed_N[fits_N]
        return np.asarray(fits_N)

    def _search(self, row: int, block: int, gap: int) -> None:
        """Fill one gap through any third row of the block, if there is one."""
        top_k = self.ids_TK.shape[1]
        first = int(self.tokens_B[:block].sum())
        tokens_N = np.repeat(np.arange(first, first + self.tokens_B[block]), top_k)
        passed_N = self.ids_TK[first : first + self.tokens_B[block]].reshape(-1)
        fits_N = self._may_take(tokens_N, np.full(len(tokens_N), gap))
        fits_N &= self._may_take(np.full(len(tokens_N), row // top_k), passed_N)
        if fits_N.any():
            third = first * top_k + int(self.rng.choice(np.flatnonzero(fits_N)))
            self._move(np.array([row]), np.array([gap]), np.array([third]))

    def _may_take(self, token_N: Array, expert_N: Array) -> NDArray[np.bool_]:
        """Whether the tokens have not chosen the experts yet, and reach their groups."""
        fits_N: NDArray[np.bool_] = (self.ids_TK[token_N] != expert_N[:, None]).all(axis=1)
        if self.allowed_TG is not None:
            fits_N &= self.allowed_TG[token_N, expert_N // self.group_size]
        return fits_N


def _first_of(values_N: Array, counted_N: Array) -> Array:
    """True at the first counted place of each value: at most one change of a token at a time."""
    first_N = np.zeros(len(values_N), dtype=bool)
    places = np.flatnonzero(counted_N)
    first_N[places[np.unique(values_N[places], return_index=True)[1]]] = True
    return first_N
