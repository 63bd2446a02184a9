"""Laws of every router, and its selections and gates against a slow float64 reference written from the formulas."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_cases import NUM_EXPERTS, router_inputs, shape_of

from moesim.routing.routers import (
    GshardRouter,
    LearnedRouter,
    Routing,
    build_router,
    expert_choice_capacity,
    limit_groups,
    top_ids,
)
from moesim.scenario.routers import ROUTERS
from moesim.scenario.routing import RouterShape

HIDDEN, NUM_TOKENS = 24, 200
TOKEN_CHOICE = [kind for kind, facts in ROUTERS.items() if facts.learned and not facts.by_experts]
FIXED = [kind for kind, facts in ROUTERS.items() if facts.module and not facts.learned]


def route(kind: str, seed: int = 0, **changes: object) -> tuple[Routing, torch.Tensor, RouterShape]:
    """The routing of random hidden states by a fresh router, its float32 logits, and its shape."""
    shape = shape_of(kind, **changes)
    generator = torch.Generator().manual_seed(seed)
    popularity = [1.0 + i for i in range(NUM_EXPERTS)] if kind == "popularity" else None
    router = build_router(shape, hidden=HIDDEN, generator=generator, popularity_E=popularity)
    if ROUTERS[kind].biased:
        router.bias_E.normal_(std=0.3, generator=generator)
    hidden_TH = 3 * torch.randn(NUM_TOKENS, HIDDEN, generator=generator)
    routing = router(hidden_TH, router_inputs(NUM_TOKENS, seed))
    logits = hidden_TH @ router.centroids_EH.T if isinstance(router, LearnedRouter) else torch.zeros(0)
    return routing, logits.detach(), shape


@pytest.mark.parametrize("kind", [*TOKEN_CHOICE, *FIXED])
def test_every_token_gets_k_distinct_experts_in_at_most_m_groups(kind: str) -> None:
    for limits in ({}, {"num_groups": 4, "group_limit": 2}):
        routing, _, shape = route(kind, **limits)
        ids_TK = routing.expert_ids_TK.numpy()
        assert ids_TK.shape == (NUM_TOKENS, shape.top_k) and ids_TK.min() >= 0 and ids_TK.max() < NUM_EXPERTS
        assert all(len(set(row)) == shape.top_k for row in ids_TK)
        if kind in ("switch", "gshard", "topk_softmax", "deepseek_moe"):
            break  # these have no groups
        if shape.num_groups > 1:
            groups_TK = ids_TK // (NUM_EXPERTS // shape.num_groups)
            assert max(len(set(row)) for row in groups_TK) == shape.group_limit


def reference(kind: str, logits_E: np.ndarray, bias_E: np.ndarray, shape: RouterShape) -> dict[int, float]:
    """The gates of one token by the spec's table, in float64 and plain Python."""
    softmax = np.exp(logits_E - logits_E.max()) / np.exp(logits_E - logits_E.max()).sum()
    ranked = lambda scores, allowed: sorted(allowed, key=lambda i: -scores[i])[: shape.top_k]  # noqa: E731
    everyone = range(NUM_EXPERTS)
    if kind in ("switch", "deepseek_moe"):
        return {i: softmax[i] for i in ranked(softmax, everyone)}
    if kind == "gshard":
        chosen = ranked(softmax, everyone)
        return {i: softmax[i] / sum(softmax[j] for j in chosen) for i in chosen}
    if kind == "topk_softmax":
        chosen = ranked(logits_E, everyone)
        return {i: math.exp(logits_E[i]) / sum(math.exp(logits_E[j]) for j in chosen) for i in chosen}
    size = NUM_EXPERTS // shape.num_groups
    members = [range(g * size, (g + 1) * size) for g in range(shape.num_groups)]
    sigmoid = 1 / (1 + np.exp(-logits_E))
    select = softmax if kind == "deepseek_v2" else sigmoid + bias_E
    best = 1 if kind == "deepseek_v2" else 2
    score = [sum(sorted((select[i] for i in group), reverse=True)[:best]) for group in members]
    kept = sorted(range(shape.num_groups), key=lambda g: -score[g])[: shape.group_limit]
    chosen = ranked(select, [i for g in kept for i in members[g]])
    if kind == "deepseek_v2":
        return {i: softmax[i] * shape.routed_scaling_factor for i in chosen}
    total = sum(sigmoid[i] for i in chosen)
    return {i: sigmoid[i] / total * shape.routed_scaling_factor for i in chosen}


