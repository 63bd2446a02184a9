"""Scenario files: what ships loads and is dumped again; whatever stands in one gives a scenario or one located line."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import changed, paths_of, without

from moesim.errors import UserError
from moesim.scenario import (
    dump_scenario,
    json_schema,
    load_scenario,
    load_scenario_text,
    model_names,
    require_supported,
    scenario_from_mapping,
)
from moesim.scenario.document import parse_yaml

FOLDER = Path(__file__).parents[2] / "scenarios"
FILES = sorted(FOLDER.glob("*.yaml"))
SCHEMA = json_schema()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_shipped_scenario_loads_is_named_after_its_file_and_round_trips(path):
    scenario = load_scenario(path)
    assert scenario.name == path.stem
    assert load_scenario_text(dump_scenario(scenario)) == scenario
    assert path.read_text(encoding="utf-8").startswith("# yaml-language-server: $schema=schema.json\n")


@pytest.mark.parametrize("name", model_names())
def test_a_scenario_of_every_preset_round_trips(name):
    routing = {} if name in ("deepseek-7b", "deepseek-67b", "llama2-7b") else {"routing": {"kind": "uniform"}}
    workload = {"sequence_length": 4096, "global_batch": 1}
    data = {"name": name, "model": {"preset": name}, "cluster": {"gpu": "h100", "nodes": 1}, "workload": workload}
    scenario = scenario_from_mapping(data | routing)
    require_supported(scenario)
    assert load_scenario_text(dump_scenario(scenario)) == scenario


def test_null_over_a_preset_survives_the_round_trip():
    scenario = load_scenario(FOLDER / "two-nodes-hierarchical.yaml", ["model.preset=deepseek-v2"])
    changed = load_scenario_text(dump_scenario(scenario), overrides=["model.attention.q_lora_rank=null"])
    assert load_scenario_text(dump_scenario(changed)) == changed


@settings(max_examples=15)
@given(
    bandwidth=st.floats(min_value=1e3, max_value=1e18),
    latency=st.floats(min_value=0, max_value=1),
    tokens=st.floats(min_value=1, max_value=1e18),
    ratio=st.floats(min_value=1e-3, max_value=1e3),
    name=st.from_regex(r"[A-Za-z0-9._-]+", fullmatch=True),
)
def test_quantities_and_texts_round_trip_to_the_bit(bandwidth, latency, tokens, ratio, name):
    link = {"source": name, "target": "~", "bandwidth": f"{bandwidth!r} B/s", "latency": f"{latency!r} s"}
    fabric = {"preset": "custom", "nic": f"{bandwidth!r} B/s", "links": [link], "oversubscription": {"leaf": ratio}}
    data = {
        "name": name,
        "model": {"preset": "llama2-7b"},
        "cluster": {"gpu": "h100", "nodes": 1, "fabric": fabric},
        "workload": {"sequence_length": 8, "global_batch": 1, "train_tokens": tokens},
    }
    scenario = scenario_from_mapping(data)
    again = load_scenario_text(dump_scenario(scenario))
    assert again == scenario
    assert again.cluster.fabric.nic == bandwidth
    assert again.cluster.fabric.links[0].latency == latency


def test_the_checked_in_schema_is_current():
    stored = json.loads((FOLDER / "schema.json").read_text(encoding="utf-8"))
    assert stored == SCHEMA, "write it again with: moesim schema --out scenarios/schema.json"


def conforms(value, schema, root):
    """Whether `value` satisfies the part of JSON Schema that ours uses."""
    if "$ref" in schema:
        return conforms(value, root["$defs"][schema["$ref"].rsplit("/", 1)[1]], root)
    for word, combine in (("anyOf", any), ("oneOf", lambda hits: sum(hits) == 1), ("allOf", all)):
        if word in schema and not combine([conforms(value, part, root) for part in schema[word]]):
            return False
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        return False
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    kinds["null"] = type(None)
    if "type" in schema and not isinstance(value, kinds[schema["type"]]):
        return False
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        known = all(key in properties for key in value) or schema.get("additionalProperties") is not False
        present = all(key in value for key in schema.get("required", []))
        return (
            known and present and all(conforms(value[key], properties[key], root) for key in value if key in properties)
        )
    return not isinstance(value, list) or all(conforms(item, schema.get("items", {}), root) for item in value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_editors_accept_every_shipped_scenario_in_both_forms(path):
    schema = SCHEMA
    written = parse_yaml(path.read_text(encoding="utf-8"), source=path.name).plain
    resolved = parse_yaml(dump_scenario(load_scenario(path)), source=path.name).plain
    assert conforms(written, schema, schema)
    assert conforms(resolved, schema, schema)


@pytest.mark.parametrize(
    "change",
    [
        {"cluster": {"gpu": "h999", "nodes": 1}},
        {"cluster": {"gpu": "h100"}},
        {"model": {"layers": 3}},
        {"model": {"preset": "gpt"}},
        {"routing": {"kind": "guess"}},
        {"unknown": 1},
        {"name": 3},
    ],
)
def test_editors_flag_what_the_loader_refuses(change):
    schema = SCHEMA
    written = parse_yaml((FOLDER / "quickstart.yaml").read_text(encoding="utf-8"), source="q").plain
    assert conforms(written, schema, schema)
    assert not conforms(written | change, schema, schema)


def test_the_step_is_counted_in_micro_batches_and_tokens():
    scenario = load_scenario(FOLDER / "quickstart.yaml", ["workload.micro_batch=2"])
    assert scenario.num_micro_batches * scenario.parallelism.data * 2 == scenario.workload.global_batch
    assert scenario.tokens_per_micro_batch == 2 * 4096
    assert scenario.tokens_per_step == 64 * 4096
    assert scenario.idle_gpus == 0


GOOD = parse_yaml((FOLDER / "quickstart.yaml").read_text(encoding="utf-8"), source="good").plain
RESOLVED = parse_yaml(dump_scenario(load_scenario(FOLDER / "two-nodes-hierarchical.yaml")), source="good").plain


strange = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(
        ["uniform", "expert", "mla", "1e3", "h100", "3 GB", "custom", [], {}, [1], {"kind": "x"}, [[]], {"a": 1}]
    ),
    st.sampled_from([{"kind": []}, {"kind": None}, {"kind": 3}, {"kind": {}}, {"": 0}, [None], [{}]]),
)


@pytest.mark.parametrize("good", [GOOD, RESOLVED], ids=["short form", "resolved"])
@settings(max_examples=60)
@given(data=st.data())
def test_a_scenario_with_anything_anywhere_loads_or_is_refused_in_one_line(good, data):
    broken = good
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(sorted(paths_of(broken), key=str)))
        broken = (
            without(broken, path) if data.draw(st.integers(0, 5)) == 0 else changed(broken, path, data.draw(strange))
        )
    try:
        scenario = scenario_from_mapping(broken)
    except UserError as error:
        assert str(error).startswith("scenario")
        assert "\n" not in str(error)
    else:
        assert load_scenario_text(dump_scenario(scenario)) == scenario


@settings(max_examples=40)
@given(data=st.data())
def test_any_override_is_applied_or_refused_by_name(data):
    path = data.draw(st.sampled_from(sorted(paths_of(GOOD), key=str)))
    tail = data.draw(st.sampled_from(["", ".x", ".0", ".kind"]))
    text = data.draw(
        st.sampled_from(["1", "0", "-1", "1e3", "null", "[]", "{}", "{kind: x}", "uniform", "x", "[1, 2]", "true"])
    )
    override = ".".join(map(str, path)) + tail + "=" + text
    try:
        scenario = load_scenario(FOLDER / "quickstart.yaml", [override])
    except UserError as error:
        assert "\n" not in str(error)
        assert str(error).startswith(("--set ", str(FOLDER)))
    else:
        assert load_scenario_text(dump_scenario(scenario)) == scenario
