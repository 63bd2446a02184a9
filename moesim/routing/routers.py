"""Every router: from a token's hidden state to the experts that compute it and the gates that weigh them.

Legend: T tokens, H hidden size, E routed experts, K selections per token, G groups, B hash buckets.

All routers share one signature, `router(hidden_TH, inputs) -> Routing`, and are built by `build_router`. Ties go to the
lowest expert id: the best K are taken by K times argmax, which names the first maximum (as fast as topk for these K).
"""

import importlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import RouterShape

NUM_HASH_BUCKETS = 4096
LOGIT_STD_AT_START = 0.5  # DeepSeek-V2 starts at 0.006 * sqrt(5120) = 0.43
LEAST_TOP_LOGIT = -60.0  # sigmoid(x) = e^x in float32 long above it, and 1e27 more until it is 0


class Routing(NamedTuple):
    """What a router decided for T tokens.

    `expert_ids_TK` (int64, -1 where a token has fewer selections), `gates_TK` (weights of the expert outputs, 0 where
    the id is -1), `affinities_TK` (the router's own scores s of the selected experts: they rank rows when capacity
    drops some; 0 where the id is -1) and `probabilities_TE` (s as the balance losses want it: of all experts, softmax
    over logits where s are logits; up to a positive factor per token unless its facts say `sums_to_one`; None for
    routers without affinities).
    """

    expert_ids_TK: Tensor
    gates_TK: Tensor
    affinities_TK: Tensor
    probabilities_TE: Tensor | None


class RouterInputs(NamedTuple):
    """What else a router may look at: `hash_keys_T` (int64, fixed routing), `generator` (CPU; random routing)."""

    hash_keys_T: Tensor
    generator: torch.Generator


def top_ids(scores_TE: Tensor, num: int) -> Tensor:
    """Ids [T, num] of the largest scores per row, best first, the lower id first among equals; no gradient."""
    assert num <= scores_TE.shape[1]
    left_TE = scores_TE.detach().clone()
    columns = []
    for _ in range(num):
        best_T1 = left_TE.argmax(dim=-1, keepdim=True)
        columns.append(best_T1)
        left_TE.scatter_(1, best_T1, -math.inf)
    return torch.cat(columns, dim=1)


def limit_groups(scores_TE: Tensor, *, num_groups: int, group_limit: int, best_of: int) -> Tensor:
    """Scores [T, E] with every expert outside the `group_limit` best groups set to -inf; no gradient.

    A group's score is the sum of its `best_of` best scores (1: the maximum, DeepSeek-V2; 2: DeepSeek-V3). -inf and not
    0: with 0 an unselected expert beats a selected one whose score is negative, and the limit breaks.
    """
    scores_TE = scores_TE.detach()
    if group_limit >= num_groups:
        return scores_TE
    scores_TGE = scores_TE.view(len(scores_TE), num_groups, -1)
    group_scores_TG = scores_TGE.amax(dim=2)
    if best_of > 1 and scores_TGE.shape[2] > 1:
        group_scores_TG = scores_TGE.topk(min(best_of, scores_TGE.shape[2]), dim=2).values.sum(dim=2)
    kept_TM = top_ids(group_scores_TG, group_limit)
    dropped_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, kept_TM, False)
    return scores_TGE.masked_fill(dropped_TG.unsqueeze(2), -math.inf).view(scores_TE.shape)


class LearnedRouter(nn.Module):
    """A router with one centroid per expert: logits = hidden . centroid, always in float32.

    This class routes by the router's facts alone: Switch (arXiv 2101.03961), DeepSeekMoE (arXiv 2401.06066) and OLMoE,
    DeepSeek-V2 (arXiv 2405.04434) and -V3 (arXiv 2412.19437), and any other that selects the K best of s within the M
    best groups. A bias b (buffer `bias_E`) selects as s + b, never weighs and has no gradient;
    `moesim.routing.balance.loss_free_update` moves it.
    """

    bias_E: Tensor

    def __init__(self, hidden: int, shape: RouterShape) -> None:
        super().__init__()
        self.shape, self.facts = shape, ROUTERS[shape.kind]
        assert self.facts.fixed_k in (None, shape.top_k)
        self.centroids_EH = nn.Parameter(torch.empty(shape.num_experts, hidden))
        if self.facts.biased:
            self.register_buffer("bias_E", torch.zeros(shape.num_experts))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the centroids so that unit-variance hidden states give logits of `LOGIT_STD_AT_START`."""
        std = LOGIT_STD_AT_START / math.sqrt(self.centroids_EH.shape[1])
        nn.init.normal_(self.centroids_EH, std=std, generator=generator)

    def forward(self, hidden_TH: Tensor, inputs: RouterInputs) -> Routing:
        """Route `hidden_TH`."""
        with torch.autocast(hidden_TH.device.type, enabled=False):
            return self.route(hidden_TH.float() @ self.centroids_EH.T, inputs)

    def route(self, logits_TE: Tensor, inputs: RouterInputs) -> Routing:
        """Select and weigh experts from logits: the router's formula."""
        del inputs
        is_sigmoid = self.facts.affinity == "sigmoid"
        affinities_TE = logits_TE.sigmoid() if is_sigmoid else logits_TE.softmax(dim=-1)
        expert_ids_TK = self.select(affinities_TE)
        affinities_TK = affinities_TE.gather(1, expert_ids_TK)
        probabilities_TE = _without_underflow(affinities_TE, logits_TE) if is_sigmoid else affinities_TE
        return Routing(expert_ids_TK, self.weigh(affinities_TK), affinities_TK, probabilities_TE)

    def select(self, affinities_TE: Tensor) -> Tensor:
        """Ids [T, K] of the selected experts: the best of s (+ b) within the best groups."""
        shape = self.shape
        limited_TE = limit_groups(
            affinities_TE + self.bias_E if self.facts.biased else affinities_TE,
            num_groups=shape.num_groups,
            group_limit=shape.group_limit,
            best_of=self.facts.best_of,
        )
        return top_ids(limited_TE, shape.top_k)

    def weigh(self, affinities_TK: Tensor) -> Tensor:
        """Gates [T, K] of the selected experts: s, divided by their sum and times the factor where the facts say so."""
        gates_TK = normalise(affinities_TK) if self.facts.normalised else affinities_TK
        return gates_TK * self.shape.routed_scaling_factor if self.facts.scaled else gates_TK


