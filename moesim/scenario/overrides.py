"""`--set a.b=c`: change one key of a scenario before it is validated, with the same schema and the same messages.

Which section class the schema expects at a path (`section_at`) is what messages suggest from, too.
"""

import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin

from moesim.errors import UserError
from moesim.scenario.base import Section
from moesim.scenario.document import Node, Path, list_node, mapping_node, parse_yaml
from moesim.scenario.schema import Scenario


def section_at(data: Any, path: Path, *, schema: type[Section] = Scenario) -> type[Section] | None:
    """The section class that `schema` expects at `path` of the file `data` (nested dicts and lists).

    None where there is no section or where its kind is unknown.
    """
    annotation: Any = schema
    for key in path:
        annotation, data = _step(annotation, data, key)
    return _choose(annotation, data)


def _child(data: Any, key: str | int) -> Any:
    if isinstance(data, dict):
        return data.get(key)
    if isinstance(data, list) and str(key).isdigit() and int(key) < len(data):
        return data[int(key)]
    return None


def kinds_at(data: Any, path: Path, *, schema: type[Section] = Scenario) -> list[str]:
    """The kinds that a section at `path` may have, in the order of the schema."""
    annotation: Any = schema
    for key in path:
        annotation, data = _step(annotation, data, key)
    sections = _sections_of(annotation)
    fields = [section.model_fields["kind"] for section in sections if "kind" in section.model_fields]
    return [kind for kind_field in fields for kind in get_args(kind_field.annotation)]


def home_within(section: type[Section], key: str) -> str | None:
    """The field of `section` whose own section has the key: what a key written one level too high was meant for."""
    for name, field in section.model_fields.items():
        if any(key in part.model_fields for part in _sections_of(field.annotation)):
            return name
    return None


def _step(annotation: Any, data: Any, key: str | int) -> tuple[Any, Any]:
    section = _choose(annotation, data)
    if section is not None and key in section.model_fields:
        return section.model_fields[str(key)].annotation, _child(data, key)
    return _item_type(annotation), _child(data, key)


def _alternatives(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [alternative for part in get_args(annotation) for alternative in _alternatives(part)]
    return [annotation]


def _sections_of(annotation: Any) -> list[type[Section]]:
    return [part for part in _alternatives(annotation) if isinstance(part, type) and issubclass(part, Section)]


def _choose(annotation: Any, data: Any) -> type[Section] | None:
    sections = _sections_of(annotation)
    if len(sections) == 1:
        return sections[0]
    kind = data.get("kind") if isinstance(data, dict) else None
    for section in sections:
        if kind in get_args(section.model_fields["kind"].annotation):
            return section
    return None


def _item_type(annotation: Any) -> Any:
    for part in _alternatives(annotation):
        if get_origin(part) is tuple:
            return get_args(part)[0]
    return None


LONGEST_LABEL = 120  # characters
FLAT_CLUSTER_KEYS = ("name", "gpu", "nodes", "gpus_per_node", "price_per_gpu_hour")


def apply_overrides(root: Node, overrides: Sequence[str]) -> Node:
    """`root` with every `a.b=c` applied in order.

    Values are YAML, lists are indexed by number (`cluster.pools.0.nodes=2`), missing sections are made.
    Switching a section's `kind` drops the keys that came with the old kind and that the new kind does not have, so
    that `routing.kind=uniform` works on any scenario; keys that are themselves set are never dropped.
    Raises UserError naming the override.
    """
    kept: set[Path] = set()
    switched: list[Path] = []
    for override in overrides:
        path, value = _parse_override(override)
        path = _cluster_alias(root, path)
        if path[-1] == "kind" and _kind_at(root, path) not in (None, value.plain):
            switched.append(path[:-1])
        kept.add(path)
        root = _set(root, path, value)
    for section in switched:
        root = _drop_stale_keys(root, section, kept)
    return root


def override_label(override: str) -> str:
    """How messages name an override: `--set a.b=c`, a long one by its beginning."""
    text = f"--set {override}"
    return text if len(text) <= LONGEST_LABEL else f"{text[:LONGEST_LABEL]}..."


def _parse_override(override: str) -> tuple[Path, Node]:
    label = override_label(override)
    key, equals, text = override.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise UserError(f"{label}: write key=value, e.g. --set routing.steps=50")
    return path, parse_yaml(text, source=label, located=False)


def _cluster_alias(root: Node, path: Path) -> Path:
    """`cluster.nodes` means `cluster.pools.0.nodes` when there is one pool."""
    if len(path) >= 2 and path[0] == "cluster" and path[1] in FLAT_CLUSTER_KEYS:
        cluster = root.value.get("cluster")
        pools = cluster.value.get("pools") if cluster and isinstance(cluster.value, dict) else None
        if pools and isinstance(pools.value, list) and len(pools.value) == 1:
            return ("cluster", "pools", 0, *path[1:])
    return path


def _kind_at(node: Node, path: Path) -> Any:
    for key in path:
        if isinstance(node.value, list) and str(key).isdigit() and int(key) < len(node.value):
            node = node.value[int(key)]
        elif isinstance(node.value, dict) and key in node.value:
            node = node.value[key]
        else:
            return None
    return node.value


def _set(node: Node, path: Path, value: Node) -> Node:
    if not path:
        return value
    key, rest = path[0], path[1:]
    if isinstance(node.value, list):
        if not str(key).isdigit() or int(key) >= len(node.value):
            raise UserError(f'{value.where}: "{key}" is no item of a list with items 0 to {len(node.value) - 1}')
        items = list(node.value)
        items[int(key)] = _set(items[int(key)], rest, value)
        return list_node(items, node)
    if node.value is not None and not isinstance(node.value, dict):
        raise UserError(f'{value.where}: "{key}" has no place inside the value {node.value!r}; set its parent instead')
    children: dict[str, Node] = dict(node.value or {})
    child = children.get(str(key), Node(None, value.where, value.where))
    children[str(key)] = _set(child, rest, value)
    return mapping_node(children, node)


def _drop_stale_keys(root: Node, path: Path, kept: set[Path]) -> Node:
    section = section_at(root.plain, path)
    node = root
    for key in path:
        node = node.value[int(key) if isinstance(node.value, list) else key]
    if section is None or not isinstance(node.value, dict):
        return root  # an unknown kind: validation says so
    known = set(section.model_fields)
    children = {
        key: child
        for key, child in node.value.items()
        if key in known or any(other[: len(path) + 1] == (*path, key) for other in kept)
    }
    return _set(root, path, mapping_node(children, node))
