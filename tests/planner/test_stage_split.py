"""Layers go into stages so that ranks take equally long; everything that reads a scenario sees the same split."""

import itertools
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.network.parameters import NetworkParameters
from moesim.parallel.memory.report import memory_report
from moesim.parallel.memory.rows import even_rows
from moesim.planner.layer_times import LayerTimes
from moesim.planner.screen import Screen
from moesim.planner.search import Traces
from moesim.report import facts
from moesim.report.run_view import print_facts
from moesim.results.critical_path import UNEVEN, stage_warnings
from moesim.run import obtain_trace, simulate
from moesim.scenario import Scenario, dump_scenario, load_scenario, load_scenario_text
from moesim.scenario.part_seconds import part_seconds
from moesim.scenario.schema import Recomputable
from moesim.scenario.stages import ALIKE, ModelEnds, even_lengths, stage_lengths, stages_of_ranks
from moesim.schedules import build_schedule
from moesim.whatif import LABELS, what_if

pytestmark = pytest.mark.usefixtures("few_tokens")

SCENARIOS = Path(__file__).parent.parent.parent / "scenarios"
STRAIGHT, DUALPIPE, INTERLEAVED = (0, 1, 2, 3), (0, 1, 1, 0), (0, 1, 0, 1)
SCHEDULES = [
    {"kind": "gpipe"},
    {"kind": "1f1b"},
    {"kind": "zb_h1"},
    {"kind": "interleaved", "virtual": 2},
    {"kind": "dualpipe"},
]


