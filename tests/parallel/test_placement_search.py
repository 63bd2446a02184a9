"""The local search: it counts as it goes what a fresh count gives, and is never worse than where it began."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.parallel import TrafficSampler
from moesim.parallel.placement_search import Prices, SearchState, search_ranks
from moesim.scenario import Scenario
from moesim.seeding import stream
from moesim.trace import popularity_trace

Make = Callable[..., Scenario]

PRICES = Prices(row=1.0, rank_copy=2.0, node_copy=3.0)


ROWS_ALONE = Prices(row=1e-6, rank_copy=0.0, node_copy=0.0)


def tokens_of_slots(rng: np.random.Generator, *, slots: int, tokens: int) -> list[np.ndarray]:
    return [np.flatnonzero(rng.random(tokens) < share) for share in rng.random(slots) ** 3]


def state(tokens_Z: list[np.ndarray], rank_Z: np.ndarray, node_D: np.ndarray, tokens: int) -> SearchState:
    return SearchState(tokens_Z, rank_Z.copy(), node_D, PRICES, tokens, np.ones(len(node_D)))


@settings(max_examples=40)
@given(st.integers(0, 2**31))
def test_exchanges_count_as_a_fresh_count_does_and_undo(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens_Z = tokens_of_slots(rng, slots=12, tokens=50)
    rank_Z, node_D = rng.permutation(np.repeat(np.arange(4), 3)), np.array([0, 0, 1, 1])
    moving = state(tokens_Z, rank_Z, node_D, 50)
    for _ in range(10):
        one, other = rng.integers(12, size=2)
        if moving.rank_Z[one] != moving.rank_Z[other]:
            moving.swap(int(one), int(other))
    fresh = state(tokens_Z, moving.rank_Z, node_D, 50)
    for name in ("rows_D", "reach_D", "reach_J", "count_DT", "count_JT"):
        np.testing.assert_array_equal(getattr(moving, name), getattr(fresh, name))
    # By hand: a token counts once on a rank and on a node, however many of its slots are there.
    for rank in range(4):
        held = [tokens_Z[slot] for slot in np.flatnonzero(moving.rank_Z == rank)]
        assert moving.rows_D[rank] == sum(map(len, held))
        assert moving.reach_D[rank] == len(set(np.concatenate(held).tolist()))
    before = moving.cost()
    a, b = int(np.flatnonzero(moving.rank_Z == 0)[0]), int(np.flatnonzero(moving.rank_Z == 2)[0])
    moving.swap(a, b)
    moving.swap(a, b)
    assert moving.cost() == before


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.sampled_from([0, 1, 200]))
def test_it_is_never_worse_than_its_starts_and_keeps_the_slots(seed: int, tries: int) -> None:
    rng = np.random.default_rng(seed)
    tokens_Z = tokens_of_slots(rng, slots=16, tokens=60)
    starts, node_D = [rng.permutation(np.repeat(np.arange(4), 4)) for _ in range(2)], np.array([0, 0, 1, 1])

    def search() -> tuple[np.ndarray, float]:
        return search_ranks(
            tokens_Z,
            starts,
            node_D=node_D,
            speed_D=np.ones(4),
            prices=PRICES,
            num_tokens=60,
            tries=tries,
            rng=np.random.default_rng(1),
        )

    found, cost = search()
    assert cost == state(tokens_Z, found, node_D, 60).cost()
    assert cost <= min(state(tokens_Z, start, node_D, 60).cost() for start in starts)
    assert np.bincount(found).tolist() == [4, 4, 4, 4]
    np.testing.assert_array_equal(search()[0], found)


def test_experts_that_tokens_choose_together_come_together() -> None:
    """Eight pairs with equal rows, scattered at first: found on one rank each, so that a token reaches one rank."""
    pair_T = np.arange(800) % 8
    tokens_Z = [np.flatnonzero(pair_T == slot % 8) for slot in range(16)]  # slots s and s + 8 are a pair
    start = np.repeat(np.arange(4), 4)
    apart = state(tokens_Z, start, np.zeros(4, dtype=np.int64), 800)
    found, cost = search_ranks(
        tokens_Z,
        [start],
        node_D=np.zeros(4, dtype=np.int64),
        speed_D=np.ones(4),
        prices=PRICES,
        num_tokens=800,
        tries=3_000,
        rng=np.random.default_rng(0),
    )
    assert (found[:8] == found[8:]).all()
    assert (
        apart.reach_D.sum() == 1_600 and state(tokens_Z, found, np.zeros(4, dtype=np.int64), 800).reach_D.sum() == 800
    )
    assert cost < apart.cost()


def test_a_slow_rank_gets_rows_in_proportion_and_is_never_worse_off_than_by_speed() -> None:
    rng = np.random.default_rng(0)
    tokens_Z, start = tokens_of_slots(rng, slots=24, tokens=400), np.repeat(np.arange(4), 6)
    nodes, speed_D = np.zeros(4, dtype=np.int64), np.array([1.0, 1.0, 0.5, 1.0])
    keys: dict[str, Any] = {"node_D": nodes, "prices": ROWS_ALONE, "num_tokens": 400, "tries": 2_000}
    found, cost = search_ranks(tokens_Z, [start], speed_D=speed_D, rng=np.random.default_rng(1), **keys)
    blind, _ = search_ranks(tokens_Z, [start], speed_D=np.ones(4), rng=np.random.default_rng(1), **keys)

    def slowest(rank_Z: np.ndarray) -> float:
        rows_D = np.bincount(rank_Z, weights=[len(tokens) for tokens in tokens_Z], minlength=4)
        return float((rows_D / speed_D).max())

    assert cost == pytest.approx(ROWS_ALONE.row * slowest(found))
    assert slowest(found) < slowest(blind) and slowest(found) <= slowest(start)


@pytest.mark.parametrize("redundant", [0, 16])
def test_a_scenario_is_searched_from_the_rows_of_its_trace(
    make_scenario: Callable[..., Scenario], redundant: int
) -> None:
    counts = [30.0, 1, 1, 1, 9, 1, 1, 1] * 4
    placement: dict[str, Any] = {"kind": "search", "redundant_experts": redundant, "tries": 500}
    scenario = make_scenario(routing={"kind": "popularity", "counts": counts}, placement=placement)
    trace = popularity_trace(
        scenario.router_shape(), counts=counts, num_layers=2, num_sequences=96, sequence_length=32, seed=1
    )
    maps = TrafficSampler(scenario, trace).maps
    again = TrafficSampler(scenario, trace).maps
    other = TrafficSampler(scenario.model_copy(update={"seed": 1}), trace).maps
    assert maps is not None and again is not None and other is not None
    for held, same in zip(maps.maps, again.maps, strict=True):
        assert held.slot_experts_DP.shape == (8, (32 + redundant) // 8)
        np.testing.assert_array_equal(held.slot_experts_DP, same.slot_experts_DP)
    assert any(
        (held.slot_experts_DP != new.slot_experts_DP).any() for held, new in zip(maps.maps, other.maps, strict=True)
    )
    sample = TrafficSampler(scenario, trace).draw(stream(0, "x"))
    arrays = sample.arrays(0, 3)
    assert (arrays.rows_BRE.sum(axis=(1, 2)) == arrays.routed_rows_B).all()
