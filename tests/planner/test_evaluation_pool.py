"""Many processes evaluator as one does: the same evaluations in the same order, and none is lost with its process."""

import os
import signal

import pytest
from plan_cases import build_plan

from moesim.errors import UserError
from moesim.planner.screen import Screen
from moesim.planner.search import SMALL, EvaluationPool, Evaluator, Traces, grouped, opened_pool
from moesim.planner.space import Space
from moesim.study.workers import WorkerDied, opened_workers


@pytest.fixture(scope="module", autouse=True)
def few_screened_tokens():
    """Not here: other processes screen, too."""


@pytest.fixture(scope="module")
def plan():
    return build_plan({"goal.days": 0.5, "goal.usd": 60, "choices.recompute": ["none"], "choices.gpus": [4]})


def _evaluator(plan):
    return Evaluator(Space.of(plan), Screen(Traces(None).of))


@pytest.fixture(scope="module")
def alone(plan):
    evaluator = _evaluator(plan)
    EvaluationPool(evaluator).evaluate_all(list(evaluator.space.layouts()))
    return evaluator


def test_processes_give_the_verdicts_of_one_in_the_same_order_though_one_is_killed(plan, alone):
    evaluator = _evaluator(plan)
    told = []
    with opened_workers(count=2, cluster=None) as place:
        collect, killed = place.collect, []

        def collect_and_kill_another(future):
            found = collect(future)
            if not killed:
                killed.append(next(iter(place._busy.values())).pid.result())
                os.kill(killed[0], signal.SIGKILL)
            return found

        place.collect = collect_and_kill_another
        EvaluationPool(evaluator, place).evaluate_all(
            list(evaluator.space.layouts()), progress=lambda done, size: told.append((done, size))
        )
    assert killed
    assert evaluator.fitting == alone.fitting
    assert evaluator.rejections.as_json() == alone.rejections.as_json()
    assert told[-1] == (evaluator.space.size, evaluator.space.size)


def test_a_group_that_always_kills_its_process_is_an_error(plan):
    evaluator = _evaluator(plan)
    with opened_workers(count=1, cluster=None) as place:
        collect = place.collect

        def collect_nothing(future):
            collect(future)
            return WorkerDied(1, retry=True)

        place.collect = collect_nothing
        with pytest.raises(UserError, match="was memory short"):
            EvaluationPool(evaluator, place).evaluate_all(list(evaluator.space.layouts())[:1])


def test_groups_hold_every_combination_once(plan):
    space = Space.of(plan)
    groups = grouped(space, list(space.layouts()))
    assert sorted(str(layout) for group in groups for layout in group) == sorted(map(str, space.layouts()))
    for group in groups:
        assert len({(layout.expert, layout.micro_batch) for layout in group}) == 1


def test_few_combinations_start_no_process(plan):
    evaluator = _evaluator(plan)
    with opened_pool(evaluator, workers=4, cache_dir=None, expected=SMALL) as pool:
        assert pool.place is None
    with opened_pool(evaluator, workers=1, cache_dir=None, expected=10 * SMALL) as pool:
        assert pool.place is None
