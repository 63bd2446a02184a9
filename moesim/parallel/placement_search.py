"""Placement by local search: slots change ranks while a layer is estimated to take less time, traffic included.

EPLB looks at rows alone. Here a layer costs what its busiest rank computes and gets sent: experts that tokens choose
together are worth a place on one rank, or on one node, where a token is sent once for both. The estimate is rough (rows
and copies times a price each, nothing overlapped); a search that finds nothing better returns one of its starts.

Legend: Z slots of all ranks, which keep their experts and rows while they change ranks, D ranks, J nodes, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Array = NDArray[Any]

MEAN_SHARE = 0.1  # of a mean rank's traffic beside that of the busiest: more bytes are never free
HOT_TRIES = 0.5  # share of tries that begin at the rank with most rows


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Seconds of a row that a rank computes, of a copy of a token to a rank, and of one to a node."""

    row: float
    rank_copy: float
    node_copy: float


@dataclass(eq=False)
class SearchState:
    """Where slots are, and what follows from it. reach_D, reach_M: tokens with a slot on the rank, on the node.

    speed_D: of the ranks against each other.
    """

    tokens_Z: Sequence[Ints]
    rank_Z: Ints
    node_D: Ints
    prices: Prices
    num_tokens: int
    speed_D: NDArray[np.float64]
    rows_D: Ints = field(init=False)
    count_DT: Array = field(init=False)
    count_JT: Array = field(init=False)
    reach_D: Ints = field(init=False)
    reach_J: Ints = field(init=False)

    def __post_init__(self) -> None:
        ranks, nodes = len(self.node_D), int(self.node_D.max()) + 1
        self.count_DT = np.zeros((ranks, self.num_tokens), dtype=np.int16)
        self.count_JT = np.zeros((nodes, self.num_tokens), dtype=np.int16)
        self.rows_D = np.zeros(ranks, dtype=np.int64)
        for tokens, rank in zip(self.tokens_Z, self.rank_Z.tolist(), strict=True):
            self.rows_D[rank] += len(tokens)
            self.count_DT[rank, tokens] += 1
            self.count_JT[self.node_D[rank], tokens] += 1
        self.reach_D = (self.count_DT > 0).sum(axis=1)
        self.reach_J = (self.count_JT > 0).sum(axis=1)

    @property
    def load_D(self) -> NDArray[np.float64]:
        """Rows of every rank over its speed."""
        return np.asarray(self.rows_D / self.speed_D)

    def cost(self) -> float:
        """Seconds of the layer."""
        copies = self.reach_D.max() + MEAN_SHARE * self.reach_D.mean()
        crossing = self.reach_J.max() + MEAN_SHARE * self.reach_J.mean()
        return float(
            self.prices.row * self.load_D.max() + self.prices.rank_copy * copies + self.prices.node_copy * crossing
        )

    def swap(self, one: int, other: int) -> None:
        """Two slots change ranks; a second time undoes it."""
        first, second = int(self.rank_Z[one]), int(self.rank_Z[other])
        mine, theirs = self.tokens_Z[one], self.tokens_Z[other]
        self.rows_D[first] += len(theirs) - len(mine)
        self.rows_D[second] += len(mine) - len(theirs)
        _exchange(self.count_DT, self.reach_D, (first, mine), (second, theirs))
        nodes = int(self.node_D[first]), int(self.node_D[second])
        if nodes[0] != nodes[1]:
            _exchange(self.count_JT, self.reach_J, (nodes[0], mine), (nodes[1], theirs))
        self.rank_Z[one], self.rank_Z[other] = second, first


def _exchange(count_DT: Array, reach_D: Ints, gives: tuple[int, Ints], takes: tuple[int, Ints]) -> None:
    """The tokens of two slots change places. Those of both are counted twice, which cancels: they stay as they are."""
    (first, mine), (second, theirs) = gives, takes
    both = np.concatenate([mine, theirs])
    for place, out, into in ((first, mine, theirs), (second, theirs, mine)):
        count_T = count_DT[place]
        before = np.count_nonzero(count_T[both])
        count_T[out] -= 1
        count_T[into] += 1
        reach_D[place] += np.count_nonzero(count_T[both]) - before


def search_ranks(
    tokens_Z: Sequence[Ints],
    starts: Sequence[Ints],
    *,
    node_D: Ints,
    speed_D: NDArray[np.float64],
    prices: Prices,
    num_tokens: int,
    tries: int,
    rng: np.random.Generator,
) -> tuple[Ints, float]:
    """The rank of every slot, with as many slots on each rank as in the starts, and its cost, no higher than theirs.

    `tokens_Z`: the tokens with a row in each slot. `starts`: ranks of all slots; each is improved by `tries`
    exchanges. `speed_D`: of the ranks against each other.
    """
    best: tuple[Ints, float] | None = None
    for start in starts:
        state = SearchState(tokens_Z, start.copy(), node_D, prices, num_tokens, speed_D)
        cost = _improve(state, tries=tries, rng=rng)
        if best is None or cost < best[1]:
            best = state.rank_Z, cost
    assert best is not None
    return best


def _improve(state: SearchState, *, tries: int, rng: np.random.Generator) -> float:
    cost, slots = state.cost(), len(state.rank_Z)
    from_hot_N = rng.random(tries) < HOT_TRIES
    one_N, other_N = rng.integers(slots, size=(2, tries)).tolist()
    for from_hot, one, other in zip(from_hot_N.tolist(), one_N, other_N, strict=True):
        if from_hot:
            hot_Z = np.flatnonzero(state.rank_Z == state.load_D.argmax())
            one = int(hot_Z[one % len(hot_Z)])
        if state.rank_Z[one] == state.rank_Z[other]:
            continue
        state.swap(one, other)
        changed = state.cost()
        if changed < cost:
            cost = changed
        else:
            state.swap(one, other)
    return cost
