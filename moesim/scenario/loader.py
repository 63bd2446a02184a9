"""From a scenario file to a Scenario: parse, override, rewrite the short forms, validate, check; and back to YAML.

Behind it the JSON Schema of scenario files, for editors: that of the sections plus the short forms of files.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import yaml

from moesim.errors import UserError
from moesim.scenario.catalogue import gpu_names, model_names
from moesim.scenario.check import check_scenario
from moesim.scenario.document import Node, Path, find, parse_yaml, plain_scalar, read_yaml
from moesim.scenario.messages import validated
from moesim.scenario.schema import Scenario
from moesim.scenario.short_forms import (
    FLAT_CLUSTER_KEYS,
    absolute_paths,
    apply_overrides,
    default_routing,
    explicit_model,
    flat_cluster_to_pools,
    named_implementation,
)
from moesim.scenario.software import SOFTWARE

_LABEL = "scenario"


def load_scenario(path: str | FilePath, overrides: Sequence[str] = ()) -> Scenario:
    """The scenario in the file `path` with `a.b=c` overrides applied; `model` is explicit, `cluster.pools` filled.

    Raises UserError, one line with `file:line:column` or `--set a.b=c`, and InfeasibleError for a scenario that does
    not fit on its cluster.
    """
    path = FilePath(path)
    root = read_yaml(path, what="scenario")
    if root.value is None:
        raise UserError(f"{path}: the file is empty; a scenario needs name, model, routing, cluster and workload")
    return _build(root, overrides, base=path.parent)


def scenario_from_mapping(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Scenario:
    """A scenario from nested dicts in any form that a file may have; paths are relative to the working directory."""
    return _build(_node_of(data), overrides, base=FilePath())


def dump_scenario(scenario: Scenario) -> str:
    """YAML text that loads back to an equal scenario: every key is written, quantities exact to the bit.

    >>> scenario = load_scenario("scenarios/quickstart.yaml")
    >>> load_scenario_text(dump_scenario(scenario)) == scenario
    True
    """
    data = _without_none(scenario.model_dump(mode="json"))
    data["model"] = scenario.model.model_dump(mode="json")  # null wins over a preset's value, so it is written
    return yaml_text(data)


def yaml_text(data: Mapping[str, Any]) -> str:
    """Plain data as YAML that the strict reader takes for the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def load_scenario_text(text: str, *, source: str = _LABEL, overrides: Sequence[str] = ()) -> Scenario:
    """As `load_scenario`, from YAML text; paths are relative to the working directory."""
    return _build(parse_yaml(text, source=source), overrides, base=FilePath())


def _build(root: Node, overrides: Sequence[str], *, base: FilePath) -> Scenario:
    """Every way into a Scenario ends here."""
    if not isinstance(root.value, dict):
        kind = "a list" if isinstance(root.value, list) else f"the value {root.value!r}"
        raise UserError(f"{root.where}: expected a mapping of sections, got {kind}; write name: ..., model: ...")
    node, reached = find(root, ("workload", "kind"))
    if reached == ("workload", "kind") and node.value == "serving":
        raise UserError(f"{node.where}: workload.kind: this is a serving scenario; simulate it with `moesim serve`")
    is_flat = _is_flat(root)
    root = apply_overrides(flat_cluster_to_pools(named_implementation(root)), overrides)
    is_flat = is_flat or _is_flat(root)
    root = named_implementation(flat_cluster_to_pools(root))
    root = absolute_paths(default_routing(explicit_model(root, base=base)), base=base)
    shown = _shown(is_flat)
    scenario = validated(root, Scenario, shown=shown)
    check_scenario(scenario, where=lambda path: f"{find(root, path)[0].where}: {shown(path)}")
    return scenario


def _is_flat(root: Node) -> bool:
    cluster = root.value.get("cluster")
    return cluster is not None and isinstance(cluster.value, dict) and "pools" not in cluster.value


def _shown(is_flat: bool) -> Callable[[Path], str]:
    """Dotted paths as the user's file has them: the flat form of `cluster` has no pools."""

    def shown(path: Path) -> str:
        if is_flat and path[:3] == ("cluster", "pools", 0):
            path = ("cluster", *path[3:])
        return ".".join(str(key) for key in path)

    return shown


def _node_of(value: Any) -> Node:
    if isinstance(value, Mapping):
        children = {str(key): _node_of(child) for key, child in value.items()}
        return Node(children, _LABEL, _LABEL, 1 + sum(child.size for child in children.values()))
    if isinstance(value, list | tuple):
        items = [_node_of(child) for child in value]
        return Node(items, _LABEL, _LABEL, 1 + sum(child.size for child in items))
    return Node(value, _LABEL, _LABEL)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(child) for key, child in value.items() if child is not None}
    if isinstance(value, list):
        return [_without_none(child) for child in value]
    return value


class _Dumper(yaml.SafeDumper):
    """Quotes every text that the strict reader would take for a number, a flag or nothing; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        is_plain = text.isprintable() and plain_scalar(text) == text
    except ValueError:
        is_plain = False
    style = None if is_plain else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


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
