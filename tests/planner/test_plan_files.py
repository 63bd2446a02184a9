"""Plan files: what is wrong with one is said in one line at its place."""

import re
from pathlib import Path

import pytest

from moesim.errors import UserError
from moesim.planner.plan import load_plan
from moesim.planner.serving_plan import load_any_plan
from moesim.planner.simulations import plan_hash
from moesim.scenario import gpu_spec

SHIPPED = sorted((Path(__file__).parents[2] / "scenarios" / "plans").glob("*.yaml"))

TEXT = """\
name: t
model: {preset: deepseek-moe-16b}
goal:
  tokens: 2e12
  gpus:
    - {gpu: h800, at_most: 64, usd_per_gpu_hour: 2.0, source: a quote}
workload: {sequence_length: 4096, global_batch: 64}
routing: {kind: uniform}
choices: {gpus: [8, 16], expert: [1, 8]}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(TEXT)
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_plans_load_and_name_the_source_of_every_price(path):
    plan = load_any_plan(path)
    assert plan.choices
    for offer in plan.goal.gpus:
        assert gpu_spec(offer.gpu).name == offer.gpu
        assert re.search(r"\b20[0-9][0-9]", offer.source), "a price without a date says little"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("choicez.gpus=[8]", 'choicez: unknown key; did you mean "choices"?'),
        ("choices.expret=[8]", 'choices.expret: unknown key; did you mean "expert"?'),
        ("choices.gpus=[8, 8]", "choices.gpus.1: listed twice; keep one"),
        ("choices.gpus=[]", "choices.gpus: must not be empty"),
        ("choices.gpus=[0]", "choices.gpus.0: must be greater than 0, got 0"),
        ("goal.gpus.0.gpu=h900", 'goal.gpus.0.gpu: unknown GPU "h900"; known: a100'),
        ("goal.by=2027-01-01", "goal: start and by belong together"),
        ("goal.usd=a lot", "goal.usd: expected a number"),
        ("choices.schedule=[{kind: foo}]", 'choices.schedule.0.kind: "foo" is not allowed'),
        ("choices.capacity=[{kind: foo}]", 'choices.capacity.0.kind: "foo" is unknown; known: none, expert, device'),
        ("choices.group_limit=[2]", "choices.group_limit: routing.router has no groups"),
        ("objectives=[usd, usd]", 'objectives.1: "usd" is listed twice'),
        ("model.preset=deepseek-moe-17b", 'model.preset: unknown model "deepseek-moe-17b"'),
        ("baseline={model: {preset: mixtral-8x7b}, source: x}", "baseline.model: has experts; name a dense model"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(file, override, said):
    with pytest.raises(UserError) as error:
        load_plan(file, [override])
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 1


def test_a_mistake_in_the_file_has_its_line(file):
    file.write_text(TEXT.replace("at_most: 64", "at_mots: 64"))
    with pytest.raises(UserError, match=r'plan.yaml:6:\d+: goal.gpus.0.at_mots: unknown key; did you mean "at_most"'):
        load_plan(file)


@pytest.mark.parametrize(
    ("start", "by", "days"), [("2027-01-01", "2027-03-02", 60.0), ("2028-02-01", "2028-03-01", 29.0)]
)
def test_a_date_is_a_number_of_days(file, start, by, days):
    plan = load_plan(file, [f"goal.start={start}", f"goal.by={by}"])
    assert plan.goal.deadline_days == days


def test_a_date_before_the_start_and_two_deadlines_are_refused(file):
    for overrides in (["goal.start=2027-02-01", "goal.by=2027-01-01"], ["goal.start=2027-13-01", "goal.by=2028-01-01"]):
        with pytest.raises(UserError, match=r"goal"):
            load_plan(file, overrides)
    with pytest.raises(UserError, match="two deadlines"):
        load_plan(file, ["goal.start=2027-01-01", "goal.by=2027-02-01", "goal.days=3"])


def test_the_hash_of_a_plan_follows_its_content(file):
    plan = load_plan(file)
    assert plan_hash(plan) == plan_hash(load_plan(file))
    assert plan_hash(plan) != plan_hash(load_plan(file, ["goal.usd=1"]))


def test_a_plan_that_names_no_software_is_ranked_as_megatron_runs_it(file):
    assert load_plan(file).implementation.kind == "megatron"
    assert "implementation" not in load_plan(file).model_fields_set
    assert load_plan(file, ["implementation=fused"]).implementation.kind == "fused"