@pytest.mark.parametrize("kind", TOKEN_CHOICE)
def test_gates_equal_the_reference(kind: str) -> None:
    for seed in range(3):
        routing, logits_TE, shape = route(kind, seed)
        generator = torch.Generator().manual_seed(seed)
        router = build_router(shape, hidden=HIDDEN, generator=generator)
        bias_E = torch.zeros(NUM_EXPERTS)
        if ROUTERS[kind].biased:
            bias_E = router.bias_E.normal_(std=0.3, generator=generator)
        for token in range(NUM_TOKENS):
            wanted = reference(kind, logits_TE[token].double().numpy(), bias_E.double().numpy(), shape)
            got = dict(zip(routing.expert_ids_TK[token].tolist(), routing.gates_TK[token].tolist(), strict=True))
            assert got.keys() == wanted.keys()
            for expert, gate in wanted.items():
                assert got[expert] == pytest.approx(gate, rel=2e-5)


def test_topk_softmax_equals_softmax_topk_renormalised() -> None:
    routing, logits_TE, _ = route("topk_softmax")
    softmax_TK = logits_TE.double().softmax(1).gather(1, routing.expert_ids_TK)
    torch.testing.assert_close(
        routing.gates_TK.double(), softmax_TK / softmax_TK.sum(1, keepdim=True), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(routing.affinities_TK, logits_TE.gather(1, routing.expert_ids_TK))


def test_the_bias_of_v3_selects_but_never_weighs() -> None:
    shape = shape_of("deepseek_v3", num_groups=1, group_limit=1)
    router = build_router(shape, hidden=HIDDEN, generator=torch.Generator().manual_seed(0))
    hidden_TH = torch.randn(NUM_TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    router.bias_E[5] = 100.0
    routing = router(hidden_TH, router_inputs(NUM_TOKENS))
    assert (routing.expert_ids_TK[:, 0] == 5).all()
    torch.testing.assert_close(routing.gates_TK.sum(1), torch.full((NUM_TOKENS,), 2.5))
    assert routing.affinities_TK.max() <= 1.0
    routing.gates_TK.square().sum().backward()
    assert not router.bias_E.requires_grad and router.centroids_EH.grad.abs().sum() > 0


def test_the_group_limit_holds_where_selection_scores_are_negative() -> None:
    scores_TE = -1.0 - torch.rand(50, NUM_EXPERTS, generator=torch.Generator().manual_seed(0))
    limited_TE = limit_groups(scores_TE, num_groups=4, group_limit=1, best_of=2)
    ids_TK = top_ids(limited_TE, 4)
    assert (ids_TK // 4 == ids_TK[:, :1] // 4).all()
    assert (limited_TE == -math.inf).sum(1).eq(12).all()


@given(st.lists(st.integers(-3, 3), min_size=8, max_size=8), st.integers(1, 8))
@settings(max_examples=60)
def test_ties_go_to_the_lower_id(scores: list[int], num: int) -> None:
    wanted = sorted(range(8), key=lambda i: (-scores[i], i))[:num]
    assert top_ids(torch.tensor([scores], dtype=torch.float32), num)[0].tolist() == wanted


def test_random_second_uses_the_second_expert_with_twice_its_gate() -> None:
    shape = shape_of("gshard", num_experts=2, random_second=True)
    router = build_router(shape, hidden=2, generator=torch.Generator().manual_seed(0))
    assert isinstance(router, GshardRouter)
    for second_gate in (0.1, 0.4, 0.5):
        logit = math.log((1 - second_gate) / second_gate)
        logits_TE = torch.tensor([[logit, 0.0]]).expand(20_000, 2)
        routing = router.route(logits_TE, router_inputs(20_000, seed=3))
        used = (routing.expert_ids_TK[:, 1] == 1).float().mean().item()
        assert used == pytest.approx(min(1.0, 2 * second_gate), abs=0.012)
        assert (routing.gates_TK[:, 1][routing.expert_ids_TK[:, 1] < 0] == 0).all()
        torch.testing.assert_close(routing.gates_TK[:, 0], torch.full((20_000,), 1 - second_gate))


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_expert_choice_fills_every_expert_with_its_best_tokens(factor: float) -> None:
    routing, logits_TE, shape = route("expert_choice", capacity_factor=factor)
    capacity = math.ceil(factor * shape.top_k * NUM_TOKENS / NUM_EXPERTS)
    assert expert_choice_capacity(shape, NUM_TOKENS) == capacity
    ids_TK, affinities_TE = routing.expert_ids_TK, logits_TE.softmax(1)
    assert torch.bincount(ids_TK[ids_TK >= 0], minlength=NUM_EXPERTS).eq(capacity).all()
    for expert in range(NUM_EXPERTS):
        chosen_T = (ids_TK == expert).any(1)
        assert affinities_TE[chosen_T, expert].min() >= affinities_TE[~chosen_T, expert].max()
    got = torch.zeros(NUM_TOKENS, NUM_EXPERTS + 1).scatter_(1, ids_TK.where(ids_TK >= 0, NUM_EXPERTS), routing.gates_TK)
    chosen = torch.zeros(NUM_TOKENS, NUM_EXPERTS + 1).scatter_(1, ids_TK.where(ids_TK >= 0, NUM_EXPERTS), 1.0)
    torch.testing.assert_close(got[:, :-1], affinities_TE * chosen[:, :-1])
    assert (routing.gates_TK[ids_TK < 0] == 0).all()


def test_hash_routing_looks_at_keys_alone_and_spreads_them() -> None:
    shape = shape_of("hash")
    router = build_router(shape, hidden=HIDDEN, generator=torch.Generator().manual_seed(0))
    inputs = router_inputs(20_000)
    first = router(torch.randn(20_000, HIDDEN), inputs)
    again = router(torch.zeros(20_000, HIDDEN), inputs)
    assert torch.equal(first.expert_ids_TK, again.expert_ids_TK)
    assert (first.gates_TK == 1 / shape.top_k).all()
    loads_E = torch.bincount(first.expert_ids_TK.flatten(), minlength=NUM_EXPERTS).float()
    assert loads_E.max() / loads_E.mean() < 1.15  # 20,000 keys in 4,096 buckets


def test_uniform_and_popularity_have_the_wanted_frequencies() -> None:
    shape = replace(shape_of("popularity"), top_k=1)
    popularity = [float(i) for i in range(NUM_EXPERTS)]
    router = build_router(shape, hidden=1, generator=torch.Generator(), popularity_E=popularity)
    ids = router(torch.zeros(60_000, 1), router_inputs(60_000)).expert_ids_TK.flatten()
    share = torch.bincount(ids, minlength=NUM_EXPERTS) / 60_000
    torch.testing.assert_close(share, torch.tensor(popularity) / sum(popularity), atol=0.005, rtol=0)
    router = build_router(shape_of("uniform", num_groups=4, group_limit=2), hidden=1, generator=torch.Generator())
    ids = router(torch.zeros(20_000, 1), router_inputs(20_000)).expert_ids_TK.flatten()
    share = torch.bincount(ids, minlength=NUM_EXPERTS) / 80_000
    torch.testing.assert_close(share, torch.full((NUM_EXPERTS,), 1 / NUM_EXPERTS), atol=0.004, rtol=0)
