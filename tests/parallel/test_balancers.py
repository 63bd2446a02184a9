"""EPLB, placing by speed, and the local search.

EPLB is equal to the published example and to a plain reference on random cases, and quick. With equal speeds placing
by speed is its global policy, else rows go in proportion, and slots stay equal. The search counts as it goes what a
fresh count gives, and is never worse than where it began.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim
from moesim.parallel import TrafficSampler
from moesim.parallel.balancers import (
    Prices,
    SearchState,
    balance_experts,
    place_by_speed,
    search_ranks,
    speeds_of_group,
)
from moesim.parallel.expert_map import ExpertMap
from moesim.parallel.replacing import rank_loads
from moesim.scenario import Eplb, Scenario, Search
from moesim.scenario.failures import RankSpeed, Speeds
from moesim.seeding import stream
from moesim.trace import popularity_trace

# The worked example of github.com/deepseek-ai/EPLB (README, commit d52c72d): 2 layers of 12 experts.
EXAMPLE = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PLACED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_published_example() -> None:
    placed = balance_experts(np.array(EXAMPLE), num_slots=16, num_groups=4, num_nodes=2, num_ranks=8)
    assert placed.tolist() == PLACED


def reference(load: list[np.float32], *, slots: int, groups: int, nodes: int, ranks: int) -> list[int]:
    """One layer in plain Python, item by item: the expert of every slot. Sums of 32-bit floats, as published."""
    if groups % nodes:
        groups = nodes = 1
    size = len(load) // groups
    group_load = [np.float32(sum(load[g * size : (g + 1) * size])) for g in range(groups)]
    out: list[int] = []
    for members in pack(group_load, nodes):
        experts = [g * size + offset for g in members for offset in range(size)]
        copies = list(experts)
        while len(copies) < slots // nodes:
            count = Counter(copies)
            copies.append(max(experts, key=lambda expert: load[expert] / np.float32(count[expert])))
        count = Counter(copies)
        for rank in pack([load[expert] / np.float32(count[expert]) for expert in copies], ranks // nodes):
            out += [copies[item] for item in rank]
    return out


def pack(weights: list[np.float32], packs: int) -> list[list[int]]:
    """The items of every pack, in the order in which they came."""
    room = len(weights) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    held: list[list[int]] = [[] for _ in range(packs)]
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        able = [pack for pack in held if len(pack) < room]
        min(able, key=lambda pack: sum(weights[other] for other in pack)).append(item)
    return held


CASES = st.tuples(
    st.sampled_from([1, 2, 4]),  # nodes
    st.sampled_from([1, 2, 3, 4]),  # ranks per node
    st.sampled_from([1, 2, 3, 4, 8]),  # groups
    st.integers(1, 4),  # experts of a group
    st.integers(0, 4),  # slots per rank more than needed
    st.integers(0, 2**31),
)


@settings(max_examples=75)
@given(CASES)
def test_equal_to_a_plain_reference(case: tuple[int, ...]) -> None:
    nodes, per_node, groups, size, more, seed = case
    ranks, experts = nodes * per_node, groups * size
    slots = (-(-experts // ranks) + more) * ranks
    load_LE = np.random.default_rng(seed).integers(
        0, 40 if more % 2 else 100_000, size=(3, experts)
    )  # with ties, or few
    placed = balance_experts(load_LE, num_slots=slots, num_groups=groups, num_nodes=nodes, num_ranks=ranks)
    sizes = {"slots": slots, "groups": groups, "nodes": nodes, "ranks": ranks}
    assert placed.tolist() == [reference(list(row.astype(np.float32)), **sizes) for row in load_LE]


@settings(max_examples=30)
@given(CASES)
def test_every_expert_has_a_copy_and_the_heaviest_slot_is_no_heavier_than_with_fewer_copies(
    case: tuple[int, ...],
) -> None:
    nodes, per_node, groups, size, more, seed = case
    ranks, experts = nodes * per_node, groups * size
    slots = (-(-experts // ranks) + more) * ranks
    load_E = np.random.default_rng(seed).integers(0, 1000, size=experts)
    heaviest = []
    for number in (slots, slots + ranks):
        placed = balance_experts(load_E[None], num_slots=number, num_groups=groups, num_nodes=nodes, num_ranks=ranks)[0]
        count_E = np.bincount(placed, minlength=experts)
        assert len(placed) == number and (count_E >= 1).all()
        heaviest.append((load_E / count_E).max())
    assert heaviest[1] <= heaviest[0]


def test_equal_loads_keep_the_order_of_indices() -> None:
    """Ties go to the smaller index, in sorting and in packing, also where nothing was routed at all."""
    for load in (0, 5):
        placed = balance_experts(np.full((1, 8), load), num_slots=8, num_groups=1, num_nodes=1, num_ranks=4)
        # Equal weights go around the ranks; weights of nothing leave every rank as light as the first with room.
        assert placed.tolist() == [[0, 4, 1, 5, 2, 6, 3, 7] if load else [0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.benchmark
def test_58_layers_of_256_experts_are_quick() -> None:
    load_LE = np.random.default_rng(0).zipf(1.5, size=(58, 256)) % 10_000
    started = time.process_time()
    balance_experts(load_LE, num_slots=320, num_groups=8, num_nodes=8, num_ranks=64)
    seconds = time.process_time() - started
    print(f"58 x 256 experts, 320 slots on 64 ranks: {seconds:.3f} s of CPU")
    assert seconds < 0.2


SIZES = st.tuples(st.integers(2, 8), st.integers(2, 6), st.integers(0, 3), st.integers(0, 2**31))


@settings(max_examples=30)
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


@settings(max_examples=40)
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


def scenario_with(make: Callable[..., Scenario], placement: dict[str, Any], **sections: Any) -> Scenario:
    counts = [30.0, 1, 1, 1, 9, 1, 1, 1] * 4
    return make(routing={"kind": "popularity", "counts": counts}, placement=placement, **sections)


def test_speeds_are_the_clusters_where_none_are_stated(make_scenario: Callable[..., Scenario]) -> None:
    stated = [1.0, 1, 1, 0.5, 1, 1, 1, 1]
    plain = scenario_with(make_scenario, {"kind": "by_speed"})
    assert speeds_of_group(plain) is None  # all alike
    slow = Speeds(ranks=(RankSpeed(rank=3, factor=0.5),))
    cluster = plain.cluster.model_copy(update={"speeds": slow})
    for placement in (plain.placement, Search(kind="search")):
        scenario = plain.model_copy(update={"cluster": cluster, "placement": placement})
        np.testing.assert_allclose(speeds_of_group(scenario), stated)
    assert speeds_of_group(plain.model_copy(update={"cluster": cluster, "placement": Eplb(kind="eplb")})) is None
    own = scenario_with(make_scenario, {"kind": "by_speed", "speeds": stated})
    np.testing.assert_array_equal(speeds_of_group(own), stated)


def test_heeding_a_slow_rank_makes_the_step_shorter() -> None:
    steps = {}
    for kind in ("eplb", "by_speed", "search"):
        overrides = {
            "routing": {"kind": "trace", "file": "library:64x6/no-balance"},
            "capacity.kind": "none",
            "model.layers": 4,
            "workload.sequence_length": 1024,
            "workload.global_batch": 16,
            "workload.micro_batch": 2,
            "uncertainty.samples": 1,
            "cluster.speeds.ranks": [{"rank": 3, "factor": 0.6}],
            "placement": {"kind": kind, "redundant_experts": 16},
        }
        steps[kind] = moesim.simulate(moesim.load_scenario("quickstart", overrides)).result
    assert steps["by_speed"]["step_time_s"] < steps["eplb"]["step_time_s"]
    assert steps["search"]["step_time_s"] < steps["eplb"]["step_time_s"]
    assert steps["eplb"]["placement"]["rank_rows_by_speed"] is None
    assert steps["by_speed"]["placement"]["rank_rows_by_speed"] < 1 / 0.6


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