class GshardRouter(LearnedRouter):
    """GShard (arXiv 2006.16668): softmax, top-2, gates renormalised over the two.

    With `random_second` the second expert is used with probability min(1, 2 g2) (g2 its renormalised gate), else its id
    is -1; the first keeps its gate.
    """

    def route(self, logits_TE: Tensor, inputs: RouterInputs) -> Routing:
        """Top-2 of the softmax."""
        assert self.shape.top_k == 2
        affinities_TE = logits_TE.softmax(dim=-1)
        expert_ids_T2 = top_ids(affinities_TE, 2)
        affinities_T2 = affinities_TE.gather(1, expert_ids_T2)
        gates_T2 = affinities_T2 / affinities_T2.sum(dim=1, keepdim=True)
        if self.shape.random_second:
            draws_T = torch.rand(len(logits_TE), generator=inputs.generator).to(logits_TE.device)
            unused_T2 = torch.zeros_like(expert_ids_T2, dtype=torch.bool)
            unused_T2[:, 1] = draws_T >= 2 * gates_T2[:, 1]
            expert_ids_T2 = expert_ids_T2.masked_fill(unused_T2, -1)
            affinities_T2, gates_T2 = affinities_T2.masked_fill(unused_T2, 0), gates_T2.masked_fill(unused_T2, 0)
        return Routing(expert_ids_T2, gates_T2, affinities_T2, affinities_TE)


class TopKSoftmaxRouter(LearnedRouter):
    """Mixtral (arXiv 2401.04088) and Qwen3: top-K of the logits, gate = softmax over the selected logits only."""

    def route(self, logits_TE: Tensor, inputs: RouterInputs) -> Routing:
        """Affinities are the logits themselves; the balance losses use their softmax over all experts."""
        expert_ids_TK = top_ids(logits_TE, self.shape.top_k)
        logits_TK = logits_TE.gather(1, expert_ids_TK)
        return Routing(expert_ids_TK, logits_TK.softmax(dim=-1), logits_TK, logits_TE.softmax(dim=-1))


def normalise(scores_TX: Tensor) -> Tensor:
    """Scores >= 0 divided by their sum per token; zeros, with a gradient of 0, where all scores of a token are 0."""
    return scores_TX / scores_TX.sum(dim=1, keepdim=True).clamp_min(torch.finfo(scores_TX.dtype).tiny)


def _without_underflow(affinities_TE: Tensor, logits_TE: Tensor) -> Tensor:
    """Sigmoids; where all of a token's are tiny, times a factor: they are e^logit there, and so stay their ratios."""
    top_T1 = logits_TE.detach().amax(dim=1, keepdim=True)
    return torch.where(top_T1 < LEAST_TOP_LOGIT, (logits_TE - top_T1).exp(), affinities_TE)


class ExpertChoiceRouter(LearnedRouter):
    """Expert choice (arXiv 2202.09368): each expert takes its C = ceil(capacity_factor K T / E) best tokens.

    A token may get any number of experts, so the width of the answer is the largest number that any token got. A token
    sees the future through the competition for places: use it for routing studies, not for generation.
    """

    def route(self, logits_TE: Tensor, inputs: RouterInputs) -> Routing:
        """Top-C tokens of each expert's column; ties go to the earlier token."""
        affinities_TE = logits_TE.softmax(dim=-1)
        capacity = expert_choice_capacity(self.shape, len(logits_TE))
        ranked_TE = affinities_TE.detach().sort(dim=0, descending=True, stable=True).indices
        chosen_TE = torch.zeros_like(ranked_TE, dtype=torch.bool).scatter_(0, ranked_TE[:capacity], True)
        width = max(1, int(chosen_TE.sum(dim=1).max()))
        chosen_affinities_TE = affinities_TE.masked_fill(~chosen_TE, -1.0)
        expert_ids_TK = top_ids(chosen_affinities_TE, width)
        taken_TK = chosen_TE.gather(1, expert_ids_TK)
        gates_TK = affinities_TE.gather(1, expert_ids_TK).masked_fill(~taken_TK, 0)
        return Routing(expert_ids_TK.masked_fill(~taken_TK, -1), gates_TK, gates_TK, affinities_TE)


