"""The JSON Schema of scenario files, for editors: that of the sections plus the short forms that files may use."""

from typing import Any

from moesim.scenario.catalogue import gpu_names, model_names
from moesim.scenario.overrides import FLAT_CLUSTER_KEYS
from moesim.scenario.schema import Scenario
from moesim.scenario.software import SOFTWARE

_GPU_FORMS = ["gpu", "nodes"]


def json_schema(*, units: bool = False) -> dict[str, Any]:
    """JSON Schema (2020-12) that accepts every form that `load_scenario` accepts at the level of single sections.

    Beyond the sections themselves: `model` by preset or hf_config with any field overridden, and the flat `cluster`.
    `units`: with the key `unit` where a plain number has one, which is not of the standard.
    """
    schema = Scenario.model_json_schema(mode="validation")
    accept_model_forms(schema["$defs"]["Model"])
    accept_named_implementation(schema)
    accept_cluster_forms(schema["$defs"])
    return finished_schema(schema, title="moesim scenario", units=units)


def finished_schema(schema: dict[str, Any], *, title: str, units: bool) -> dict[str, Any]:
    """With its head; without the key `unit`, which is not of the standard, unless `units`."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return {**head, **(schema if units else _without_units(schema)), "title": title}


def accept_cluster_forms(definitions: dict[str, Any]) -> None:
    """Let GPUs be names of the catalogue, and a cluster be its one pool written flat."""
    pool_gpu = definitions["Pool"]["properties"]["gpu"]
    forms = pool_gpu.pop("oneOf", None) or pool_gpu.pop("anyOf")
    pool_gpu["anyOf"] = [{"enum": list(gpu_names())}, *(form for form in forms if "$ref" in form)]
    definitions["OwnGpu"]["properties"]["like"]["enum"] = list(gpu_names())
    _accept_flat_cluster(definitions["Cluster"], definitions["Pool"])


def accept_model_forms(model: dict[str, Any]) -> None:
    """Let a model of the schema be a preset, a config.json or its fields; fields override the first two."""
    explicit = [key for key in model["required"] if key != "preset"]
    model["properties"]["preset"] = {"enum": [*model_names(), None], "description": "a model of the catalogue"}
    path = "path to a released config.json, relative to this file"
    model["properties"]["hf_config"] = {"type": "string", "description": path}
    del model["required"]
    model["anyOf"] = [{"required": ["preset"]}, {"required": ["hf_config"]}, {"required": explicit}]


def accept_named_implementation(schema: dict[str, Any]) -> None:
    """Let the implementation be a name of the table instead of a mapping."""
    named = {"enum": list(SOFTWARE), "type": "string"}
    section = schema["properties"]["implementation"]
    form = {"$ref": section.pop("$ref")} if "$ref" in section else {"anyOf": section.pop("anyOf")}
    section["anyOf"] = [named, form]


def _accept_flat_cluster(cluster: dict[str, Any], pool: dict[str, Any]) -> None:
    for key in FLAT_CLUSTER_KEYS:
        cluster["properties"][key] = pool["properties"][key]
    del cluster["required"]
    cluster["anyOf"] = [{"required": ["pools"]}, {"required": _GPU_FORMS}]


def _without_units(schema: Any) -> Any:
    if isinstance(schema, dict):
        is_unit = isinstance(schema.get("unit"), str)
        return {key: _without_units(value) for key, value in schema.items() if not (is_unit and key == "unit")}
    return [_without_units(item) for item in schema] if isinstance(schema, list) else schema
