"""A run says what its routing rests on, every model what it gets by default; another group limit is told."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.planner.plan import plan_from_mapping
from moesim.report import facts
from moesim.run import obtain_trace, simulate
from moesim.scenario import RouterShape, Scenario, dump_scenario, load_scenario_text, model_names, scenario_from_mapping
from moesim.scenario.catalogue import model_preset
from moesim.scenario.routers import STRESS
from moesim.trace import TrainingCurves, load_trace, save_trace, uniform_trace
from moesim.trace.library import find_entry
from moesim.trace.provenance import limit_difference, rests_on

pytestmark = pytest.mark.usefixtures("few_tokens")
BASE = {
    "name": "based",
    "model": {"preset": "deepseek-moe-16b"},
    "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 8},
    "parallelism": {"data": 8, "expert": 8},
    "workload": {"sequence_length": 1024, "global_batch": 8},
    "uncertainty": {"samples": 1},
}
MOE = [name for name in model_names() if model_preset(name).get("experts")]


def make(*overrides: str, **sections: object) -> Scenario:
    return scenario_from_mapping(BASE | sections, overrides)


def basis(scenario: Scenario) -> dict[str, object]:
    return rests_on(obtain_trace(scenario), scenario)


def counts(*, source: str | None = None) -> dict[str, object]:
    return {"kind": "popularity", "counts": [1.0] * 64} | ({"source": source} if source else {})


@pytest.mark.parametrize("name", MOE)
def test_every_model_states_a_default_that_fits_it(name: str) -> None:
    fields = model_preset(name)
    assert "routing" in fields, "one line of catalogue/models.yaml: a router of the library, or uniform"
    if fields["routing"] == "uniform":
        return
    router = find_entry(fields["routing"]).provenance["request"]["router"]
    assert (router["num_experts"], router["top_k"]) == (fields["experts"], fields["top_k"])
    limit = (fields.get("router_groups", 1), fields.get("router_group_limit", 1))
    binding = router["group_limit"] < router["num_groups"]
    assert ((router["num_groups"], router["group_limit"]) if binding else (1, 1)) == limit


@pytest.mark.parametrize("name", [name for name in model_names() if name not in MOE])
def test_dense_models_state_none(name: str) -> None:
    assert "routing" not in model_preset(name)


def test_a_scenario_without_routing_gets_the_models_and_says_so() -> None:
    scenario = make()
    assert scenario.routing.file == model_preset("deepseek-moe-16b")["routing"]
    found = basis(scenario)
    assert found["model_default"]
    assert found["rests_on"] == scenario.routing.file
    assert load_scenario_text(dump_scenario(scenario)) == scenario


def test_without_a_default_it_is_uniform_and_says_what_that_is_worth() -> None:
    for scenario in (make(model={"preset": "gshard-137b"}), make("model.experts=32")):  # a router of other experts
        assert scenario.routing.kind == "uniform"
        assert "lower bound of imbalance" in basis(scenario)["rests_on_how"]
    assert basis(make("model.experts=32"))["model_default"]
    assert not basis(make(routing={"kind": "uniform"}))["model_default"]  # of this model the library's is


def test_a_dense_model_has_neither() -> None:
    result = simulate(make("memory.check=warn", model={"preset": "llama2-7b"}, parallelism={"data": 8})).result
    assert facts.routing(result) == []


def test_a_plan_without_routing_gets_the_models_too() -> None:
    goal = {"tokens": 1e9, "gpus": [{"gpu": "h200", "at_most": 8, "usd_per_gpu_hour": 1.0, "source": "a test"}]}
    workload = {"sequence_length": 1024, "global_batch": 8}
    choices = {"gpus": [8], "pipeline": [1], "expert": [8]}
    sections = {"model": BASE["model"], "goal": goal, "workload": workload, "choices": choices}
    plan = plan_from_mapping({"name": "p", **sections})
    assert plan.routing == make().routing


def test_only_the_library_or_uniform_is_a_default() -> None:
    with pytest.raises(UserError, match=r"model\.routing"):
        make('model.routing="popularity"')


def test_whose_counts_they_are_is_repeated_or_missed() -> None:
    assert "of OLMoE on C4" in basis(make(routing=counts(source="OLMoE on C4")))["rests_on_how"]
    assert "routing.source" in basis(make(routing=counts()))["rests_on_how"]


@pytest.mark.parametrize("pattern", STRESS)
def test_stated_routing_is_called_synthetic(pattern: str) -> None:
    for routing in ({"kind": "stress", "pattern": pattern}, {"kind": "balancedness", "value": 0.5}):
        found = basis(make(routing=routing))
        assert "synthetic" in found["rests_on_how"]
        assert pattern in found["rests_on"] or "0.5" in found["rests_on"]


def test_a_file_says_the_same_as_what_made_it(tmp_path) -> None:
    made = make(routing=counts(source="somebody"))
    trace = obtain_trace(made)
    save_trace(trace, tmp_path / "mine.npz")
    again = make(routing={"kind": "trace", "file": str(tmp_path / "mine.npz")})
    found = rests_on(load_trace(tmp_path / "mine.npz"), again)
    assert found["rests_on"] == "mine.npz"
    assert found["rests_on_how"] == basis(made)["rests_on_how"]
    unknown = rests_on(replace(trace, provenance={}), again)
    assert "nothing is known" in unknown["rests_on_how"]


def test_a_library_router_is_named_with_its_text_and_loss() -> None:
    scenario = make(routing={"kind": "trace", "file": "library:64x6/M2"})
    trace, entry = obtain_trace(scenario), find_entry("64x6/M2")
    found = rests_on(trace, scenario)
    assert found["rests_on"] == "library:64x6/M2"
    assert entry.provenance["request"]["corpus"] in found["rests_on_how"]
    assert f"{entry.held_out_loss:.4f}" in found["rests_on_how"]
    silent = rests_on(replace(trace, curves=TrainingCurves(steps=np.zeros(0))), scenario)
    assert "loss" not in silent["rests_on_how"]


def test_the_facts_of_a_result_name_it() -> None:
    result = simulate(make("workload.global_batch=64")).result
    assert any("use a trace of more tokens" in warning for warning in result["warnings"])  # no key records more of it
    named = facts.routing(result)
    assert named[0].value == result["router"]["rests_on"] == "library:64x6/M-unlimited"
    assert named[1].value == "the model's default"


def scenario_of(small: Any, tmp_path: Any, router: dict[str, Any] | None = None) -> Scenario:
    (tmp_path / "t.npz").write_bytes(b"")
    routing = {"kind": "trace", "file": str(tmp_path / "t.npz")} | ({"router": router} if router else {})
    scenario: Scenario = small({"routing": routing, "model.router_groups": 4, "model.router_group_limit": 2})
    return scenario


@pytest.mark.parametrize(
    ("groups", "limit", "told"), [(4, 2, None), (4, 1, "at most 1 of 4 groups"), (1, 1, "no group limit")]
)
def test_another_limit_than_the_models_is_told(small, tmp_path, groups: int, limit: int, told: str | None) -> None:
    router = RouterShape(kind="deepseek_v2", num_experts=16, top_k=4, num_groups=groups, group_limit=limit)
    trace = uniform_trace(router, num_layers=1, num_sequences=2, sequence_length=8, seed=0)
    found = limit_difference(trace, scenario_of(small, tmp_path))
    assert len(found) == (told is not None)
    assert all(told in text and "the model's own at most 2 of 4" in text for text in found)
    asked = {"kind": "deepseek_v2", "groups": 4, "group_limit": 1}
    assert limit_difference(trace, scenario_of(small, tmp_path, asked)) == []
    assert limit_difference(trace, small()) == []
