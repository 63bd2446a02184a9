"""Plans of serving: the fewest instances that meet the limits, the front, going on, and what nothing meets."""

from dataclasses import replace

import pytest

from moesim.errors import InfeasibleError, UserError
from moesim.planner import serving_planning
from moesim.planner.plan import load_plan
from moesim.planner.serving_plan import ServingPlan, load_any_plan, scenario_of, units_of
from moesim.planner.serving_planning import POINTS_FILE, make_serving_plan, pareto, plan_digest
from moesim.report.serving_plan_view import print_serving_plan, serving_plan_page, serving_plot
from moesim.serving import load_serving, serve

pytestmark = pytest.mark.usefixtures("few_draws")

TEXT = """name: small
model: {preset: deepseek-moe-16b, layers: 2}
routing: {kind: uniform}
goal:
  serve: {best: gpus}
  gpus: [{gpu: h100, at_most: 8, usd_per_gpu_hour: 2.95, source: a quote}]
choices: {data: [1, 2], prefill_to_decode: [none, "1:1"]}
workload:
  kind: serving
  requests: 40
  arrivals:
    kind: poisson
    rate: 300.0
    input: {kind: fixed, tokens: 600}
    output: {kind: fixed, tokens: 8}
  slo: {ttft: 0.05, tpot: 0.0025}
alternative: {model: {preset: deepseek-moe-16b, layers: 1}, source: made for this test}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


def test_the_first_is_the_least_what_it_writes_serves_within_the_limits_and_it_goes_on(file, tmp_path, capsys) -> None:
    plan, out = load_any_plan(file), tmp_path / "out"
    assert isinstance(plan, ServingPlan) and plan == load_any_plan(file)
    with pytest.raises(UserError, match="this is a plan of serving"):
        load_plan(file)
    content = make_serving_plan(plan, out)
    ranking = content["ranking"]
    assert [each["gpus"] for each in ranking] == sorted(each["gpus"] for each in ranking) and ranking[0]["whole"]
    for each in ranking:
        assert each["good_share"] >= 0.9 and each["usd_per_hour"] == pytest.approx(2.95 * each["gpus"])
    served = serve(load_serving(out / "scenarios" / "0001.yaml"))
    assert served["good_share"] == ranking[0]["good_share"] and served["gpus"] == ranking[0]["gpus"]
    points = out / POINTS_FILE
    lines = points.read_text().splitlines()
    points.write_text("\n".join(lines[:-2]) + '\n{"key": "cut')  # an interrupted call
    (out / "plan.json").write_text((out / "plan.json").read_text().replace('"done"', '"unfinished"'))
    assert make_serving_plan(plan, out)["ranking"] == ranking
    assert len(points.read_text().splitlines()) == len(lines)
    with pytest.raises(UserError, match="holds another plan"):
        make_serving_plan(load_any_plan(file, ["seed=1"]), out)
    front = [content["loads"][place] for place in content["front"]]
    page = serving_plot([out])
    assert page is not None and all(f"{load['tokens_per_second_per_user']:,.1f}" in page for load in front)
    with pytest.raises(UserError, match=r"did you mean 'ttft_s\.p90'"):
        serving_plot([out], x="ttft.p90")
    with pytest.raises(UserError, match="not of serving"):
        serving_plot([out, tmp_path])
    print_serving_plan({"name": "small", **content}, width=120)
    assert "not by how well it answers" in capsys.readouterr().out
    assert "made for this test" in serving_plan_page({"name": "small", **content})


def test_what_is_too_large_for_the_offers_has_a_remedy_and_gives_way_to_another_plan(file, tmp_path) -> None:
    for size in (64, 128):
        with pytest.raises(InfeasibleError, match=r"more GPUs than offered .*offer more or other GPUs"):
            make_serving_plan(load_any_plan(file, [f"choices.data=[{size}]"]), tmp_path / "out")
    assert '"failed"' in (tmp_path / "out" / "plan.json").read_text()


def test_few_requests_ask_for_as_many_gpus_as_many(file, tmp_path) -> None:
    """Requests that have all come before a queue forms would need one GPU for any load."""
    sets = [
        "choices={data: [1]}",
        "workload.arrivals.rate=3000.0",
        "workload.slo={ttft: 0.05}",
        "goal.gpus.0.at_most=32",
    ]
    few, many = (
        make_serving_plan(load_any_plan(file, [*sets, f"workload.requests={number}"]), tmp_path / f"{number}")
        for number in (10, 800)
    )
    assert few["ranking"][0]["gpus"] == many["ranking"][0]["gpus"] > 1
    assert few["requests"] > 10 and few["ranking"][0]["warnings"] == []


def test_a_scenario_is_no_plan(file) -> None:
    with pytest.raises(UserError, match=r"serving without goal.serve.*moesim serve"):
        load_any_plan(file, ["goal={tokens_per_second: 1.0, gpus: []}"])


def test_a_trace_that_changed_makes_it_another_plan(file, tmp_path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("time,input,output\n0,100,5\n1,100,5\n")
    plan = load_any_plan(file, [f"workload.arrivals={{kind: trace, file: {log}}}"])
    before = plan_digest(plan)
    assert before == plan_digest(plan) != plan_digest(load_any_plan(file))
    log.write_text("time,input,output\n0,100,5\n1,100,6\n")
    assert plan_digest(plan) != before


def test_what_nothing_meets_names_the_nearest(file, tmp_path) -> None:
    plan = load_any_plan(file, ["workload.slo.tpot=0.00001", "choices.data=[2]"])
    with pytest.raises(InfeasibleError, match="nearest: h100: ep2 dp2"):
        make_serving_plan(plan, tmp_path / "out")


def test_units_are_the_combinations_and_those_of_the_alternative(file) -> None:
    plan = load_any_plan(file)
    units = units_of(plan)
    assert len(units) == 8 and sum(unit.is_alternative for unit in units) == 4
    pair = next(unit for unit in units if unit.prefill_to_decode == "1:1" and unit.data == 2)
    assert pair.gpus == 4 and scenario_of(plan, pair, units=2).cluster.num_gpus == 8


def test_the_front_is_what_nothing_beats_in_both() -> None:
    pairs = ((3.0, 1.0), (1.0, 3.0), (2.0, 0.5), (2.0, 2.0))
    loads = [
        {"tokens_per_second_per_user": x, "output_tokens_per_second_per_gpu": y, "is_alternative": False}
        for x, y in pairs
    ]
    assert pareto(loads) == [0, 3, 1]


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("choices.dat=[1]", 'did you mean "data"'),
        ("goal.gpus.0.gpu=h900", "unknown GPU"),
        ("choices.prefill_to_decode=[3-1]", "prefill_to_decode"),
        ("choices.prefill_to_decode=['0:1']", "does not have the form (none|"),
        ("workload.slo={}", "a plan needs a limit"),
        ("compute.host_factor=2", "compute.host_factor: changes no step of serving"),
    ],
)
def test_mistakes_are_named(file, override: str, what: str) -> None:
    with pytest.raises(UserError) as error:
        load_any_plan(file, [override])
    assert what in str(error.value) and "\n" not in str(error.value)


def test_answers_of_one_token_have_a_page_without_tokens_per_second_of_a_user(file, tmp_path) -> None:
    plan = load_any_plan(file, ["workload.arrivals.output.tokens=1", "choices.data=[1]", "workload.slo={ttft: 0.2}"])
    content = make_serving_plan(plan, tmp_path / "out")
    assert {load["tokens_per_second_per_user"] for load in content["loads"]} == {None} and content["front"] == []
    assert "small" in serving_plan_page({"name": plan.name, **content}) and serving_plot([tmp_path / "out"]) is not None


def test_units_that_meet_the_limits_as_shares_alone_are_no_answer(file, tmp_path, monkeypatch) -> None:
    as_fleet = serving_planning._as_fleet
    monkeypatch.setattr(
        serving_planning, "_as_fleet", lambda plan, each, points: replace(as_fleet(plan, each, points), units=None)
    )
    plan = load_any_plan(file, ["choices={data: [2]}"])
    with pytest.raises(InfeasibleError, match="none of"):
        make_serving_plan(plan, tmp_path / "out")


def test_the_scenario_of_a_row_rents_the_gpus_that_the_row_is_priced_by(tmp_path) -> None:
    """Whole instances on equal nodes, none of them idle: 10 GPUs are two nodes of five, not two of eight."""
    path = tmp_path / "more.yaml"
    path.write_text(TEXT.replace("at_most: 8", "at_most: 40").replace("data: [1, 2]", "data: [1, 4], tensor: [1, 2]"))
    plan = load_any_plan(path)
    assert isinstance(plan, ServingPlan)
    seen = set()
    for unit in units_of(plan):
        for units in (1, 3, 5):
            cluster, gpus = scenario_of(plan, unit, units=units).cluster, unit.gpus * units
            (pool,) = cluster.pools
            assert pool.nodes * pool.gpus_per_node == gpus and pool.gpus_per_node <= 8
            assert pool.gpus_per_node % (unit.data * unit.tensor) == 0
            seen.add((gpus, pool.nodes))
    assert {(10, 2), (24, 3), (12, 3)} <= seen