def expert_choice_capacity(shape: RouterShape, num_tokens: int) -> int:
    """C = ceil(capacity_factor K T / E), at most all T tokens."""
    return min(num_tokens, math.ceil(shape.capacity_factor * shape.top_k * num_tokens / shape.num_experts))


class FixedRouter(nn.Module):
    """A router without affinities: K distinct experts in at most M groups by top-K of given scores; gate = 1/K."""

    def __init__(self, shape: RouterShape) -> None:
        super().__init__()
        self.shape = shape

    def pick(self, scores_TE: Tensor) -> Routing:
        """The K best of `scores_TE` within the M best groups."""
        shape = self.shape
        limited_TE = limit_groups(scores_TE, num_groups=shape.num_groups, group_limit=shape.group_limit, best_of=1)
        expert_ids_TK = top_ids(limited_TE, shape.top_k)
        gates_TK = torch.full(expert_ids_TK.shape, 1 / shape.top_k, device=scores_TE.device)
        return Routing(expert_ids_TK, gates_TK, gates_TK, None)


class HashRouter(FixedRouter):
    """Fixed routing (arXiv 2106.04426): the token's key, not its hidden state, names its experts.

    Keys fall into `NUM_HASH_BUCKETS` buckets by a multiplicative hash; each bucket has its K experts, drawn once.
    """

    bucket_scores_BE: Tensor

    def __init__(self, shape: RouterShape) -> None:
        super().__init__(shape)
        self.register_buffer("bucket_scores_BE", torch.zeros(NUM_HASH_BUCKETS, shape.num_experts), persistent=False)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw every bucket's experts."""
        self.bucket_scores_BE.copy_(torch.rand(self.bucket_scores_BE.shape, generator=generator))

    def forward(self, hidden_TH: Tensor, inputs: RouterInputs) -> Routing:
        """Route by `inputs.hash_keys_T` alone."""
        buckets_T = (inputs.hash_keys_T * 0x9E3779B1 % 2**32) >> 20
        return self.pick(self.bucket_scores_BE[buckets_T])


class PopularityRouter(FixedRouter):
    """K distinct experts drawn by given popularity without replacement: top-K of log p + Gumbel noise."""

    log_popularity_E: Tensor

    def __init__(self, shape: RouterShape, *, popularity_E: Sequence[float]) -> None:
        super().__init__(shape)
        assert len(popularity_E) == shape.num_experts
        log_popularity_E = torch.tensor(popularity_E, dtype=torch.float64).log().float()
        # -1e30 and not -inf: an expert of popularity 0 stays choosable when fewer than K others are left
        self.register_buffer("log_popularity_E", log_popularity_E.clamp_min(-1e30), persistent=False)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw nothing: popularity is given."""
        del generator

    def forward(self, hidden_TH: Tensor, inputs: RouterInputs) -> Routing:
        """Route by chance alone."""
        exponentials_TE = torch.empty(len(hidden_TH), self.shape.num_experts)
        exponentials_TE.exponential_(generator=inputs.generator)
        return self.pick(self.log_popularity_E - exponentials_TE.log().to(hidden_TH.device))


class UniformRouter(PopularityRouter):
    """K distinct experts per token, all equally likely, in at most M groups."""

    def __init__(self, shape: RouterShape) -> None:
        super().__init__(shape, popularity_E=[1.0] * shape.num_experts)


AnyRouter = LearnedRouter | FixedRouter


def build_router(
    shape: RouterShape, *, hidden: int, generator: torch.Generator, popularity_E: Sequence[float] | None = None
) -> AnyRouter:
    """The router of `shape.kind`, its parameters drawn from `generator`.

    `popularity_E` (relative frequencies >= 0) belongs to kind `popularity` alone. Raises KeyError for an unknown kind.
    """
    assert shape.group_limit * (shape.num_experts // shape.num_groups) >= shape.top_k
    facts = ROUTERS[shape.kind]
    assert facts.module is not None, "such a trace is replayed, not routed again"
    module, _, name = facts.module.partition(":")
    build = getattr(importlib.import_module(module), name)
    router: LearnedRouter | HashRouter | PopularityRouter
    if facts.drawn:
        assert popularity_E is not None
        router = build(shape, popularity_E=popularity_E)
    else:
        router = build(hidden, shape) if facts.learned else build(shape)
    router.reset_parameters(generator)
    return router
