"""Placing anew in a run: the curve and its best interval, what is moved, and what the run says of it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moesim
from moesim.errors import UserError
from moesim.kernels import kernel_model
from moesim.parallel import TrafficSampler
from moesim.program.scenario_fabric import scenario_fabric
from moesim.results.definitions import DEFINITIONS, paths
from moesim.results.placement import Intervals, expert_state_bytes, moving, never_falling
from moesim.run import obtain_trace
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT

pytestmark = pytest.mark.usefixtures("few_tokens")


def placed(every: int | None = 100, /, **overrides: Any) -> Scenario:
    keys = {
        "routing": {"kind": "trace", "file": "library:64x6/no-balance"},
        "model.layers": 8,
        "capacity.kind": "none",
        "workload.sequence_length": 1024,
        "workload.global_batch": 16,
        "workload.micro_batch": 2,
        "uncertainty.samples": 1,
        "placement": {"kind": "eplb", "redundant_experts": 16} | ({"every": every} if every else {}),
    }
    return moesim.load_scenario("quickstart", keys | overrides)


def curve(moving_s: float, slope: float, *, longest: int = 10_000) -> Intervals:
    return Intervals(
        age_A=np.array([0.0, longest]),
        seconds_A=np.array([1.0, 1.0 + slope * longest]),
        interval_N=np.array([1.0, longest]),
        moving_N=np.full(2, moving_s),
    )


@pytest.mark.parametrize(("moving_s", "slope"), [(0.05, 1e-5), (1.0, 1e-4), (2.0, 1e-6)])
def test_the_best_interval_is_the_square_root_where_steps_age_evenly(moving_s: float, slope: float) -> None:
    every, seconds = curve(moving_s, slope).best()  # least of 1 + slope (n + 1) / 2 + moving / n
    root = np.sqrt(2 * moving_s / slope)
    assert every == pytest.approx(root, abs=1)
    assert seconds == pytest.approx(1 + slope * (root + 1) / 2 + moving_s / root, rel=1e-5)


def test_free_moves_are_made_at_once_and_useless_ones_as_rarely_as_may_be() -> None:
    assert curve(0.0, 1e-4).best()[0] == 1
    assert curve(0.5, 0.0).best()[0] == 10_000
    assert curve(0.5, 1e-4).first_below(1.0) is None  # nothing is faster than a fresh placement


@given(st.lists(st.floats(0.1, 10.0), min_size=1, max_size=30))
def test_the_curve_never_falls_keeps_the_mean_and_leaves_what_rises(values: list[float]) -> None:
    given_A = np.array(values)
    fitted_A = never_falling(given_A)
    assert (np.diff(fitted_A) >= 0).all() and len(fitted_A) == len(given_A)
    assert fitted_A.mean() == pytest.approx(given_A.mean())
    np.testing.assert_allclose(never_falling(np.sort(given_A)), np.sort(given_A))
    np.testing.assert_allclose(never_falling(fitted_A), fitted_A)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return moesim.simulate(placed()).result


def test_a_run_says_what_moving_costs_and_brings(found: dict[str, Any]) -> None:
    facts = found["placement"]["replacing"]
    ages = {each["age"]: each for each in facts["ages"]}
    assert ages[facts["mean_age"]]["step_time_s"] == found["step_time_s"] and facts["mean_age"] == 50.5
    assert facts["step_time_s"] == pytest.approx(ages[50.5]["mean_step_time_s"] + facts["moving_per_step_s"])
    assert facts["moving_per_step_s"] == facts["moving_s"] / 100
    assert facts["fresh_step_time_s"] <= facts["step_time_s"] and facts["moved_bytes"] > 0
    assert facts["best_step_time_s"] <= min(each["step_time_s"] for each in facts["intervals"])
    defined = {path for path in DEFINITIONS if path.startswith("placement.replacing.")}
    assert defined == paths(facts, "placement.replacing")
    assert any("placed 50.5 steps ago" in text for text in found["warnings"])


def test_ages_are_steps_that_other_scenarios_have_alone(found: dict[str, Any]) -> None:
    facts = found["placement"]["replacing"]
    once = moesim.simulate(placed(None)).result
    assert "replacing" not in once["placement"]
    assert facts["ages"][0] == pytest.approx({**facts["ages"][0], "age": 0.0, "step_time_s": once["step_time_s"]})
    in_order = placed(None, placement={"kind": "contiguous", "judged_on": "later"})
    assert facts["contiguous_step_time_s"] == pytest.approx(moesim.simulate(in_order).result["step_time_s"], rel=1e-6)


def moved(scenario: Scenario, ages: tuple[float, float]) -> tuple[float, float]:
    trace = obtain_trace(scenario)
    assert trace is not None
    fabric = scenario_fabric(scenario, kernel_model(scenario.cluster.pools[0].spec, scenario.compute.profile))
    old, new = (TrafficSampler(scenario, trace, placed_ago=age) for age in ages)
    assert old.maps is not None and new.maps is not None
    return moving(new, fabric, old.maps, new.maps)


def test_whole_experts_with_their_states_move_and_none_to_where_they_are() -> None:
    assert moved(placed(), (100, 100)) == (0.0, 0.0)
    two_groups = {"parallelism.data": 16, "cluster.nodes": 2, "workload.global_batch": 32}
    size = {}
    for zero in (0, 1):
        scenario = placed(**two_groups, **{"parallelism.zero.expert": zero})
        each = expert_state_bytes(scenario, TrafficSampler(scenario, obtain_trace(scenario)))  # type: ignore[arg-type]
        size[zero], seconds = moved(scenario, (100, 0))
        assert size[zero] % (2 * each) == 0 and seconds > 0  # both groups move the same experts
    precision = scenario.workload.precision
    assert precision.master == "none"
    weights, states = BYTES_PER_ELEMENT[precision.weights], 2 * BYTES_PER_ELEMENT[precision.optimizer]
    assert size[1] / size[0] == pytest.approx((weights + states / 2) / (weights + states))  # ZeRO 1 halves the states


def test_an_interval_is_an_axis_and_mistakes_are_one_line() -> None:
    for every, words in ((801, "use at most 800"), (0, "greater than 0")):
        with pytest.raises(UserError, match=words):
            moesim.simulate(placed(placement={"kind": "eplb", "every": every}))
    with pytest.raises(UserError, match="one recorded step"):
        moesim.simulate(placed(routing={"kind": "uniform"}))
    with pytest.raises(UserError, match="every"):
        placed(placement={"kind": "search", "every": 10})
