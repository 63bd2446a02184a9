"""K distinct experts per token such that every block of tokens loads every expert as stated, to whole rows.

Plain draws by popularity (`moesim.trace.selection`) load experts as stated on average only: the busiest of many ranks
is then above its share by chance. Here tokens are drawn likewise, and the few rows that a block has beyond the quota of
their expert go to experts that miss some. Which experts go together stays a matter of chance.

Legend: T tokens, K selections, E experts, B blocks of tokens, G groups, M group limit, N rows.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.trace.selection import draw_by_weight

Array = NDArray[Any]

_MOST_CHOSEN = 1.0 - 1e-4  # of all tokens: beyond, weights grow without end; the settling does the rest
_GOLDEN = (5**0.5 - 1) / 2  # its multiples are spread evenly over 0 to 1 however many are taken
_NEVER = 1e-30  # weight of an expert that nobody chooses: it comes last among those of allowed groups
_EDGE = 1e-6  # of a row: more than the round-off of a sum of shares
_DIRECT_ROUNDS, _ROUNDS = 6, 60
_CHUNK_VALUES = 1 << 23


def capped_shares(shares_E: Array, *, total: float) -> NDArray[np.float64]:
    """Numbers in proportion to `shares_E` that add up to `total`, none above 1: what is cut off goes to the others.

    With total = K they are the shares of tokens that choose each expert. There are at least `total` positive shares.
    """
    shares_E = np.asarray(shares_E, dtype=np.float64)
    assert (shares_E > 0).sum() >= total
    full_E = np.zeros(len(shares_E), dtype=bool)
    while True:
        rest = shares_E[~full_E].sum()
        factor = (total - full_E.sum()) / rest if rest > 0 else 0.0
        capped_E = np.where(full_E, 1.0, shares_E * factor)
        if (over_E := capped_E > 1.0 + 1e-12).any():
            full_E |= over_E
            continue
        return np.minimum(capped_E, 1.0)


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
    settling = _Settling(
        ids_TK=ids_TK,
        tokens_B=tokens_B,
        allowed_TG=allowed_TG,
        group_size=num_experts // num_groups,
        rng=rng,
    )
    settling.settle(quotas_BE)
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
class _Settling:
    """Moves rows of `ids_TK` (in place) from experts beyond their quota in a block to those below it."""

    ids_TK: Array
    tokens_B: Array
    allowed_TG: Array | None
    group_size: int
    rng: np.random.Generator

    def settle(self, quotas_BE: Array) -> None:
        """Rows beyond a quota are paired with gaps of the same block, and paired anew where a pair does not fit.

        From the seventh round on through a third row of the block: it fills the gap, and its expert goes where the
        row beyond its quota was. Chance finds no such row where nearly all tokens have the expert of the gap: what is
        left is looked for in the whole block, unless groups are the reason.
        """
        rows_N, block_N, gap_N = self._beyond(quotas_BE)
        for number in range(_ROUNDS):
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
        num_blocks, num_experts = quotas_BE.shape
        top_k = self.ids_TK.shape[1]
        block_N = np.repeat(np.arange(num_blocks), self.tokens_B * top_k)
        cell_N = block_N * num_experts + self.ids_TK.reshape(-1)
        counts_BE = np.bincount(cell_N, minlength=quotas_BE.size).reshape(quotas_BE.shape)
        surplus_BE = np.maximum(counts_BE - quotas_BE, 0)
        candidates_N = self.rng.permutation(np.flatnonzero(surplus_BE.reshape(-1)[cell_N]))
        candidates_N = candidates_N[np.argsort(cell_N[candidates_N], kind="stable")]
        cells_N = cell_N[candidates_N]
        place_N = np.arange(len(cells_N)) - np.searchsorted(cells_N, cells_N, side="left")
        rows_N = candidates_N[place_N < surplus_BE.reshape(-1)[cells_N]]
        missing = np.repeat(np.arange(quotas_BE.size), np.maximum(quotas_BE - counts_BE, 0).reshape(-1))
        return rows_N, block_N[rows_N], missing % num_experts

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
