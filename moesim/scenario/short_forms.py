"""What a file may say shorter, and what `--set a.b=c` changes, rewritten before the schema sees it.

`cluster: {gpu, nodes, ...}` becomes one entry of `cluster.pools`; `implementation: NAME` a mapping with that kind;
`model: {preset | hf_config, ...}` becomes an explicit model; a missing `routing` the model's own; paths become
absolute, relative to the scenario file (or, from `--set`, to the working directory). Changed keys are checked by the
same schema, with the same messages; which section class it expects at a path (`section_at`) is what messages suggest
from, too.
"""

import os
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path as FilePath
from typing import Annotated, Any, Union, get_args, get_origin

from moesim.errors import UserError
from moesim.scenario.base import Section
from moesim.scenario.catalogue import model_names, model_preset
from moesim.scenario.document import Node, Path, find, list_node, mapping_node, node_of, parse_yaml
from moesim.scenario.hf_config import read_hf_config
from moesim.scenario.routing import LIBRARY_PREFIX
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
        node, reached = find(root, path)
        if path[-1] == "kind" and reached == path and node.value not in (None, value.plain):
            switched.append(path[:-1])
        kept.add(path)
        root = _set(root, path, value)
        if path == ("implementation",):
            root = named_implementation(root)  # so that another override may set one of its switches
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
    section, node = section_at(root.plain, path), find(root, path)[0]
    if section is None or not isinstance(node.value, dict):
        return root  # an unknown kind: validation says so
    known = set(section.model_fields)
    children = {
        key: child
        for key, child in node.value.items()
        if key in known or any(other[: len(path) + 1] == (*path, key) for other in kept)
    }
    return _set(root, path, mapping_node(children, node))


_PATHS = (
    ("routing", "file"),
    ("routing", "corpus"),
    ("decode_routing", "file"),
    ("decode_routing", "corpus"),
    ("cluster", "fabric", "file"),
    ("placement", "file"),
    ("implementation", "file"),
    ("workload", "arrivals", "file"),
)
_LIBRARY = (("routing", "file"), ("decode_routing", "file"))  # which may name a trace that ships
_NAMED_CORPORA = ("stdlib",)


def flat_cluster_to_pools(root: Node) -> Node:
    """The scenario with the flat form of `cluster` written as one pool."""
    cluster = root.value.get("cluster")
    if cluster is None or not isinstance(cluster.value, dict):
        return root
    flat = {key: child for key, child in cluster.value.items() if key in FLAT_CLUSTER_KEYS}
    if not flat:
        return root
    if "pools" in cluster.value:
        key, child = next(iter(flat.items()))
        raise UserError(f"{child.key_where}: cluster.{key}: conflicts with cluster.pools; write it inside a pool")
    rest = {key: child for key, child in cluster.value.items() if key not in FLAT_CLUSTER_KEYS}
    pools = list_node([mapping_node(flat, cluster)], cluster)
    return _with(root, cluster=mapping_node({"pools": pools, **rest}, cluster))


def named_implementation(root: Node) -> Node:
    """The scenario or plan with `implementation: NAME` written as its kind."""
    named = root.value.get("implementation")
    if named is None or not isinstance(named.value, str):
        return root
    return _with(root, implementation=mapping_node({"kind": named}, named))


def explicit_model(root: Node, *, base: FilePath) -> Node:
    """The scenario with `model.preset` or `model.hf_config` replaced by every field; fields beside them win."""
    model = root.value.get("model")
    if model is None or not isinstance(model.value, dict):
        return root
    given = dict(model.value)
    fields: dict[str, Any] = {}
    if "hf_config" in given:
        node = given.pop("hf_config")
        if "preset" in given:
            raise UserError(f"{node.key_where}: model.hf_config: conflicts with model.preset; keep one of them")
        with _located(node, "model.hf_config"):
            fields = dict(read_hf_config(_resolve(_text(node), node, base)).fields)
            fields |= {"routing": routing_of_layout(fields)} if fields.get("experts") else {}
    elif "preset" in given and given["preset"].value is not None:
        with _located(given["preset"], "model.preset"):
            fields = model_preset(_text(given["preset"]))
    if given.keys() & {"experts", "top_k"}:
        fields.pop("routing", None)  # a router of other experts
    merged = _merge(_within(fields, given.get("layers")), given, model)
    experts = merged.value.get("experts")
    pattern = merged.value.get("dense_at")
    if "dense_layers" not in merged.value and pattern is not None and isinstance(pattern.value, list):
        count = Node(len(pattern.value), pattern.where, pattern.key_where)
        merged = mapping_node({**merged.value, "dense_layers": count}, merged)
    if "dense_layers" not in merged.value and (experts is None or experts.value == 0) and "layers" in merged.value:
        merged = mapping_node({**merged.value, "dense_layers": merged.value["layers"]}, merged)
    return _with(root, model=merged)


