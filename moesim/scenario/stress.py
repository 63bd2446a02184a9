"""Patterns of stress routing, as data: one table, one entry per pattern, nothing else in moesim names a pattern.

Legend: E experts, D ranks of an expert group, K selections, P phases.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class StressLayout:
    """What a pattern may look at: the rank of every expert, int64 [E], and K."""

    rank_of_expert_E: Array
    top_k: int

    @property
    def num_ranks(self) -> int:
        """Ranks of the expert group."""
        return int(self.rank_of_expert_E.max()) + 1


Worst = Callable[[StressLayout, Array, int], Array]


def even(layout: StressLayout, order_E: Array, phase: int) -> Array:
    """Shares of the rows of every expert, [E]: all the same."""
    return np.full(len(order_E), 1.0 / len(order_E))


def one_expert(layout: StressLayout, order_E: Array, phase: int) -> Array:
    """Every token chooses the first expert of `order_E`; its other K - 1 experts are spread evenly."""
    return _with_hot(np.arange(len(order_E)) == order_E[0], 1.0 / layout.top_k)


def one_rank(layout: StressLayout, order_E: Array, phase: int) -> Array:
    """Every token has as many of its K experts on one rank as that holds; each phase it is the next rank."""
    hot_rank = (layout.rank_of_expert_E[order_E[0]] + phase) % layout.num_ranks
    hot_E = layout.rank_of_expert_E == hot_rank
    return _with_hot(hot_E, min(layout.top_k, int(hot_E.sum())) / layout.top_k)


def zipf(layout: StressLayout, order_E: Array, phase: int) -> Array:
    """Zipf's law: the n-th expert of `order_E` has a share in proportion to 1 / n."""
    shares_E = np.empty(len(order_E))
    shares_E[order_E] = 1.0 / np.arange(1, len(order_E) + 1)
    return np.asarray(shares_E / shares_E.sum())


def _with_hot(hot_E: Array, share: float) -> Array:
    """The hot experts share `share` of the rows evenly, the others the rest."""
    num_hot, num_others = int(hot_E.sum()), int((~hot_E).sum())
    return np.where(hot_E, share / num_hot, (1.0 - share) / max(1, num_others))


@dataclass(frozen=True, kw_only=True)
class StressFacts:
    """The facts of one pattern.

    worst: shares of the rows of every expert at severity 1, of the layout, of the experts in an order that is drawn
    for every layer, and of the phase; they never ask for more rows of an expert than there are tokens, but by a law
    that is then cut off. num_phases: the micro-batches of a step are in so many phases in turn. hot_phases: so many of
    them are at `worst`, the others even; None: all. live: which shares of its tokens the sequences route at severity 1,
    in turn; the rest is padding that no expert sees.
    """

    name: str
    about: str
    worst: Worst = even
    num_phases: int = 1
    hot_phases: int | None = None
    live: tuple[float, ...] = (1.0,)

    def shares_E(self, layout: StressLayout, *, order_E: Array, phase: int, severity: float) -> Array:
        """Shares of the rows of every expert in a phase, [E]: from even at severity 0 to `worst` at 1."""
        even_E = even(layout, order_E, phase)
        if self.hot_phases is not None and phase >= self.hot_phases:
            return even_E
        return np.asarray((1.0 - severity) * even_E + severity * self.worst(layout, order_E, phase))

    def live_share(self, sequence: int, *, severity: float) -> float:
        """Share of the tokens of a sequence that are routed."""
        return 1.0 - severity * (1.0 - self.live[sequence % len(self.live)])


STRESS = {
    facts.name: facts
    for facts in (
        StressFacts(name="balanced", about="all experts get the same rows, to whole rows"),
        StressFacts(name="hot_expert", about="every token chooses one certain expert of the layer", worst=one_expert),
        StressFacts(name="hot_rank", about="every token has as many experts on one rank as that holds", worst=one_rank),
        StressFacts(name="skewed", about="experts are chosen by Zipf's law, 1 / n for the n-th", worst=zipf),
        StressFacts(
            name="ragged_sources",
            about="sequences route all, three, two or one quarter of their tokens; the rest is padding",
            live=(1.0, 0.75, 0.5, 0.25),
        ),
        StressFacts(
            name="empty_sources", about="one sequence of four is padding alone and routes no token", live=(1, 1, 1, 0)
        ),
        StressFacts(
            name="rotating_hotspot",
            about="as hot_rank, but the next rank in every micro-batch, eight in turn",
            worst=one_rank,
            num_phases=8,
        ),
        StressFacts(
            name="burst",
            about="one micro-batch of four is as hot_rank, the others are balanced",
            worst=one_rank,
            num_phases=4,
            hot_phases=1,
        ),
    )
}