def even_count(layers: int, stages: int) -> tuple[int, ...]:
    return tuple(layers // stages + (stage < layers % stages) for stage in range(stages))


@given(
    layers=st.integers(4, 12),
    ranks=st.sampled_from([STRAIGHT, DUALPIPE, INTERLEAVED]),
    num_short=st.integers(0, 3),
    short=st.floats(0.2, 1.5),
    first=st.floats(0.0, 0.3),
    last=st.floats(0.0, 4.0),
)
@settings(max_examples=100)
def test_no_other_split_is_much_shorter(layers, ranks, num_short, short, first, last) -> None:
    """All splits tried: of equal layers, with a stage a rank, none is shorter; else it may miss half a layer."""
    ends = ModelEnds(layers=layers, rank_of_stage=ranks, num_short=num_short, short=short, first=first, last=last)
    found = even_lengths(ends)
    assert sum(found) == layers
    every = (split for split in itertools.product(range(layers + 1), repeat=4) if sum(split) == layers)
    margin = 2 * ALIKE if ranks == STRAIGHT and num_short == 0 else 0.5
    assert ends.slowest(found) <= min(map(ends.slowest, every)) + margin
    assert ends.slowest(found) <= ends.slowest(even_count(layers, 4)) + ALIKE


def test_equal_layers_without_ends_are_counted_out_the_first_stages_longer() -> None:
    assert even_lengths(ModelEnds(layers=27, rank_of_stage=STRAIGHT)) == (7, 7, 7, 6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["kind"])
def test_ranks_hold_the_stages_that_the_schedule_gives_them(small, schedule) -> None:
    mesh = small({"model.layers": 8, "parallelism": {"data": 1, "pipeline": 4, "schedule": schedule}}).parallelism
    built = build_schedule(schedule["kind"], num_ranks=4, num_micro_batches=8, virtual=mesh.schedule.virtual)
    assert stages_of_ranks(mesh) == built.stages_of_rank


@pytest.mark.parametrize(
    ("name", "software"),
    [
        ("deepseek-v3-2048xh800", "fused"),
        ("mixtral-8x22b-128xh100", "fused"),
        ("mixtral-8x22b-tp-folding", "megatron_local"),
        ("qwen3-235b-256xh100", "megatron"),
        ("qwen3-235b-256xh100", "torchtitan"),
    ],
)
def test_the_estimate_is_near_the_simulated_parts(name, software) -> None:
    """Ratios to a layer with experts, against the parts run by the executor: within 15 %, by software."""
    scenario = load_scenario(SCENARIOS / f"{name}.yaml", [f"implementation={software}"])
    cut = LayerTimes(Traces(None).of).of(scenario, NetworkParameters())
    parts, model = part_seconds(scenario), scenario.model

    def simulated(part) -> float:
        if scenario.parallelism.schedule.kind == "dualpipe":
            return part.pair
        return part.forward + (part.backward or part.gradient_of_input + part.gradient_of_weights)

    layer = simulated(cut.moe_layer)
    last = parts.head + model.mtp_layers * parts.prediction
    assert last / parts.moe_layer == pytest.approx(simulated(cut.head) / layer, rel=0.15)
    if model.dense_layers:
        assert parts.dense_layer / parts.moe_layer == pytest.approx(simulated(cut.dense_layer) / layer, rel=0.15)
    assert parts.embedding < 0.05 * parts.moe_layer


def test_what_a_part_costs_again_is_near_the_simulated_cost() -> None:
    """Within 30 % of it, at one clock; nothing in layers without the part, and of no other part than the named."""

    def seconds(recompute: str) -> tuple[float, ...]:
        given = [f"workload.recompute={recompute}", "compute.regime=sustained"]
        scenario = load_scenario(SCENARIOS / "deepseek-v2-h800.yaml", given)
        cut, parts = LayerTimes(Traces(None).of).of(scenario, NetworkParameters()), part_seconds(scenario)
        simulated = (
            one.forward + one.gradient_of_input + one.gradient_of_weights for one in (cut.dense_layer, cut.moe_layer)
        )
        return parts.dense_layer, parts.moe_layer, *simulated

    plain = seconds("none")
    for part in get_args(Recomputable):
        again = [after / before - 1 for before, after in zip(plain, seconds(f"[{part}]"), strict=True)]
        assert again[:2] == pytest.approx(again[2:], rel=0.3), part
        assert [share > 0 for share in again[:2]] == [part not in ("moe", "shared_experts"), part != "dense_ffn"]


LARGE_HEAD = {  # a head of about two layers, and a prediction layer with another
    "model.layers": 13,
    "model.vocab": 20_000,
    "model.mtp_layers": 1,
    "cluster": {"gpu": "h200", "nodes": 2, "gpus_per_node": 8},
    "parallelism": {"data": 4, "expert": 4, "pipeline": 4},
    "workload": {"sequence_length": 4096, "micro_batch": 1, "global_batch": 32},
    "routing": {"kind": "uniform"},
    "uncertainty": {"samples": 1},
}


def with_schedule(build, schedule: dict, **changes: object) -> Scenario:
    mesh = LARGE_HEAD["parallelism"] | {"schedule": schedule}
    layers = {"model.layers": 25} if schedule["kind"] == "interleaved" else {}
    return build(LARGE_HEAD | {"parallelism": mesh} | layers | changes)


@cache
def result_of(scenario_text: str) -> dict[str, Any]:
    """The result of a scenario, which several laws look at."""
    return simulate(load_scenario_text(scenario_text)).result


def simulated(scenario: Scenario) -> dict[str, Any]:
    return result_of(dump_scenario(scenario))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["kind"])
def test_a_balanced_pipeline_is_faster_than_one_of_equal_counts(small, schedule) -> None:
    scenario = with_schedule(small, schedule)
    counted = even_count(scenario.model.layers, scenario.parallelism.num_stages)
    listed = scenario.model_copy(update={"parallelism": scenario.parallelism.model_copy(update={"stages": counted})})
    balanced, even = simulated(scenario), simulated(listed)
    assert balanced["step_time_s"] < 0.95 * even["step_time_s"]
    assert balanced["stages"]["slowest_over_mean"] < even["stages"]["slowest_over_mean"]
    assert any("leave parallelism.stages out" in warning for warning in even["warnings"])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["kind"])
def test_screen_memory_and_simulation_see_one_split(small, schedule) -> None:
    """As if it had been listed; one screen for variants whose splits differ does not mix them up."""
    screen = Screen(obtain_trace)
    for changes in ({}, {"workload.recompute": "full"}):
        scenario = with_schedule(small, schedule, **changes)
        listed = scenario.with_stages_listed()
        assert listed.parallelism.stages == tuple(len(layers) for layers in scenario.stage_layers)
        assert screen.step_seconds(scenario) == Screen(obtain_trace).step_seconds(listed)
        assert screen.memory(scenario) == Screen(obtain_trace).memory(listed)
        reports = [memory_report(one, even_rows(one)).as_json() for one in (scenario, listed)]
        assert reports[0] == reports[1]
    scenario = with_schedule(small, schedule)
    assert simulated(scenario)["step_time_s"] == simulated(scenario.with_stages_listed())["step_time_s"]


