"""Synthetic routers: distinct experts, group limits, the popularity that was asked for, and draws by quota."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import UserError
from moesim.scenario import RouterShape
from moesim.trace import check_trace, popularity_trace, trace_hash, uniform_trace
from moesim.trace.check import has_duplicates
from moesim.trace.draws import (
    capped_shares,
    draw_by_weight,
    draw_by_weight_in_groups,
    draw_distinct,
    draw_with_quotas,
    whole_quotas,
)
from moesim.trace.metrics import distinct_domains

SMALL = {"num_layers": 2, "num_sequences": 3, "sequence_length": 40}


@st.composite
def shapes(draw: st.DrawFn) -> RouterShape:
    groups = draw(st.sampled_from([1, 2, 4, 8]))
    limit = draw(st.integers(1, groups))
    size = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(8, limit * size)))
    return RouterShape(kind="any", num_experts=groups * size, top_k=top_k, num_groups=groups, group_limit=limit)


@settings(max_examples=40)
@given(shapes(), st.integers(0, 3))
def test_every_kind_gives_k_distinct_experts_in_at_most_m_groups(router: RouterShape, seed: int) -> None:
    counts = [float(expert + 1) for expert in range(router.num_experts)]
    check_trace(uniform_trace(router, seed=seed, **SMALL))
    check_trace(popularity_trace(router, counts=counts, seed=seed, **SMALL))


def test_same_seed_same_trace() -> None:
    router = RouterShape(kind="uniform", num_experts=16, top_k=4)
    same = [trace_hash(uniform_trace(router, seed=seed, **SMALL)) for seed in (5, 5, 6)]
    assert same[0] == same[1] != same[2]


def test_uniform_sets_are_equally_likely() -> None:
    ids_TK = draw_distinct(60_000, num_experts=5, top_k=3, rng=np.random.default_rng(0))
    sets = np.sort(ids_TK, axis=1) @ np.array([100, 10, 1])
    values, counts = np.unique(sets, return_counts=True)
    assert len(values) == 10
    assert counts.max() / counts.min() < 1.08  # 6000 each, standard deviation 73
    assert np.ptp(np.bincount(ids_TK[:, 0])) < 5 * np.sqrt(12_000)  # and the order within a set is random


def exact_inclusion(weights: list[float], top_k: int) -> list[float]:
    """Probability that an expert is among K drawn one after the other by weight: the sum over all orders."""
    inclusion = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), top_k):
        probability, left = 1.0, sum(weights)
        for expert in order:
            probability *= weights[expert] / left
            left -= weights[expert]
        for expert in order:
            inclusion[expert] += probability
    return inclusion


@pytest.mark.parametrize("weights", [[1, 2, 3, 4], [1000, 1, 1, 2], [5, 0, 3, 2]])
def test_popularity_is_gumbel_top_k(weights: list[float]) -> None:
    ids_TK = draw_by_weight(40_000, weights_E=np.array(weights, float), top_k=2, rng=np.random.default_rng(1))
    measured = np.bincount(ids_TK.reshape(-1), minlength=4) / 40_000
    np.testing.assert_allclose(measured, exact_inclusion(weights, 2), atol=0.012)
    gumbel = np.random.default_rng(2).gumbel(size=(40_000, 4)) + np.log(np.maximum(weights, 1e-300))
    by_key = np.bincount(np.argsort(-gumbel, axis=1)[:, :2].reshape(-1), minlength=4) / 40_000
    np.testing.assert_allclose(measured, by_key, atol=0.015)


def test_limited_popularity_without_effective_limit_has_the_same_law() -> None:
    weights_E = np.array([8.0, 1, 2, 4, 1, 1, 3, 2])
    limited = draw_by_weight_in_groups(
        40_000, weights_E=weights_E, top_k=1, num_groups=4, group_limit=1, rng=np.random.default_rng(3)
    )
    np.testing.assert_allclose(np.bincount(limited[:, 0]) / 40_000, weights_E / weights_E.sum(), atol=0.012)


def test_top_one_replays_measured_counts() -> None:
    router = RouterShape(kind="popularity", num_experts=4, top_k=1)
    made = popularity_trace(
        router, counts=[40, 30, 20, 10], num_layers=1, num_sequences=10, sequence_length=4000, seed=0
    )
    load_E = made.final.load_LE(num_experts=4)[0] / 40_000
    np.testing.assert_allclose(load_E, [0.4, 0.3, 0.2, 0.1], atol=0.01)


def test_several_distinct_experts_replay_measured_counts_too() -> None:
    """Drawn by the counts themselves the most popular expert would get 0.72 of the tokens."""
    router = RouterShape(kind="popularity", num_experts=6, top_k=2)
    counts = [90, 40, 30, 20, 20, 0]
    made = popularity_trace(router, counts=counts, num_layers=2, num_sequences=20, sequence_length=4000, seed=0)
    for load_E in made.final.load_LE(num_experts=6):
        np.testing.assert_allclose(load_E / 80_000, np.array(counts) / 100, atol=0.01)


def test_layers_take_their_own_counts_and_bad_lists_are_refused() -> None:
    router = RouterShape(kind="popularity", num_experts=3, top_k=1)
    made = popularity_trace(router, counts=[[1, 0, 0], [0, 0, 5]], seed=0, **SMALL)
    assert set(np.unique(made.final.expert_ids_LSTK[0])) == {0}
    assert set(np.unique(made.final.expert_ids_LSTK[1])) == {2}
    for counts, fault in (([1, 2], "2 entries"), ([0, 0, 0], "at least 1"), ([[1, 1, 1]] * 3, "3 lists for 2 layers")):
        with pytest.raises(UserError, match=fault):
            popularity_trace(router, counts=counts, seed=0, **SMALL)
    limited = RouterShape(kind="popularity", num_experts=4, top_k=2, num_groups=2, group_limit=1)
    with pytest.raises(UserError, match="at least 4 counts above 0"):
        popularity_trace(limited, counts=[1, 0, 1, 1], seed=0, **SMALL)


def counts_of(ids_TK: np.ndarray, tokens_B: np.ndarray, num_experts: int) -> np.ndarray:
    blocks = np.split(ids_TK, np.cumsum(tokens_B)[:-1])
    return np.stack([np.bincount(block.reshape(-1), minlength=num_experts) for block in blocks])


@st.composite
def loads(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    num_experts = draw(st.integers(2, 24))
    top_k = draw(st.integers(1, min(8, num_experts)))
    shares = draw(st.lists(st.floats(0.01, 100.0), min_size=num_experts, max_size=num_experts))
    return np.array(shares), top_k


@given(loads())
def test_capped_shares_add_up_to_k_and_keep_the_order_of_the_shares(case: tuple[np.ndarray, int]) -> None:
    shares_E, top_k = case
    chosen_E = capped_shares(shares_E, total=top_k)
    assert chosen_E.sum() == pytest.approx(top_k)
    assert (chosen_E <= 1).all()
    assert (np.diff(chosen_E[np.argsort(shares_E)]) >= -1e-12).all()
    free_E = chosen_E < 1 - 1e-9
    ratios = chosen_E[free_E] / shares_E[free_E]
    assert ratios == pytest.approx(np.full(len(ratios), ratios[:1]))  # proportional where nothing was cut off


@given(loads(), st.lists(st.integers(0, 50), min_size=1, max_size=6), st.floats(0, 1), st.randoms())
def test_quotas_are_exact_rows_rounded_for_every_run_of_experts(case, tokens, start, random) -> None:
    shares_E, top_k = case
    order_E = np.array(random.sample(range(len(shares_E)), len(shares_E)))
    chosen_E = capped_shares(shares_E, total=top_k)
    quotas_BE = whole_quotas(chosen_E, tokens_B=np.array(tokens), order_E=order_E, start=start)
    assert (quotas_BE.sum(axis=1) == top_k * np.array(tokens)).all()
    assert (quotas_BE <= np.array(tokens)[:, None]).all()
    first, last = sorted(random.sample(range(len(shares_E) + 1), 2))
    run = order_E[first:last]
    exact_B = np.array(tokens) * chosen_E[run].sum()
    assert (np.abs(quotas_BE[:, run].sum(axis=1) - exact_B) < 1 + 1e-6).all()


@settings(max_examples=40)
@given(loads(), st.integers(0, 5))
def test_every_block_has_its_quotas_and_every_token_distinct_experts(case, seed: int) -> None:
    shares_E, top_k = case
    tokens_B = np.array([0, 37, 64, 5])
    ids_TK = draw_with_quotas(shares_E, tokens_B=tokens_B, top_k=top_k, rng=np.random.default_rng(seed))
    assert ids_TK.shape == (tokens_B.sum(), top_k)
    assert not has_duplicates(ids_TK)
    exact_BE = tokens_B[:, None] * capped_shares(shares_E, total=top_k)
    missed_BE = np.abs(counts_of(ids_TK, tokens_B, len(shares_E)) - exact_BE)
    assert missed_BE.max() < 2 + 1e-6  # rounded, and rarely a row for which no other token has a place
    assert (missed_BE >= 1 + 1e-6).sum() <= max(2, 0.05 * missed_BE.size)


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_a_group_limit_holds_and_loads_stay_within_a_few_rows(limit: int) -> None:
    shares_E = np.repeat([3.0, 1.0], [4, 28])
    tokens_B = np.full(8, 512)
    ids_TK = draw_with_quotas(
        shares_E, tokens_B=tokens_B, top_k=4, num_groups=8, group_limit=limit, rng=np.random.default_rng(0)
    )
    assert not has_duplicates(ids_TK)
    assert distinct_domains(ids_TK, domain_of_expert_E=np.arange(32) // 4).max() <= limit
    exact_E = 512 * capped_shares(shares_E, total=4)
    assert np.abs(counts_of(ids_TK, tokens_B, 32) - exact_E).max() <= 8


def test_which_experts_go_together_is_left_to_chance() -> None:
    """Equal loads of 5 experts, 2 of them a token: all ten pairs come about equally often."""
    ids_TK = draw_with_quotas(np.ones(5), tokens_B=np.full(100, 300), top_k=2, rng=np.random.default_rng(0))
    pairs = np.unique(np.sort(ids_TK, axis=1), axis=0, return_counts=True)[1]
    assert len(pairs) == 10
    assert pairs.max() / pairs.min() < 1.15  # 3000 each; independent draws have a standard deviation of 52
