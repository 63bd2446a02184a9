"""Reading a study file: nodes with places to plain values, one line for every mistake, and the axes of a study.

Axes say which keys take which values, alone or zipped, and span a grid. A key is a dotted key of a scenario, or
`$name`: a variable that texts elsewhere in the study use as `$name`.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.scenario.catalogue import suggest
from moesim.scenario.document import Node, read_yaml


def read_file(path: Path) -> Node:
    """The mapping in a study file. Raises UserError."""
    root = read_yaml(path, what="study")
    mapping(root, "a study", known=None)
    return root


def mapping(node: Node, what: str, *, known: Collection[str] | None) -> dict[str, Node]:
    """The children of a mapping whose keys are all `known` (any keys when None). Raises UserError."""
    if not isinstance(node.value, dict):
        raise UserError(f"{node.where}: {what} is a mapping of keys to values")
    children: dict[str, Node] = node.value
    for key, child in children.items():
        if known is not None and key not in known:
            raise UserError(f"{child.key_where}: {what} has no key {key!r}; {suggest(key, known)}")
    return children


def items(node: Node, what: str) -> list[Node]:
    """The items of a list that is not empty. Raises UserError."""
    if not isinstance(node.value, list) or not node.value:
        raise UserError(f"{node.where}: {what} is a list with at least one item, such as [1, 2]")
    return node.value


def text(node: Node, what: str) -> str:
    """A text that is not empty. Raises UserError."""
    if not isinstance(node.value, str) or not node.value:
        raise UserError(f"{node.where}: {what} is a text")
    return node.value


def flag(node: Node, what: str) -> bool:
    """true or false. Raises UserError."""
    if not isinstance(node.value, bool):
        raise UserError(f"{node.where}: {what} is true or false")
    return node.value


def chosen(node: Node, what: str, *, known: Sequence[str]) -> str:
    """One of the `known` words. Raises UserError with the nearest."""
    word = text(node, what)
    if word not in known:
        raise UserError(f"{node.where}: {what} {word!r} is unknown; {suggest(word, known)}")
    return word


def distinct(nodes: Sequence[Node], read: Callable[[Node], str], what: str) -> list[str]:
    """Texts of which none comes twice. Raises UserError."""
    found: list[str] = []
    for node in nodes:
        word = read(node)
        if word in found:
            raise UserError(f"{node.where}: {what} {word!r} comes twice")
        found.append(word)
    return found


_KEY = re.compile(r"\$[A-Za-z_][A-Za-z_0-9]*|[A-Za-z_0-9]+(\.[A-Za-z_0-9]+)*")
_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z_0-9]*)|\$\{([A-Za-z_][A-Za-z_0-9]*)\}")
# What each key of an axis says; the reference of the documentation prints these, too.
AXIS_KEYS: Mapping[str, str] = {
    "key": "A dotted key of a scenario, or $name: a variable that texts elsewhere in the study use as $name.",
    "keys": "Several keys that take their values together, instead of key.",
    "values": "The values that the key takes; with keys, a row of values for each place. Required.",
    "labels": "A word for each value, for tables and pictures.",
    "repeat": "Whether the values repeat one experiment, so that summaries average over them; true for seed alone.",
}


@dataclass(frozen=True)
class Setting:
    """A key, its value and the place where the study says so."""

    key: str
    value: Any
    where: str


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Rows of settings, one row per place on the axis; a row may leave keys as they are in the base.

    `repeat`: the rows repeat the same experiment (seeds), so that summaries average over them.
    """

    keys: tuple[str, ...]
    rows: tuple[tuple[Setting, ...], ...]
    labels: tuple[str, ...] | None = None
    repeat: bool = False

    @property
    def places(self) -> list[dict[str, Any]]:
        """The values of every row by their keys."""
        return [{setting.key: setting.value for setting in row} for row in self.rows]

    def label(self, values: Mapping[str, Any]) -> str:
        """Of the place with these values of its keys, where it has labels."""
        assert self.labels is not None
        return self.labels[self.places.index({key: values[key] for key in self.keys})]

    def as_json(self) -> dict[str, Any]:
        """As study.json has it: a row of values per place, null for a key that a row leaves alone."""
        return {
            "keys": list(self.keys),
            "values": [[row.get(key) for key in self.keys] for row in self.places],
            "labels": None if self.labels is None else list(self.labels),
            "repeat": self.repeat,
        }


