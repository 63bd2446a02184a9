"""Placing by speed: equal speeds are EPLB's global policy, else rows go in proportion, and slots stay equal."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.parallel.by_speed import place_by_speed
from moesim.parallel.eplb import balance_experts
from moesim.parallel.expert_map import ExpertMap
from moesim.parallel.replacement import rank_loads

SIZES = st.tuples(st.integers(2, 8), st.integers(2, 6), st.integers(0, 3), st.integers(0, 2**31))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.floats(0.25, 4.0))
def test_equal_speeds_are_the_global_policy(sizes: tuple[int, int, int, int], speed: float) -> None:
    ranks, per_rank, more, seed = sizes
    load_LE = np.random.default_rng(seed).integers(1, 100_000, size=(2, ranks * per_rank))
    slots = ranks * (per_rank + more)
    placed = place_by_speed(load_LE, num_slots=slots, speed_D=np.full(ranks, 1.0))
    held = balance_experts(load_LE, num_slots=slots, num_groups=1, num_nodes=1, num_ranks=ranks)
    np.testing.assert_array_equal(placed, held)
    # Speeds count against each other only; powers of two divide without rounding.
    np.testing.assert_array_equal(placed, place_by_speed(load_LE, num_slots=slots, speed_D=np.full(ranks, 4.0)))


@settings(max_examples=40, deadline=None)
@given(SIZES)
def test_every_expert_has_a_slot_and_every_rank_as_many(sizes: tuple[int, int, int, int]) -> None:
    ranks, per_rank, more, seed = sizes
    rng = np.random.default_rng(seed)
    load_LE = rng.integers(0, 1000, size=(2, ranks * per_rank))
    slots = ranks * (per_rank + more)
    placed = place_by_speed(load_LE, num_slots=slots, speed_D=rng.uniform(0.5, 2.0, ranks))
    assert placed.shape == (2, slots)
    for row in placed:
        assert set(row.tolist()) == set(range(ranks * per_rank))


def test_rows_go_in_proportion_to_speed() -> None:
    rng = np.random.default_rng(0)
    load_E = rng.zipf(1.5, size=256).clip(max=300).astype(float)
    speed_D = np.array([1.0, 1.0, 1.0, 0.6, 1.0, 0.8, 1.2, 1.0])
    (slots,) = place_by_speed(load_E[None], num_slots=320, speed_D=speed_D)
    share_D = rank_loads(ExpertMap(slots.reshape(8, -1), 256), load_E) / load_E.sum()
    np.testing.assert_allclose(share_D, speed_D / speed_D.sum(), rtol=0.05)
