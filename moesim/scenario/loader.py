"""From a scenario file to a Scenario: parse, override, rewrite the short forms, validate, check; and back to YAML.

Behind it the JSON Schema of scenario files, for editors: that of the sections plus the short forms of files; and what a
pydantic error is in a user's language: one line with what is wrong, where in the file, and the remedy.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moesim.errors import UserError
from moesim.scenario.base import FILE_NAME, Section
from moesim.scenario.catalogue import gpu_names, model_names, suggest
from moesim.scenario.check import check_scenario
from moesim.scenario.document import Node, Path, dotted, find, node_of, parse_yaml, plain_scalar, read_yaml
from moesim.scenario.schema import Scenario
from moesim.scenario.short_forms import (
    FLAT_CLUSTER_KEYS,
    absolute_paths,
    apply_overrides,
    default_routing,
    explicit_model,
    flat_cluster_to_pools,
    home_within,
    kinds_at,
    named_implementation,
    section_at,
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
    return _build(node_of(data, Node(None, _LABEL, _LABEL)), overrides, base=FilePath())


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


_EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "list_type": "a list",
}
_MOST_KEYS = 8  # of a section, named to the user
_NAMES = {dict: "a mapping", list: "a list", str: "text", bool: "a flag", type(None): "nothing"}


AnySection = TypeVar("AnySection", bound=Section)


def validated(
    root: Node, schema: type[AnySection], *, subject: str = "scenario", shown: Callable[[Path], str] = dotted
) -> AnySection:
    """The section that a document is, by `schema`. Raises UserError with the most useful of its mistakes, one line."""
    try:
        return schema.model_validate(root.plain)
    except ValidationError as error:
        details = error.errors(include_url=False)
        raise UserError(describe(details, root, shown=shown, schema=schema, subject=subject)) from None


def describe(
    errors: Sequence[ErrorDetails],
    root: Node,
    *,
    shown: Callable[[Path], str],
    schema: type[Section] = Scenario,
    subject: str = "scenario",
) -> str:
    """The most useful of `errors` as one line `place: dotted.path: what; remedy`.

    An unknown key comes first, because a misspelt key also makes the right one missing; then the order of the schema.
    `shown` writes a path of the resolved file the way the user has it; the file follows `schema` and is a `subject`.
    """
    error = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    data = root.plain
    path = _path_of(error["loc"], data)
    node, reached = find(root, path)
    if error["type"] in ("missing", "union_tag_not_found"):
        missing = shown((*path, "kind") if error["type"] == "union_tag_not_found" else path)
        return f"{node.where}: {missing}: missing{_choices(error, data, path, schema)}"
    place = node.key_where if error["type"] == "extra_forbidden" and reached == path else node.where
    if error["type"].startswith("union_tag"):
        place, path = find(root, (*path, "kind"))[0].where, (*path, "kind")
    return f"{place}: {shown(path) or subject}: {_what(error, data, path, schema)}"


def _path_of(loc: Sequence[int | str], data: Any) -> Path:
    """A pydantic location without the union tags that pydantic puts into it."""
    path: list[int | str] = []
    for index, key in enumerate(loc):
        is_item = isinstance(data, list) and isinstance(key, int) and key < len(data)
        if is_item or (isinstance(data, dict) and key in data):
            data = data[key]
            path.append(key)
        elif index == len(loc) - 1 and isinstance(data, dict) and key != data.get("kind") and not _is_tag(key):
            path.append(key)  # a missing key
    return tuple(path)


def _is_tag(key: int | str) -> bool:
    return isinstance(key, str) and key.startswith("<")


def _choices(error: ErrorDetails, data: Any, path: Path, schema: type[Section]) -> str:
    if error["type"] == "union_tag_not_found":
        return f"; one of {', '.join(kinds_at(data, path, schema=schema))}"
    section = section_at(data, path[:-1], schema=schema)
    field = section.model_fields.get(str(path[-1])) if section and path else None
    kinds = kinds_at(data, path, schema=schema) if field else []
    return f"; one kind of {', '.join(kinds)} is needed" if len(kinds) > 1 else "; this key is required"


def _what(error: ErrorDetails, data: Any, path: Path, schema: type[Section]) -> str:
    kind, value = error["type"], error["input"]
    context: dict[str, Any] = error.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key; {_known_keys(data, path, schema)}"
    if kind == "union_tag_invalid":
        kinds = kinds_at(data, path[:-1], schema=schema)
        return f'"{context["tag"]}" is unknown; {suggest(str(context["tag"]), kinds)}'
    if kind == "literal_error":
        choices = [choice.strip("'") for choice in str(context["expected"]).replace(" or ", ", ").split(", ")]
        return f"{_show(value)} is not allowed; {suggest(str(value), choices)}"
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", error["msg"]))
    if kind in _EXPECTED:
        return _wrong_type(_EXPECTED[kind], value) + (_mapping(value, data, path, schema) if "model" in kind else "")
    comparisons = {"greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"}
    if kind in comparisons:
        words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
        bound = comparisons[kind]
        return f"must be {words[bound]} {_show_bound(context[bound])}, got {_show(value)}"
    if kind == "finite_number":
        return f"{_show(value)} is not a finite number"
    if kind == "string_pattern_mismatch":
        if context["pattern"] == FILE_NAME:
            return f"{_show(value)} may hold only letters, digits and . _ -"
        return f"{_show(value)} does not have the form {context['pattern'].strip('^$')}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "too_long":
        return f"at most {context['max_length']:,} values are allowed, got {context['actual_length']:,}"
    if kind == "string_too_long":
        return f"must be at most {context['max_length']:,} characters long, got {_show(value)}"
    return f"{error['msg']}, got {_show(value)}"


def _wrong_type(expected: str, value: Any) -> str:
    if isinstance(value, str) and expected in ("a number", "a whole number") and _is_number(value):
        return f'"{value}" is text; write the number without quotes'
    if isinstance(value, float) and expected == "a whole number" and value.is_integer() and abs(value) < 1e18:
        return f"expected a whole number, got {value!r}; write {int(value)}"
    if isinstance(value, str) and expected == "true or false":
        return f'expected true or false, got the text "{value}"'
    return f"expected {expected}, got {_show(value)}"


def _mapping(value: Any, data: Any, path: Path, schema: type[Section]) -> str:
    """What to write where one word stands for a section."""
    kinds = kinds_at(data, path, schema=schema)
    if value in kinds:
        return f"; write {{kind: {value}}}"
    if kinds:
        return f"; write {{kind: ...}}, one of {', '.join(kinds)}"
    section = section_at(data, path, schema=schema)
    keys = [*(FLAT_CLUSTER_KEYS if path == ("cluster",) else ()), *(section.model_fields if section else ())]
    return f"; its keys are {', '.join(keys[:_MOST_KEYS])}{' ...' if len(keys) > _MOST_KEYS else ''}" if keys else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _show_bound(bound: float) -> str:
    return f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"


def _show(value: Any) -> str:
    if isinstance(value, str):
        return f'"{value}"' if len(value) <= 60 else f'the text "{value[:57]}..."'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return _NAMES.get(type(value), type(value).__name__)


def _known_keys(data: Any, path: Path, schema: type[Section]) -> str:
    section = section_at(data, path[:-1], schema=schema)
    known = list(section.model_fields) if section else []
    if section and (home := home_within(section, str(path[-1]))):
        return f"did you mean {'.'.join(map(str, (*path[:-1], home, path[-1])))}?"
    if path[:-1] == ("cluster",):
        known += FLAT_CLUSTER_KEYS
    if path[:-1] == ("model",):
        known += ["hf_config"]
    return suggest(str(path[-1]), known)