def read_axes(node: Node) -> list[Axis]:
    """The list `axes`. Raises UserError."""
    return [_read_axis(item) for item in items(node, "axes")]


def _read_axis(node: Node) -> Axis:
    parts = mapping(node, "an axis", known=AXIS_KEYS)
    if ("key" in parts) == ("keys" in parts):
        raise UserError(f"{node.where}: an axis needs key: K, or keys: [K1, K2] for values that go together")
    if "values" not in parts:
        raise UserError(f"{node.where}: an axis needs values")
    values = items(parts["values"], "values")
    rows: list[tuple[Setting, ...]]
    if "key" in parts:
        keys = [_key(parts["key"])]
        rows = [(Setting(keys[0], value.plain, value.where),) for value in values]
    else:
        keys = distinct(items(parts["keys"], "keys"), _key, "the key")
        rows = [_row(keys, value) for value in values]
    repeat = flag(parts["repeat"], "repeat") if "repeat" in parts else keys == ["seed"]
    return Axis(keys=tuple(keys), rows=tuple(rows), labels=_labels(parts.get("labels"), len(rows)), repeat=repeat)


def _key(node: Node) -> str:
    key = text(node, "a key")
    if not _KEY.fullmatch(key):
        raise UserError(f"{node.where}: {key!r} is no key; write a dotted key such as routing.steps, or $name")
    return key


def _row(keys: Sequence[str], node: Node) -> tuple[Setting, ...]:
    values = items(node, "a row of values")
    if len(values) != len(keys):
        raise UserError(f"{node.where}: {len(values)} values for the {len(keys)} keys {', '.join(keys)}")
    return tuple(Setting(key, value.plain, value.where) for key, value in zip(keys, values, strict=True))


def _labels(node: Node | None, num_rows: int) -> tuple[str, ...] | None:
    if node is None:
        return None
    labels = distinct(items(node, "labels"), lambda item: str(item.plain), "the label")
    if len(labels) != num_rows:
        raise UserError(f"{node.where}: {len(labels)} labels for {num_rows} values")
    return tuple(labels)


def read_point_list(node: Node) -> Axis:
    """The list `points` as one axis; each point may set other keys. Raises UserError."""
    rows = []
    for item in items(node, "points"):
        rows.append(tuple(read_settings(item, "a point")))
    keys = tuple(dict.fromkeys(setting.key for row in rows for setting in row))
    return Axis(keys=keys, rows=tuple(rows))


def read_settings(node: Node, what: str) -> list[Setting]:
    """A mapping of dotted keys to values. Raises UserError."""
    settings = []
    for key, child in mapping(node, what, known=None).items():
        _key(Node(key, child.key_where, child.key_where))
        settings.append(Setting(key, child.plain, child.where))
    return settings


def grid(axes: Sequence[Axis]) -> Iterator[list[Setting]]:
    """The settings of every point, the last axis fastest."""
    for rows in product(*(axis.rows for axis in axes)):
        yield [setting for row in rows for setting in row]


def substituted(settings: Sequence[Setting], variables: Mapping[str, Any]) -> list[Setting]:
    """The settings of scenario keys, every `$name` in their texts replaced. Raises UserError for an unknown name."""
    return [
        Setting(setting.key, _substituted(setting.value, variables, setting.where), setting.where)
        for setting in settings
        if not setting.key.startswith("$")
    ]


def _substituted(value: Any, variables: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, dict):
        return {key: _substituted(child, variables, where) for key, child in value.items()}
    if isinstance(value, list):
        return [_substituted(child, variables, where) for child in value]
    if not isinstance(value, str):
        return value
    alone = _VARIABLE.fullmatch(value)
    if alone:
        return _variable(alone, variables, where)
    return _VARIABLE.sub(lambda match: str(_variable(match, variables, where)), value)


def _variable(match: re.Match[str], variables: Mapping[str, Any], where: str) -> Any:
    name = "$" + (match[1] or match[2])
    if name not in variables:
        known = sorted(variables)
        raise UserError(f"{where}: no axis sets {name}; {suggest(name, known) if known else 'add one'}")
    return variables[name]
