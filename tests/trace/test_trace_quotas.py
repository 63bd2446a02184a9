"""Draws by quota: distinct experts, loads to whole rows in every block, and sets of experts left to chance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.trace.check import has_duplicates
from moesim.trace.draws import capped_shares, draw_with_quotas, whole_quotas
from moesim.trace.metrics import distinct_domains


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
