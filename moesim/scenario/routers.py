"""Routers and stress patterns as data: one entry each in a table, and nothing else in moesim names one.

Recorder, expert-parallel path, codec, checks and kernels ask the entry of a router; laws in the tests hold the three
ways to its gates to each other.
Legend: D ranks of an expert group, E experts, K selections per token, P phases; s affinities.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Affinity = Literal["softmax", "sigmoid", "logits", "none"]


@dataclass(frozen=True, kw_only=True)
class RouterFacts:
    """The facts of one router.

    affinity: what s are of the logits; "logits" themselves are selected by, and their softmax over the K weighs; "none"
    of what does not look at the tokens. Gates are s (1/K without s), divided by their sum over the token
    (`normalised`), times the router's factor (`scaled`). biased: a bias that loss-free balancing moves is added to s
    for the selection. module: "module:class" of its torch module, imported when one is built; None for what nothing
    routes by again. learned: it has centroids that are trained. by_experts: experts choose their tokens, so that tokens
    have any number. best_of: how many of its best experts make the score of a group. grouped: whether scenarios may
    give it groups. fixed_k: the only K that it has, where there is one. random_second: whether the second expert may be
    left to chance. pads: whether tokens may be padding, which goes to no expert. drawn: it is not recorded, its experts
    are drawn by how popular they are.
    """

    name: str
    affinity: Affinity = "softmax"
    normalised: bool = False
    scaled: bool = False
    biased: bool = False
    module: str | None = "moesim.routing.routers:LearnedRouter"
    learned: bool = True
    by_experts: bool = False
    best_of: int = 1
    grouped: bool = False
    fixed_k: int | None = None
    random_second: bool = False
    pads: bool = False
    drawn: bool = False

    @property
    def sums_to_one(self) -> bool:
        """Whether what the balance losses see of a token is a softmax, so that they need not normalise it."""
        return self.affinity != "sigmoid"


DEEPSEEK_MOE = RouterFacts(name="deepseek_moe")
DEEPSEEK_V2 = RouterFacts(name="deepseek_v2", scaled=True, grouped=True)
POPULARITY = RouterFacts(
    name="popularity",
    affinity="none",
    learned=False,
    module="moesim.routing.routers:PopularityRouter",
    drawn=True,
)
ROUTERS = {
    facts.name: facts
    for facts in (
        RouterFacts(name="switch", fixed_k=1),
        RouterFacts(
            name="gshard", normalised=True, fixed_k=2, random_second=True, module="moesim.routing.routers:GshardRouter"
        ),
        RouterFacts(
            name="topk_softmax", affinity="logits", normalised=True, module="moesim.routing.routers:TopKSoftmaxRouter"
        ),
        DEEPSEEK_MOE,
        DEEPSEEK_V2,
        RouterFacts(
            name="deepseek_v3",
            affinity="sigmoid",
            normalised=True,
            scaled=True,
            biased=True,
            best_of=2,
            grouped=True,
        ),
        RouterFacts(name="expert_choice", by_experts=True, module="moesim.routing.routers:ExpertChoiceRouter"),
        RouterFacts(name="hash", affinity="none", learned=False, module="moesim.routing.routers:HashRouter"),
        RouterFacts(name="uniform", affinity="none", learned=False, module="moesim.routing.routers:UniformRouter"),
        POPULARITY,
        RouterFacts(
            name="balancedness", affinity="none", learned=False, module=None
        ),  # drawn for the ranks of a layout
        RouterFacts(name="stress", affinity="none", learned=False, module=None, pads=True),  # likewise
        RouterFacts(name="recorded", learned=False, module=None),  # by others, with the gates that they recorded
        RouterFacts(name="selections", affinity="none", learned=False, module=None),  # by others, without gates
    )
}


def facts_in_training(kind: str) -> RouterFacts:
    """The router that ranks train with: the one of that kind, or a plain softmax where the routing is only given."""
    facts = ROUTERS.get(kind)
    return facts if facts is not None and facts.learned else DEEPSEEK_MOE


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
