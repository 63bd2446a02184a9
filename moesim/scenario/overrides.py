"""`--set a.b=c`: change one key of a scenario before it is validated, with the same schema and the same messages."""

from collections.abc import Sequence
from typing import Any

from moesim.errors import UserError
from moesim.scenario.document import Node, Path, list_node, mapping_node, parse_yaml
from moesim.scenario.sections import section_at

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
