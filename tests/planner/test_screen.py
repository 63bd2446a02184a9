"""The screen: its walk is extended exactly, its memory that of the report, its error small."""

from dataclasses import replace

import pytest
from plan_cases import SCREEN

from moesim.planner.outcome import Outcome, outcome_of
from moesim.planner.ranking import rank_correlation, screen_error
from moesim.planner.screen import FILLING_MICRO_BATCHES, Screen, pipeline_finish, prepare_pipeline
from moesim.planner.search import EvaluationPool, Evaluator, enumerate_space
from moesim.planner.space import Space
from moesim.run import obtain_trace, simulate
from moesim.scenario import PipelineSchedule
from moesim.schedules import SCHEDULES as TABLE
from moesim.schedules import Pass, build_schedule

pytestmark = pytest.mark.usefixtures("few_tokens")

SCHEDULES = [PipelineSchedule(kind=kind, virtual=2 if facts.virtual else 1) for kind, facts in TABLE.items()]
FEW_HELD = [schedule for schedule in SCHEDULES if not schedule.facts.holds_all]
_SECONDS = {Pass.FORWARD: 1.0, Pass.BACKWARD: 2.1, Pass.INPUT: 1.2, Pass.WEIGHT: 0.9}


def _seconds(rank, action):
    """Uneven ranks and chunks."""
    return sum(_SECONDS[work.kind] * (1 + 0.1 * rank + 0.05 * work.chunk) for work in action.works)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_long_schedules_are_extended_exactly_from_short_ones(schedule):
    exact = prepare_pipeline(schedule.kind, 4, 64, schedule.virtual).finish(_seconds, p2p_seconds=0.3)
    quick = pipeline_finish(schedule, pipeline=4, num_micro_batches=64, seconds=_seconds, p2p_seconds=0.3)
    assert quick == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("schedule", FEW_HELD, ids=lambda schedule: schedule.kind)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_activations_peak_before_the_pipeline_is_filled_twice(schedule, ranks):
    short, long = (
        build_schedule(schedule.kind, num_ranks=ranks, num_micro_batches=count * ranks, virtual=schedule.virtual)
        for count in (FILLING_MICRO_BATCHES, 4 * FILLING_MICRO_BATCHES)
    )
    for rank in range(ranks):
        assert max(map(len, short.held(rank))) == max(map(len, long.held(rank)))


def test_the_screen_ranks_as_the_simulation_does(small_plan):
    """On every fifth layout of a small space: skewed routing, pipelines, recomputation, two kinds of GPU."""
    schedules = [{"kind": "1f1b"}, {"kind": "zb_h1"}, {"kind": "interleaved", "virtual": 2}]
    plan = small_plan({"choices.schedule": schedules, "choices.gpus": [4, 8], "choices.micro_batch": [2]})
    evaluator = Evaluator(Space.of(plan), SCREEN)
    enumerate_space(EvaluationPool(evaluator))
    pairs: list[tuple[Outcome, Outcome]] = []
    for candidate in evaluator.fitting[::5]:
        scenario = evaluator.space.scenario(candidate.layout)
        result = simulate(scenario).result
        pairs.append((candidate.screened, outcome_of(scenario, result["step_time_s"])))
        assert candidate.peak_bytes == pytest.approx(result["memory"]["peak_bytes"], rel=0.02)
    error = screen_error(pairs, objective=lambda outcome: outcome.usd)
    assert error is not None and error.layouts >= 12
    assert error.rank_correlation is not None and error.rank_correlation > 0.97
    assert error.median < 0.02
    assert error.worst < 0.06


@pytest.mark.parametrize("implementation", ["fused", "torch_eager"])
def test_the_screen_follows_the_implementation(small, implementation):
    scenario = small({"implementation": {"kind": implementation}, "workload.train_tokens": 1e9})
    seconds = Screen(obtain_trace).step_seconds(scenario)
    assert seconds == pytest.approx(simulate(scenario).result["step_time_s"], rel=0.05)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"parallelism": {"data": 2, "tensor": 2, "expert": 4}}, 0.01),
        ({"parallelism": {"data": 2, "context": 2, "expert": 2}}, 0.01),
        ({"parallelism": {"data": 4, "expert": 2, "expert_tensor": 2}}, 0.01),
        ({"parallelism.zero": {"dense": 1, "expert": 1}, "parallelism.expert": 2}, 0.01),
        ({"parallelism.zero": {"dense": 3, "expert": 3}, "parallelism.expert": 2}, 0.05),
        ({"overlap": {"gradient_reduction": True}, "parallelism.expert": 2}, 0.01),
        ({"parallelism": {"data": 2, "expert": 2, "pipeline": 2, "schedule": {"kind": "dualpipe"}}}, 0.06),
    ],
)
def test_the_screen_follows_every_kind_of_parallelism(small, changes, error):
    scenario = small({"uncertainty.samples": 1, **changes})
    screen, result = Screen(obtain_trace), simulate(scenario).result
    assert screen.step_seconds(scenario) == pytest.approx(result["step_time_s"], rel=error)
    assert screen.memory(scenario)[0] == pytest.approx(result["memory"]["peak_bytes"], rel=0.02)


def test_dense_models_are_screened_exactly(small):
    model = {
        "layers": 4,
        "hidden": 512,
        "heads": 8,
        "kv_heads": 8,
        "head_dim": 64,
        "dense_intermediate": 1024,
        "vocab": 1000,
    }
    scenario = small({"model": model, "routing": {"kind": "uniform"}, "parallelism": {"data": 2, "pipeline": 2}})
    screen = Screen(lambda scenario: None)
    result = simulate(scenario).result
    assert screen.step_seconds(scenario) == pytest.approx(result["step_time_s"], rel=1e-3)
    assert screen.memory(scenario)[0] == pytest.approx(result["memory"]["peak_bytes"], rel=1e-9)


def test_errors_are_told_apart_from_ranks():
    pairs = [(Outcome(s, s, s, 0.5, 1.0), Outcome(t, t, t, 0.5, 1.0)) for s, t in ((1.1, 1.0), (2.2, 2.0), (2.7, 3.0))]
    error = screen_error(pairs, objective=lambda outcome: outcome.usd)
    assert error is not None
    assert error.rank_correlation == pytest.approx(1.0)
    assert error.worst == pytest.approx(0.1)
    assert error.bias == pytest.approx(0.1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 1, 2], [1, 1, 2]) == pytest.approx(1.0)
    assert screen_error([], objective=lambda outcome: outcome.usd) is None
    assert screen_error(pairs[:2], objective=lambda outcome: outcome.usd) == replace(
        error,
        layouts=2,
        median=pytest.approx(0.1),
        worst=pytest.approx(0.1),
        bias=pytest.approx(0.1),
        rank_correlation=None,
    )