def default_routing(root: Node) -> Node:
    """The scenario or plan with its model's routing (`model.routing`) where it has none; a dense model needs none."""
    model = root.value.get("model")
    fields = model.value if model is not None and isinstance(model.value, dict) else {}
    experts, named = (fields[key].value if key in fields else None for key in ("experts", "routing"))
    if "routing" in root.value or not experts:
        return root
    assert model is not None
    return _with(root, routing=node_of(routing_of(named if isinstance(named, str) else None), model))


_SAME = ("layers", "hidden", "experts", "top_k", "expert_intermediate")


def routing_of_layout(fields: Mapping[str, Any]) -> str:
    """`model.routing` of the catalogue's model of these sizes, which is the same one: uniform where there is none."""
    for name in model_names():
        known = model_preset(name)
        if all(fields.get(key) == known.get(key) for key in _SAME):
            return str(known.get("routing") or "uniform")
    return "uniform"


def routing_of(named: str | None) -> dict[str, str]:
    """The routing section that a model's `routing` stands for: a router of the library, or uniform."""
    if named is None or not named.startswith(LIBRARY_PREFIX):
        return {"kind": "uniform"}
    return {"kind": "trace", "file": named}


def _within(fields: dict[str, Any], layers: Node | None) -> dict[str, Any]:
    """The fields of a source with the patterns of its layers cut to `layers`, where those are given and fewer."""
    if layers is None or type(layers.value) is not int:
        return fields
    fields, most = dict(fields), layers.value
    if fields.get("dense_at"):
        fields["dense_at"] = [number for number in fields["dense_at"] if number < most]
        fields["dense_layers"] = len(fields["dense_at"])
    if fields.get("local"):
        numbers = [number for number in fields["local"]["layers"] if number < most]
        fields["local"] = {**fields["local"], "layers": numbers} if numbers else None
    return fields


def absolute_paths(root: Node, *, base: FilePath) -> Node:
    """The scenario with every path absolute. Raises UserError for a file that does not exist."""
    for path in _PATHS:
        node, reached = find(root, path)
        if reached != path or not isinstance(node.value, str) or node.value in _NAMED_CORPORA:
            continue
        if path in _LIBRARY and node.value.startswith(LIBRARY_PREFIX):
            continue
        target = _resolve(node.value, node, base)
        if not target.exists():
            remedy = "name a file that is there, by a path from the folder of this file"
            if node.where.startswith("--set "):
                remedy = "name a file that is there, by a path from the working directory"
            what = f'"{node.value}" does not exist (looked for {target})'
            raise UserError(f"{node.where}: {'.'.join(path)}: {what}; {remedy}")
        root = _set(root, path, Node(str(target), node.where, node.key_where))
    return root


def _resolve(text: str, node: Node, base: FilePath) -> FilePath:
    origin = FilePath() if node.where.startswith("--set ") else base
    return (origin / os.path.expanduser(text)).absolute()


def _text(node: Node) -> str:
    if not isinstance(node.value, str):
        raise UserError(f"expected text, got {node.plain!r}")
    return node.value


@contextmanager
def _located(node: Node, key: str) -> Iterator[None]:
    """Puts the place of `node` and the key in front of a UserError raised inside."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{node.where}: {key}: {error}") from None


def _merge(fields: dict[str, Any], given: dict[str, Node], like: Node) -> Node:
    """`fields` overridden by `given`; mappings of the same kind are merged key by key."""
    children = {key: node_of(value, like) for key, value in fields.items()}
    for key, node in given.items():
        default = fields.get(key)
        if isinstance(default, dict) and isinstance(node.value, dict):
            kind = node.value.get("kind")
            if kind is None or kind.value == default.get("kind"):
                node = _merge(default, node.value, node)
        children[key] = node
    return mapping_node(children, like)


def _with(root: Node, **sections: Node) -> Node:
    return mapping_node({**root.value, **sections}, root)
