"""Draws of sequences: without replacement as long as the trace lasts; the bootstrap; the floor of chance."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.trace.metrics import imbalance, uniform_floor
from moesim.trace.record import choose_protected, draw_sequences


def draw(num_trace: int, micro_batches: int, ranks: int, size: int, *, seed: int = 0, bootstrap: bool = False):
    return draw_sequences(
        num_trace,
        num_micro_batches=micro_batches,
        num_data_ranks=ranks,
        micro_batch=size,
        rng=np.random.default_rng(seed),
        bootstrap=bootstrap,
    )


@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(0, 5))
def test_sequences_repeat_as_little_as_possible(trace: int, micro: int, ranks: int, size: int, seed: int) -> None:
    drawn = draw(trace, micro, ranks, size, seed=seed)
    slots = micro * ranks * size
    uses = np.bincount(drawn.sequences_BNU.reshape(-1), minlength=trace)
    assert uses.max() - uses.min() <= 1
    assert drawn.num_distinct == min(trace, slots)
    assert drawn.reused_share == pytest.approx(1 - min(trace, slots) / slots)
    assert drawn.coverage == pytest.approx(trace / slots)
    if trace >= ranks * size:
        for hand in drawn.sequences_BNU:
            assert len(np.unique(hand)) == ranks * size


def test_bootstrap_resamples_the_trace() -> None:
    distinct = [draw(200, 10, 5, 4, seed=seed, bootstrap=True).num_distinct for seed in range(30)]
    assert np.mean(distinct) == pytest.approx(200 * (1 - np.exp(-1)), rel=0.03)
    assert draw(200, 10, 5, 4).num_distinct == 200


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 9), st.booleans(), st.integers(0, 5))
def test_micro_batches_hold_sequences_of_one_phase_each_in_turn(size, phases, micro, bootstrap, seed) -> None:
    drawn = draw_sequences(
        size * phases,
        num_micro_batches=micro,
        num_data_ranks=3,
        micro_batch=2,
        rng=np.random.default_rng(seed),
        bootstrap=bootstrap,
        num_phases=phases,
    )
    phase_BNU = drawn.sequences_BNU // size
    assert (phase_BNU == phase_BNU[:, :1, :1]).all()
    assert (np.diff(phase_BNU[:, 0, 0]) % phases == 1 % phases).all()


def test_protected_sequences_are_an_exact_share() -> None:
    protected = choose_protected((8, 8, 1), share=0.1, rng=np.random.default_rng(0))
    assert protected.sum() == 6
    assert protected.shape == (8, 8, 1)
    assert choose_protected((4, 5), share=1.0, rng=np.random.default_rng(0)).all()


def test_imbalance_is_max_over_mean() -> None:
    np.testing.assert_allclose(imbalance(np.array([[1, 1, 4], [2, 2, 2], [0, 0, 0]])), [2.0, 1.0, 1.0])


# The two floors that the spec states, for the expert layouts of DeepSeekMoE-16B (6 of 64) and DeepSeek-V3 (8 of 256).
@pytest.mark.parametrize(("experts", "top_k", "floor"), [(64, 6, 1.12), (256, 8, 1.25)])
def test_floor_of_a_uniform_router(experts: int, top_k: int, floor: float) -> None:
    assert uniform_floor(experts, top_k=top_k, tokens=4096) == pytest.approx(floor, abs=0.006)


def test_floor_against_the_normal_approximation() -> None:
    """Loads are nearly normal with the variance of drawing without replacement; their expected maximum is simulated."""
    experts, top_k, tokens = 32, 4, 8192
    share = top_k / experts
    deviates = np.random.default_rng(0).standard_normal((4000, experts))
    deviates = (deviates - deviates.mean(axis=1, keepdims=True)) * np.sqrt(experts / (experts - 1))
    expected = 1 + deviates.max(axis=1).mean() * np.sqrt(tokens * share * (1 - share)) / (tokens * share)
    assert uniform_floor(experts, top_k=top_k, tokens=tokens) == pytest.approx(expected, abs=0.004)


def test_floor_falls_with_tokens_and_rises_with_the_group_limit_for_ranks() -> None:
    few, many = (uniform_floor(64, top_k=6, tokens=tokens, num_bins=8) for tokens in (1024, 16384))
    assert 1.0 < many < few
    limited = uniform_floor(64, top_k=6, tokens=1024, num_groups=8, group_limit=3, num_bins=8)
    assert limited > few  # several choices of one token land on the same rank
