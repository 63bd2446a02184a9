"""What recorder, expert-parallel path, codec, checks and kernels ask of a router, as data: one entry per router.

Nothing else in moesim compares the kind of a router with a name; laws in the tests hold the three ways to its gates to
each other. Legend: K selections per token, s affinities.
"""

from dataclasses import dataclass
from typing import Literal

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
