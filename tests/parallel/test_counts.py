"""Capacity on simulated ranks: budgets, protection, order of dropping - and the same rows as the torch layers drop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesim.parallel.counts import (
    device_budget,
    device_keep_mask,
    expert_capacity,
    expert_keep_mask,
    ranks_of_rows,
)
from moesim.routing.balance import device_keep_mask as torch_device_keep_mask
from moesim.routing.balance import expert_keep_mask as torch_expert_keep_mask

torch.set_num_threads(1)

SEQUENCES, TOKENS, TOP_K, EXPERTS, RANKS = 6, 20, 3, 12, 4
RANK_OF_EXPERT_E = np.arange(EXPERTS) // (EXPERTS // RANKS)


def selections(seed: int, *, levels: int = 1000, gaps: bool = False) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """Skewed selections with affinities on a grid of `levels` values: few levels make ties."""
    rng = np.random.default_rng(seed)
    keys = rng.gumbel(size=(SEQUENCES, TOKENS, EXPERTS)) - 0.3 * np.arange(EXPERTS)
    ids = np.argsort(-keys, axis=-1)[..., :TOP_K].astype(np.int16)
    if gaps:
        ids[rng.random(ids.shape) < 0.2] = -1
    affinities = (rng.integers(levels, size=ids.shape) / levels).astype(np.float32)
    return ids, np.where(ids >= 0, affinities, 0).astype(np.float32)


def keep_devices(ids: NDArray[np.int16], affinities: NDArray[np.float32], protected: NDArray[np.bool_], factor: float):
    ranks = ranks_of_rows(ids, rank_of_expert_E=RANK_OF_EXPERT_E, num_ranks=RANKS)
    return ranks, device_keep_mask(ranks, affinities, protected_S=protected, num_ranks=RANKS, factor=factor)


cases = st.tuples(
    st.integers(0, 10_000),
    st.sampled_from([3, 1000]),
    st.booleans(),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.05, 0.5, 0.9, 1.0, 1.5, 10.0]),
)


@settings(max_examples=30)
@given(cases)
def test_laws_of_device_capacity(case: tuple[int, int, bool, float, float]) -> None:
    seed, levels, gaps, share, factor = case
    ids, affinities = selections(seed, levels=levels, gaps=gaps)
    protected = np.random.default_rng(seed + 1).random(SEQUENCES) < share
    ranks, keep = keep_devices(ids, affinities, protected, factor)
    assert not keep[ids < 0].any()
    assert keep[protected][ids[protected] >= 0].all()
    budget = device_budget(factor=factor, num_rows=int((ids >= 0).sum()), num_ranks=RANKS)
    for rank in range(RANKS):
        on_rank = ranks == rank
        held_by_protected = int(on_rank[protected].sum())
        unprotected = on_rank & ~protected[:, None, None]
        kept, dropped = keep & unprotected, ~keep & unprotected
        assert kept.sum() == min(unprotected.sum(), max(0, budget - held_by_protected))
        if kept.any() and dropped.any():
            assert affinities[kept].min() >= affinities[dropped].max()


@settings(max_examples=40)
@given(cases)
def test_device_drops_are_those_of_the_torch_layer(case: tuple[int, int, bool, float, float]) -> None:
    seed, levels, gaps, share, factor = case
    ids, affinities = selections(seed, levels=levels, gaps=gaps)
    protected = np.random.default_rng(seed + 1).random(SEQUENCES) < share
    expected = torch_device_keep_mask(
        torch.from_numpy(ids.reshape(-1, TOP_K).astype(np.int64)),
        torch.from_numpy(affinities.reshape(-1, TOP_K)),
        sequence_T=torch.arange(SEQUENCES).repeat_interleave(TOKENS),
        protected_S=torch.from_numpy(protected),
        num_experts=EXPERTS,
        num_devices=RANKS,
        factor=factor,
    )
    np.testing.assert_array_equal(
        keep_devices(ids, affinities, protected, factor)[1].reshape(-1, TOP_K), expected.numpy()
    )


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([3, 1000]), st.sampled_from(["position", "score"]), st.integers(1, 12))
def test_expert_drops_are_those_of_the_torch_layer_and_hold_the_capacity(
    seed: int, levels: int, by: str, capacity: int
) -> None:
    ids, affinities = selections(seed, levels=levels, gaps=True)
    keep = expert_keep_mask(ids, affinities, num_experts=EXPERTS, capacity=capacity, by=by)
    for block in range(SEQUENCES):
        expected = torch_expert_keep_mask(
            torch.from_numpy(ids[block].astype(np.int64)),
            torch.from_numpy(affinities[block]),
            num_experts=EXPERTS,
            capacity=capacity,
            by=by,
        )
        np.testing.assert_array_equal(keep[block], expected.numpy())
        for expert in range(EXPERTS):
            mine = ids[block] == expert
            assert (keep[block] & mine).sum() == min(capacity, mine.sum())
            if by == "score" and (keep[block] & mine).any() and (~keep[block] & mine).any():
                assert affinities[block][keep[block] & mine].min() >= affinities[block][~keep[block] & mine].max()


def test_position_drops_the_last_tokens() -> None:
    ids = np.zeros((1, 5, 1), dtype=np.int16)
    affinities = np.linspace(0, 1, 5, dtype=np.float32).reshape(1, 5, 1)
    keep = expert_keep_mask(ids, affinities, num_experts=2, capacity=2, by="position")
    assert keep[0, :, 0].tolist() == [True, True, False, False, False]
    keep = expert_keep_mask(ids, affinities, num_experts=2, capacity=2, by="score")
    assert keep[0, :, 0].tolist() == [False, False, False, True, True]


def test_capacities_round_as_specified() -> None:
    assert expert_capacity(factor=1.0, top_k=3, num_tokens=10, num_experts=16) == 2  # ceil(30 / 16)
    assert expert_capacity(factor=16, top_k=6, num_tokens=128, num_experts=64) == 128  # not 192: no token comes twice
    assert expert_capacity(factor=1e300, top_k=6, num_tokens=128, num_experts=64) == 128
    assert device_budget(factor=1.25, num_rows=31, num_ranks=8) == 4  # floor(1.25 * 31 / 8 = 4.84)


@pytest.mark.parametrize("num_ranks", [4, 255, 300])
def test_ranks_of_rows_leaves_room_for_no_row(num_ranks: int) -> None:
    ids = np.array([[0, num_ranks - 1, -1]], dtype=np.int16)
    ranks = ranks_of_rows(ids, rank_of_expert_E=np.arange(num_ranks), num_ranks=num_ranks)
    assert ranks.tolist() == [[0, num_ranks - 1, num_ranks]]