def test_the_result_says_what_each_rank_takes(small) -> None:
    """Without p2p sends to wait for, the ranks' micro-batches are the passes of the step."""
    scenario = with_schedule(small, {"kind": "1f1b"})
    result = simulated(scenario)
    found = result["stages"]
    assert [rank["stages"] for rank in found["pipeline_ranks"]] == [[0], [1], [2], [3]]
    assert [rank["layers"] for rank in found["pipeline_ranks"]] == [[n] for n in stage_lengths(scenario)]
    seconds = [rank["seconds_per_micro_batch"] for rank in found["pipeline_ranks"]]
    assert found["slowest_over_mean"] == pytest.approx(max(seconds) * 4 / sum(seconds))
    step_s, batches = result["step_time_s"], scenario.num_micro_batches
    assert batches * max(seconds) < step_s, "a rank does one thing after the other"
    (fact,), rows = facts.stages(result)
    assert fact.value == facts.seconds(max(seconds))
    ends = [[int(end) for end in ranks.split(" to ")] for ranks, _, _ in rows]
    assert sum(last[-1] - last[0] + 1 for last in ends) == 4


def test_the_screen_shows_them(small, capsys) -> None:
    print_facts(simulated(with_schedule(small, {"kind": "dualpipe"})), width=100)
    shown = capsys.readouterr().out
    assert "ms per micro-batch" in shown
    assert "the slowest;" in shown


def test_without_a_pipeline_there_is_nothing_to_show(small) -> None:
    result = simulate(small()).result
    assert result["stages"]["slowest_over_mean"] == 1.0
    assert facts.stages(result) == ([], [])


def test_a_run_warns_above_five_per_cent() -> None:
    def found(ratio: float) -> dict:
        ranks = [{"seconds_per_micro_batch": 0.02}, {"seconds_per_micro_batch": 0.02 * ratio}]
        return {"slowest_over_mean": ratio, "pipeline_ranks": ranks}

    assert stage_warnings(found(0.999 + UNEVEN), listed=False) == []
    (warning,) = stage_warnings(found(1.1), listed=False)
    assert "pipeline rank 1 takes 22 ms for a micro-batch, 10.0% more than the mean" in warning
    assert "parallelism.stages" in warning


def test_a_what_if_moves_no_layer(small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without overlap layers with experts take longer, so that a split of its own would differ."""
    asked = ("no_overlap", "double_bandwidth")
    monkeypatch.setattr("moesim.whatif.LABELS", {name: LABELS[name] for name in asked})
    scenario = with_schedule(small, {"kind": "dualpipe"}, **{"cluster.gpus_per_node": 1, "cluster.nodes": 16})
    record = simulate(scenario)
    nothing = {"shared_experts": False, "micro_batches": False, "gradient_reduction": False}
    changed = scenario.with_stages_listed().model_copy(
        update={"overlap": type(scenario.overlap).model_validate(nothing)}
    )
    assert stage_lengths(changed) == stage_lengths(scenario)
    found = {entry["name"]: entry["step_time_s"] for entry in what_if(record).result["what_if"]}
    assert found["no_overlap"] == pytest.approx(simulate(changed).result["step_time_s"], rel=1e-12)
    faster = scenario.with_stages_listed().with_bandwidth(2.0)
    assert found["double_bandwidth"] == pytest.approx(simulate(faster).result["step_time_s"], rel=1e-12)


@pytest.mark.slow
def test_deepseek_v3_keeps_all_of_its_ranks_busy() -> None:
    """Ends and prediction layer with its second head on one rank; equal counts left it 26 % behind the others."""
    result = simulate(load_scenario(SCENARIOS / "deepseek-v3-2048xh800.yaml")).result
    assert result["stages"]["slowest_over_mean"] < 1.03
    assert not any("pipeline rank" in warning for warning in result["warnings"])
