"""`moesim schema WHAT`: what editors check files by accepts every shipped file, and refuses a key that is not there."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from moesim.cli.catalogue import SCHEMA_KINDS
from moesim.planner.plan import Plan
from moesim.planner.serving_plan import ServingPlan
from moesim.sweeper.study import STUDY_KEYS

SCENARIOS = Path(__file__).parents[2] / "scenarios"
_BELOW = {"study": "studies", "plan": "plans", "serving": "serving"}
FOLDERS = {"scenario": SCENARIOS, **{kind: SCENARIOS / below for kind, below in _BELOW.items()}}
FILES = [(kind, path) for kind, folder in FOLDERS.items() for path in sorted(folder.glob("*.yaml"))]
_TYPES: Mapping[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": int | float,
    "null": type(None),
}


def accepts(schema: Mapping[str, Any], value: Any, root: Mapping[str, Any]) -> bool:
    """Whether a value has the forms of a schema: types, keys, words and patterns; not the bounds of numbers."""
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    for several in ("anyOf", "oneOf"):
        if several in schema and not any(accepts(form, value, root) for form in schema[several]):
            return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if "const" in schema and value != schema["const"]:
        return False
    if "type" in schema and not isinstance(value, _TYPES[schema["type"]]):
        return False
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, list):
        return all(accepts(schema.get("items", {}), item, root) for item in value)
    if not isinstance(value, dict):
        return True
    known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
    return set(schema.get("required", ())) <= set(value) and all(
        accepts(known[key], item, root) if key in known else more is not False for key, item in value.items()
    )


def read(path: Path) -> Any:
    """A file as YAML 1.2 has it: dates stay texts, and 2e12 is a number."""
    value = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    return plain(value)


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    if value in ("true", "false"):
        return value == "true"
    if re.fullmatch(r"-?\d+", value):
        return int(value)
    return float(value) if re.fullmatch(r"-?\d+(\.\d*)?(e-?\d+)?", value) else value


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    from moesim.cli.catalogue import _schema

    return {kind: _schema(kind) for kind in SCHEMA_KINDS}


@pytest.mark.parametrize(("kind", "path"), FILES, ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_shipped_files_are_accepted_and_a_mistake_is_not(schemas: dict[str, Any], kind: str, path: Path) -> None:
    content, schema = read(path), schemas[kind]
    assert accepts(schema, content, schema)
    assert not accepts(schema, content | {"seeed": 1}, schema)
    assert not accepts(schema, {key: value for key, value in content.items() if key != "name"}, schema)


def test_keys_are_those_of_the_files(moesim) -> None:
    assert json.loads(moesim("schema", "study").out)["properties"].keys() == STUDY_KEYS.keys()
    forms = json.loads(moesim("schema", "plan").out)["$defs"]
    for plan in (Plan, ServingPlan):
        assert forms[plan.__name__]["properties"].keys() == plan.model_fields.keys()
    assert moesim("schema").out == moesim("schema", "scenario").out
    assert moesim("schema", "planet").code == 1
