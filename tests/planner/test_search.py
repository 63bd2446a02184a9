"""The search of spaces too large to enumerate: it finds what enumeration finds, and resumes to the same trials."""

import warnings

import pytest
from plan_cases import SCREEN

from moesim.errors import UserError
from moesim.planner.plan import Search
from moesim.planner.search import EvaluationPool, Evaluator, enumerate_space, search_space, uses_nsga2
from moesim.planner.space import Space

pytestmark = pytest.mark.usefixtures("few_tokens")

CHANGES = {"search": {"method": "nsga2", "trials": 90, "population": 15}, "goal.usd": 120}


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
    assert found.rejections.looked_at <= 90 < every.rejections.looked_at
    best = min(candidate.screened.usd for candidate in every.candidates)
    assert min(candidate.screened.usd for candidate in found.candidates) <= 1.1 * best
    soonest = min(candidate.screened.days for candidate in every.candidates)
    assert min(candidate.screened.days for candidate in found.candidates) <= 1.1 * soonest


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(small_plan, tmp_path):
    plan = small_plan(CHANGES | {"search.trials": 60})
    whole = _searched(plan, tmp_path / "whole")
    stop = 41

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
    plan = small_plan(CHANGES | {"search.trials": 20})
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
