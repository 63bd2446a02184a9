"""A search that measures takes, of its placements, the one with the shortest simulated step on the rows to place by."""

from typing import Any

import pytest

import moesim
from moesim.parallel import TrafficSampler
from moesim.results.definitions import definition, paths
from moesim.routing.request import SearchReport, StepReport
from moesim.run import TRAFFIC_WEIGHTS, choose_placement, mean_step_seconds, obtain_trace
from moesim.scenario import Scenario, Search

pytestmark = pytest.mark.slow


def searched(**placement: Any) -> Scenario:
    keys: dict[str, Any] = {
        "routing": {"kind": "trace", "file": "library:64x6/no-balance"},
        "model.layers": 5,
        "capacity.kind": "none",
        "workload.sequence_length": 1024,
        "workload.global_batch": 16,
        "workload.micro_batch": 2,
        "uncertainty.samples": 1,
        "placement": {"kind": "search", "tries": 100} | placement,
    }
    return moesim.load_scenario("quickstart", keys)


@pytest.fixture(scope="module")
def chosen() -> tuple[Scenario, list[dict[str, float]], list[SearchReport | StepReport]]:
    scenario, reports = searched(measured=True), []
    best, found = choose_placement(scenario, obtain_trace(scenario), progress=reports.append)
    return best, [vars(each) for each in found], reports


def test_the_shortest_step_on_the_rows_to_place_by_is_taken(chosen: Any) -> None:
    best, found, reports = chosen
    assert [each["traffic"] for each in found] == list(TRAFFIC_WEIGHTS)
    assert best.placement.traffic == min(found, key=lambda each: each["step_time_s"])["traffic"]
    assert [report.tried for report in reports] == list(range(1, len(TRAFFIC_WEIGHTS) + 1))
    assert [report.step_time_s for report in reports] == [each["step_time_s"] for each in found]
    # One of them by itself: the first half of the trace, placed by and simulated on.
    trace = obtain_trace(best)
    assert trace is not None and isinstance(best.placement, Search)
    part = TrafficSampler(best, trace).placing_part()
    assert part.num_sequences == TrafficSampler(best, trace).placing_sequences[1]
    alone = best.model_copy(update={"placement": best.placement.model_copy(update={"made_on": "same"})})
    assert mean_step_seconds(alone, part) == min(each["step_time_s"] for each in found)


def test_a_run_says_what_was_tried_and_is_the_one_with_that_weight(chosen: Any) -> None:
    best, found, _ = chosen
    run = moesim.simulate(searched(measured=True))
    assert run.result["placement"]["searched"] == found and run.scenario == best
    assert all(definition(f"placement.{path}") for path in paths(run.result["placement"]))
    plain = moesim.simulate(searched(traffic=best.placement.traffic)).result
    assert plain["step_time_s"] == run.result["step_time_s"] and "searched" not in plain["placement"]
