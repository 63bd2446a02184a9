"""Every study that ships loads, and one point of each question runs."""

from pathlib import Path

import pytest

from moesim.run import simulate
from moesim.scenario import load_scenario
from moesim.sweeper import load_study

FOLDER = Path(__file__).parent.parent.parent / "scenarios" / "studies"
STUDIES = sorted(FOLDER.glob("*.yaml"))
QUESTIONS = ("group-limit", "balance", "capacity", "granularity", "devices", "cost")


def test_the_six_questions_are_there() -> None:
    assert set(QUESTIONS) <= {file.stem for file in STUDIES}


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_point_is_a_scenario_or_says_why_not(file: Path) -> None:
    study = load_study(file)
    assert study.name == file.stem
    assert len(study.points) > len(study.invalid_points)
    assert all(invalid_point.reason for invalid_point in study.invalid_points)
    assert f"moesim sweep scenarios/studies/{file.name}" in file.read_text()


@pytest.mark.parametrize("name", QUESTIONS[:4])
def test_the_first_point_of_a_question_about_routers_runs(name: str) -> None:
    first = load_study(FOLDER / f"{name}.yaml", ["uncertainty.samples=1"]).points[0].scenario
    small = first.model_copy(update={"workload": first.workload.model_copy(update={"global_batch": 8})})
    result = simulate(small).result
    assert result["step_time_s"] > 0
    assert result["router"]["validation_loss"] > 0


def test_granularity_keeps_parameters_and_activated_parameters() -> None:
    models = [point.scenario.model for point in load_study(FOLDER / "granularity.yaml").points]
    assert len({model.experts * model.expert_intermediate for model in models}) == 1
    assert len({model.top_k * model.expert_intermediate for model in models}) == 1
    assert len({model.experts for model in models}) == 4


def test_the_bases_of_the_studies_are_scenarios() -> None:
    for file in STUDIES:
        assert load_scenario(FOLDER / load_study(file).base).name
