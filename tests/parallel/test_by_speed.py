"""Placing by speed: equal speeds are EPLB's global policy, else rows go in proportion, and slots stay equal."""

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import moesim
from moesim.parallel.eplb import balance_experts, place_by_speed, speeds_of_group
from moesim.parallel.expert_map import ExpertMap
from moesim.parallel.replacement import rank_loads
from moesim.scenario import Eplb, Scenario, Search
from moesim.scenario.failures import RankSpeed, Speeds

SIZES = st.tuples(st.integers(2, 8), st.integers(2, 6), st.integers(0, 3), st.integers(0, 2**31))


@settings(max_examples=60)
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
