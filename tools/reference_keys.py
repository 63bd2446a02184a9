"""The keys of a JSON Schema as a page of Markdown: each section once, where it first appears, with its keys."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Schema = Mapping[str, Any]
_REFERENCE = "#/$defs/"


def cell(text: str) -> str:
    """Text that stands for itself inside a table of Markdown."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("\n", " ")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


@dataclass(kw_only=True)
class Place:
    """A definition of the schema and the paths of keys that have it; the first one is its heading."""

    name: str
    paths: list[str]

    @property
    def anchor(self) -> str:
        """Of its heading."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", self.name).lower()


@dataclass
class KeyPage:
    """A schema as a page. `elsewhere`: headings by definition that another `page` has, which are linked there."""

    schema: Schema
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    page: str = ""

    @property
    def titles(self) -> dict[str, str]:
        """The heading of every definition."""
        return {place.name: place.paths[0] for place in self._places()}

    def text(self, head: str) -> str:
        """The whole page below its head."""
        lines = [head, "## The sections { #sections }", "", *self._table(self.schema, "")]
        for place in self._places():
            if place.name in self.elsewhere:
                continue
            found = self.schema["$defs"][place.name]
            lines += ["", f"{'#' * self._level(place)} {self._heading(place)} {{ #{place.anchor} }}", ""]
            lines += [*_description(found), ""]
            if len(place.paths) > 1:
                lines += ["Also " + ", ".join(f"`{path}`" for path in place.paths[1:]) + ".", ""]
            lines += self._table(found, _prefix(place.paths[0]))
        return "\n".join(lines) + "\n"

    def _level(self, place: Place) -> int:
        return 2 if "." not in place.paths[0] and "[]" not in place.paths[0] else 3

    def _heading(self, place: Place) -> str:
        kind = self.schema["$defs"][place.name]["properties"].get("kind", {})
        kinds = [kind["const"]] if "const" in kind else kind.get("enum", [])
        several = sum(other.paths[0] == place.paths[0] for other in self._places()) > 1
        return f"{place.paths[0]}" + (f" of kind {', '.join(kinds)}" if kinds and several else "")

    def _places(self) -> list[Place]:
        """The definitions in the order in which a reader meets them: a section, then what is inside it."""
        found: dict[str, Place] = {}
        self._visit(self.schema, "", found)
        return list(found.values())

    def _visit(self, node: Schema, path: str, found: dict[str, Place]) -> None:
        for key, value in node.get("properties", {}).items():
            for name, inner in _references(value, _prefix(path) + key):
                known = found.get(name)
                if known is None:
                    found[name] = Place(name=name, paths=[inner])
                    self._visit(self.schema["$defs"][name], inner, found)
                elif inner not in known.paths:
                    known.paths.append(inner)

    def _table(self, node: Schema, prefix: str) -> list[str]:
        required = node.get("required", ())
        rows = []
        for key, value in node.get("properties", {}).items():
            default = _default(value) if "default" in value or key not in required else "required"
            text = cell(value.get("description", ""))
            rows.append((f"`{prefix}{key}`", self._type(value), _unit(value), default, text))
        return table(("key", "type", "unit", "default", "what it says"), rows) if rows else ["No keys."]

    def _type(self, value: Schema) -> str:
        """What may stand there: a type with its bounds, words to choose from, or a link to a section."""
        kinds = list(dict.fromkeys(self._kinds(value)))
        return " or ".join(kinds) or "any"

    def _kinds(self, value: Schema) -> Iterator[str]:
        if "$ref" in value:
            yield self._link(value["$ref"].removeprefix(_REFERENCE))
        for form in (*value.get("anyOf", ()), *value.get("oneOf", ())):
            if form.get("type") != "null":
                yield from self._kinds(form)
        if "const" in value:
            yield f"`{value['const']}`"
        elif "enum" in value:
            yield ", ".join(f"`{choice}`" for choice in value["enum"] if choice is not None)
        elif value.get("type") == "array":
            items = value.get("items") or {"anyOf": value.get("prefixItems", [])}
            yield f"list of {self._type(items)}"
        elif value.get("type") == "object" or "additionalProperties" in value:
            yield "mapping"
        elif value.get("type") == "string":
            yield f"text such as `{value['examples'][0]}`" if "examples" in value else "text"
        elif "type" in value and value["type"] != "null":
            yield _bounded(value)

    def _link(self, name: str) -> str:
        other = self.page if name in self.elsewhere else ""
        place = Place(name=name, paths=[])
        kind = self.schema["$defs"][name].get("properties", {}).get("kind", {})
        words = [kind["const"]] if "const" in kind else kind.get("enum") or ["section"]
        return f"[{', '.join(f'`{word}`' if word != 'section' else word for word in words)}]({other}#{place.anchor})"


def _prefix(path: str) -> str:
    return f"{path}." if path else ""


def _references(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Definitions that a key's value can have, each with its path."""
    if isinstance(value, Mapping):
        if "$ref" in value:
            yield value["$ref"].removeprefix(_REFERENCE), path
        for key in ("anyOf", "oneOf", "prefixItems"):
            for form in value.get(key, ()):
                yield from _references(form, path)
        if "items" in value:
            yield from _references(value["items"], path + "[]")


def _description(node: Schema) -> list[str]:
    return [cell(line) if line else "" for line in node.get("description", "").split("\n")]


def _bounded(value: Schema) -> str:
    low, high = value.get("minimum"), value.get("maximum")
    text: str = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`"}[value["type"]]
    if "exclusiveMinimum" in value:
        low = value["exclusiveMinimum"] + 1 if value["type"] == "integer" else value["exclusiveMinimum"]
    if low is not None and low == high:
        return f"`{low}`"
    if low is not None and high is not None:
        return f"{text}, {_number(low)} to {_number(high)}"
    return f"{text}, at least {_number(low)}" if low is not None else text


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _unit(value: Any) -> str:
    """The unit of a number, wherever in its forms it stands."""
    if isinstance(value, Mapping):
        if isinstance(value.get("unit"), str):
            return str(value["unit"])
        inner = [value.get("items"), *(value.get(key) for key in ("anyOf", "oneOf"))]
        return next((unit for form in inner if (unit := _unit(form))), "")
    if isinstance(value, Sequence) and not isinstance(value, str):
        return next((unit for form in value if (unit := _unit(form))), "")
    return ""


def _default(value: Schema) -> str:
    if value.get("default") is None:
        return "-"
    default = value["default"]
    if isinstance(default, Mapping | list):
        return "its own" if "$ref" in value or ("oneOf" in value and "kind" not in default) else f"`{_flow(default)}`"
    return f"`{json.dumps(default)}`" if isinstance(default, bool) else f"`{default}`"


def _flow(value: Any) -> str:
    """As YAML writes it in one line."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key}: {_flow(item)}" for key, item in value.items() if item is not None)
        return "{" + inside + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return json.dumps(value) if isinstance(value, bool) else str(value)
