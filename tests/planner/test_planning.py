"""Whole plans: what wins was simulated, what is written can be run, what nothing fits says why."""

import json
import shutil

import pytest
from plan_cases import build_plan

from moesim.errors import InfeasibleError, UserError
from moesim.planner.outcome import Outcome, cheapest_and_soonest, missed_limit
from moesim.planner.planning import ProgressCallbacks, make_plan
from moesim.planner.simulations import Folder
from moesim.run import simulate
from moesim.scenario import load_scenario
from moesim.study import read_points, scenario_id

DENSE = {
    "layers": 4,
    "hidden": 512,
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 64,
    "dense_intermediate": 2048,
    "vocab": 1000,
}
GOAL = {"goal.usd": 100, "goal.days": 0.25, "baseline": {"model": DENSE, "source": "a test", "simulate": 1}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished plan: the plan, its folder, the content of plan.json."""
    plan = build_plan(GOAL)
    path = tmp_path_factory.mktemp("plan") / "out"
    return plan, path, make_plan(Folder(path, plan, workers=2))


def _records(path):
    return read_points(path / "points.jsonl").by_id()


def test_the_winner_has_the_best_simulated_objective_of_all_that_meet_the_goal(made):
    plan, path, content = made
    records = _records(path)
    meeting = []
    for point, outcome in content["outcomes"].items():
        result = records[point].result
        assert outcome["usd"] == result["cost"]["usd_total"]
        assert outcome["days"] == result["cost"]["days"]
        simulated = Outcome(*(outcome[name] for name in Outcome._fields))
        if missed_limit(plan, simulated) is None:
            meeting.append((outcome["usd"], point))
    assert content["ranking"] == [point for _, point in sorted(meeting)]
    assert len(content["ranking"]) < len(content["outcomes"])  # the random sample holds some that miss the goal
    assert content["front"][0] == content["ranking"][0]


def test_nothing_simulated_beats_the_front(made):
    _, _, content = made
    outcomes = content["outcomes"]
    for point in content["ranking"]:
        better = [
            other
            for other in content["front"]
            if outcomes[other]["usd"] <= outcomes[point]["usd"] and outcomes[other]["days"] <= outcomes[point]["days"]
        ]
        assert better
        assert (point in content["front"]) == (better == [point])


def test_every_point_is_a_scenario_file_that_gives_the_recorded_result(made):
    _, path, content = made
    records = _records(path)
    for record in records.values():
        scenario = load_scenario(path / record.scenario_file)
        assert scenario_id(scenario) == record.id
    winner = records[content["ranking"][0]]
    assert simulate(load_scenario(path / winner.scenario_file)).result == winner.result


def test_scenario_files_say_what_was_chosen_and_what_a_gpu_costs(made):
    _, path, content = made
    text = (path / _records(path)[content["ranking"][0]].scenario_file).read_text()
    assert "# Chosen by the planner:" in text
    assert "(a test)" in text


def test_the_differences_to_the_runner_up_add_up(made):
    _, _, content = made
    found = content["why"]["runner_up"]
    assert sum(part["usd_difference"] for part in found["parts"]) == pytest.approx(found["usd_difference"], rel=1e-4)
    assert found["chosen_differently"]
    assert found["usd_difference"] >= 0


def test_at_the_flip_both_kinds_cost_the_same(made):
    plan, _, content = made
    prices = {offer.gpu: offer.usd_per_gpu_hour for offer in plan.goal.gpus}
    outcomes, winner = content["outcomes"], content["outcomes"][content["ranking"][0]]
    assert content["sensitivity"]["price_flips"]
    for flip in content["sensitivity"]["price_flips"]:
        other = outcomes[flip["layout"]]
        assert other["usd"] * flip["usd_per_gpu_hour"] / prices[flip["gpu"]] == pytest.approx(winner["usd"])
        assert flip["price_ratio"] < flip["price_ratio_now"]  # or it would have won


def test_slower_links_never_help_and_balanced_routing_never_hurts(made):
    _, _, content = made
    changes = {change["change"]: change for change in content["sensitivity"]["changes"]}
    winner = content["outcomes"][content["ranking"][0]]
    assert changes["bandwidth of all links x0.5"]["days"] >= winner["days"]
    assert changes["perfectly balanced routing"]["days"] <= winner["days"] * 1.001
    assert {"price of h100 x0.7", "price of h200 x1.3"} <= changes.keys()


def test_the_baseline_was_simulated_under_the_same_goal(made):
    _, path, content = made
    base = content["baseline"]
    record = _records(path)[base["id"]]
    assert record.result["router"]["kind"] == "none (dense model)"
    assert base["usd_of_winner"] == pytest.approx(content["outcomes"][content["ranking"][0]]["usd"] / base["usd"])
    assert base["id"] not in content["ranking"]


def test_the_screen_was_checked_on_layouts_drawn_at_random(made):
    _, _, content = made
    error = content["screen_error"]
    assert error["layouts"] == 4
    assert error["rank_correlation"] > 0.9
    assert 0 <= error["median"] <= error["worst"] < 0.1


def test_interrupted_and_resumed_gives_the_same_plan(made, tmp_path):
    plan, path, content = made
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    lines = (copy / "points.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "points.jsonl").write_bytes(b"".join(lines[1::2]) + lines[0][: len(lines[0]) // 2])  # torn in the middle
    (copy / "variants.jsonl").unlink()
    (copy / "plan.json").write_text(json.dumps({"hash": json.loads((path / "plan.json").read_text())["hash"]}))
    resumed = make_plan(Folder(copy, plan, workers=1))  # as many processes as there are, the plan is one
    assert resumed == content
    assert (copy / "plan.json").read_bytes() == (path / "plan.json").read_bytes()
    assert {point: record.result for point, record in _records(copy).items()} == {
        point: record.result for point, record in _records(path).items()
    }
    for scenario in (path / "scenarios").iterdir():
        assert (copy / "scenarios" / scenario.name).read_bytes() == scenario.read_bytes()


def test_a_folder_of_another_plan_is_refused(made, small_plan):
    _, path, _ = made
    with pytest.raises(UserError, match="holds another plan"):
        make_plan(Folder(path, small_plan({"goal.usd": 99}), workers=1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"memory": {"reserved": "200 GB"}}, "memory: the smallest layout needs"),
        ({"choices.gpus": [16]}, "more GPUs than offered"),
        ({"choices.expert": [3]}, "sizes that do not divide"),
    ],
)
def test_what_never_gets_as_far_as_a_simulation_names_the_constraint(small_plan, tmp_path, changes, said):
    with pytest.raises(InfeasibleError, match=r"none of .* combinations meets the goal") as error:
        make_plan(Folder(tmp_path, small_plan(changes), workers=1))
    assert said in str(error.value)
    assert error.value.exit_code == 2
    assert not (tmp_path / "points.jsonl").exists() or not _records(tmp_path)


def test_a_goal_out_of_reach_is_stated_with_simulated_numbers(small_plan, tmp_path):
    plan = small_plan({"goal.days": 0.01, "choices.gpus": [2], "search": {"simulate": 1, "check": 0}})
    with pytest.raises(InfeasibleError, match=r"deadline: the fastest layout takes 0\.\d of 0\.01 days") as error:
        make_plan(Folder(tmp_path, plan, workers=1))
    simulated = {record.values["cluster.gpu"]: record.result["scenario_name"] for record in _records(tmp_path).values()}
    assert simulated["h200"] in str(error.value)


def test_a_plan_that_failed_gives_way_to_the_next(small_plan, tmp_path):
    quick = {"choices.gpus": [2], "choices.recompute": ["none"], "search": {"simulate": 1, "check": 0}}
    with pytest.raises(InfeasibleError):
        make_plan(Folder(tmp_path, small_plan({**quick, "goal.days": 0.01}), workers=1))
    assert json.loads((tmp_path / "plan.json").read_text())["status"] == "failed"
    assert _records(tmp_path)
    content = make_plan(Folder(tmp_path, small_plan(quick), workers=1))
    assert content["status"] == "done"
    assert set(_records(tmp_path)) >= set(content["ranking"])


def test_one_router_is_trained_once_for_all_layouts(small_plan, tmp_path):
    """Also where micro-batches, expert groups and global batches ask for more or fewer tokens of it."""
    routing = {"kind": "train", "router": {"kind": "deepseek_moe"}, "balance": {"expert": 0.01}, "steps": 2}
    routing["thin"] = {"layers": 1, "hidden": 16, "heads": 2, "expert_intermediate": 8, "context": 64}
    plan = small_plan(
        {
            "routing": routing | {"thin": routing["thin"] | {"tokens_per_step": 128}},
            "choices.gpus": [2],
            "choices.pipeline": [1],
            "choices.recompute": ["none"],
            "search": {"simulate": 2, "check": 0},
            "sensitivity": {"candidates": 0},
        }
    )
    steps = []
    folder = Folder(tmp_path / "out", plan, workers=1, cache_dir=tmp_path / "cache")
    content = make_plan(folder, callbacks=ProgressCallbacks(training=steps.append))
    assert content["counts"]["simulated"] == 2
    assert [report.step for report in steps] == [1, 2]
    assert len(list((tmp_path / "cache" / "checkpoints").iterdir())) == 1
    assert {record.result["router"]["steps"][-1] for record in _records(tmp_path / "out").values()} == {2}


def test_failed_simulations_give_no_verdict(small_plan, tmp_path, monkeypatch):
    def break_down(points, *, on_record, **others):
        for point in points:
            on_record(point.record("failed", pid=1, reason="ValueError: a bug"))

    monkeypatch.setattr("moesim.planner.simulations.run_points", break_down)
    plan = small_plan({"choices.gpus": [2], "search": {"simulate": 1, "check": 0}})
    with pytest.raises(UserError, match="1 of 1 simulations failed, so no verdict is given: ValueError") as error:
        make_plan(Folder(tmp_path, plan, workers=1))
    assert error.value.exit_code == 1


def test_the_front_keeps_what_nothing_beats():
    points = [Outcome(1.0, usd, days, 0.5, 1.0) for usd, days in ((3, 1), (1, 3), (2, 2), (2, 4), (3, 3))]
    assert [(point.usd, point.days) for point in cheapest_and_soonest(points, lambda point: point)] == [
        (1, 3),
        (2, 2),
        (3, 1),
    ]
