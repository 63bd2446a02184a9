"""Synthetic routers: distinct experts, group limits, and the popularity that was asked for."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import UserError
from moesim.scenario import RouterShape
from moesim.trace import check_trace, popularity_trace, trace_hash, uniform_trace
from moesim.trace.draws import draw_by_weight, draw_by_weight_in_groups, draw_distinct
from moesim.trace.metrics import expert_load_LE

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
    load_E = expert_load_LE(made.final, num_experts=4)[0] / 40_000
    np.testing.assert_allclose(load_E, [0.4, 0.3, 0.2, 0.1], atol=0.01)


def test_several_distinct_experts_replay_measured_counts_too() -> None:
    """Drawn by the counts themselves the most popular expert would get 0.72 of the tokens."""
    router = RouterShape(kind="popularity", num_experts=6, top_k=2)
    counts = [90, 40, 30, 20, 20, 0]
    made = popularity_trace(router, counts=counts, num_layers=2, num_sequences=20, sequence_length=4000, seed=0)
    for load_E in expert_load_LE(made.final, num_experts=6):
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
