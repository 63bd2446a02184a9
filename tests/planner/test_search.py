"""The search of spaces too large to enumerate: it finds what enumeration finds, and resumes to the same trials.

The routing that layouts are screened with.

A plan whose routing is stated as a balancedness: each layout has it on its own ranks, or falls out.
"""

import warnings

import numpy as np
import pytest
from plan_cases import SCREEN, build_plan

from moesim.errors import UserError
from moesim.planner.plan import Search
from moesim.planner.search import EvaluationPool, Evaluator, Traces, enumerate_space, search_space, uses_nsga2
from moesim.planner.space import Discarded, Space
from moesim.scenario import Scenario
from moesim.trace import trace_hash

pytestmark = pytest.mark.usefixtures("few_tokens")

CHANGES = {"search": {"method": "nsga2", "trials": 60, "population": 12}, "goal.usd": 120}


def _evaluator(plan):
    return Evaluator(Space.of(plan), SCREEN)


def _searched(plan, path):
    evaluator = _evaluator(plan)
    search_space(EvaluationPool(evaluator), storage=path, study_name="a-test")
    return evaluator


def test_small_spaces_are_enumerated_and_large_ones_searched():
    assert not uses_nsga2(Search(enumerate_at_most=100), 100)
    assert uses_nsga2(Search(enumerate_at_most=100), 101)
    assert uses_nsga2(Search(method="nsga2"), 1)
    assert not uses_nsga2(Search(method="enumerate", enumerate_at_most=1), 10**9)


def test_the_search_finds_what_enumeration_finds(small_plan, tmp_path):
    plan = small_plan(CHANGES)
    every = _evaluator(plan)
    enumerate_space(EvaluationPool(every))
    found = _searched(plan, tmp_path / "journal")
    assert found.rejections.looked_at <= 60 < every.rejections.looked_at
    best = min(candidate.screened.usd for candidate in every.candidates)
    assert min(candidate.screened.usd for candidate in found.candidates) <= 1.1 * best
    soonest = min(candidate.screened.days for candidate in every.candidates)
    assert min(candidate.screened.days for candidate in found.candidates) <= 1.1 * soonest


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(small_plan, tmp_path):
    plan = small_plan(CHANGES | {"search.trials": 30})
    whole = _searched(plan, tmp_path / "whole")
    stop = 22

    def interrupt(done, total):
        if done == stop:
            raise KeyboardInterrupt

    evaluator = _evaluator(plan)
    with pytest.raises(KeyboardInterrupt):
        search_space(EvaluationPool(evaluator), storage=tmp_path / "parts", study_name="a-test", progress=interrupt)
    resumed = _searched(plan, tmp_path / "parts")
    assert resumed.fitting == whole.fitting
    assert resumed.rejections.as_json() == whole.rejections.as_json()


def test_a_finished_search_looks_at_nothing_new(small_plan, tmp_path):
    plan = small_plan(CHANGES | {"search.trials": 12})
    first = _searched(plan, tmp_path / "journal")
    size = (tmp_path / "journal").stat().st_size
    again = _searched(plan, tmp_path / "journal")
    assert again.rejections.as_json() == first.rejections.as_json()
    assert (tmp_path / "journal").stat().st_size - size < 500  # opening it writes a line


def test_a_database_keeps_the_search_too(small_plan, tmp_path):
    plan = small_plan(CHANGES | {"search.trials": 4, "search.population": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # SQLAlchemy closes its connections when collected
        evaluator = _searched(plan, f"sqlite:///{tmp_path}/search.db")
    assert 1 <= evaluator.rejections.looked_at <= 4
    assert (tmp_path / "search.db").exists()


def test_a_storage_out_of_reach_is_one_line(small_plan, tmp_path):
    with pytest.raises(UserError, match="cannot keep the search there") as error:
        _searched(small_plan(CHANGES), f"sqlite:///{tmp_path}/missing/folder/search.db")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [1024, 131_072])
def test_a_trace_does_not_depend_on_what_was_asked_for_before(length):
    plan = build_plan({"workload.sequence_length": length, "compute.profile": "roofline"})
    space, scenarios = Space.of(plan), []
    for layout in space.layouts():
        try:
            scenarios.append(space.scenario(layout))
        except Discarded:
            continue
    chosen = [scenarios[0], scenarios[-1], scenarios[len(scenarios) // 2]]
    forwards, backwards = Traces(None), Traces(None)
    first = [trace_hash(forwards.of(scenario)) for scenario in chosen]
    again = [trace_hash(backwards.of(scenario)) for scenario in reversed(chosen)][::-1]
    assert first == again
    part = chosen[0].model_copy(update={"workload": chosen[0].workload.model_copy(update={"global_batch": 1})})
    assert trace_hash(Traces(None).of(part)) == first[0], "a part of a layout's step is screened with its routing"


ROUTING = {"kind": "balancedness", "value": 0.4}


def layouts() -> tuple[list[Scenario], list[Discarded]]:
    space = Space.of(build_plan({"routing": ROUTING, "choices.pipeline": [1], "choices.micro_batch": [1]}))
    fitting, refused = [], []
    for layout in space.layouts():
        try:
            fitting.append(space.scenario(layout))
        except Discarded as reason:
            refused.append(reason)
    return fitting, refused


def test_layouts_that_cannot_reach_the_value_fall_out_by_its_key() -> None:
    fitting, refused = layouts()
    assert {scenario.parallelism.expert for scenario in fitting} == {4}  # 2 ranks are never below 0.5, 1 always at 1
    assert any("routing.value" in str(reason) for reason in refused)


def test_each_layout_is_screened_with_the_routing_of_its_own_ranks() -> None:
    fitting, _ = layouts()
    traces = Traces(None)
    for scenario in fitting[:4]:
        for ids_STK in traces.of(scenario).final.expert_ids_LSTK:
            ranks = ids_STK.reshape(-1) // (scenario.model.experts // scenario.parallelism.expert)
            rows_D = np.bincount(ranks, minlength=scenario.parallelism.expert)
            assert rows_D.mean() / rows_D.max() == pytest.approx(0.4, rel=0.01)
