"""The short forms that a scenario file may use, rewritten into the one form that the schema knows.

`cluster: {gpu, nodes, ...}` becomes one entry of `cluster.pools`; `implementation: NAME` a mapping with that kind;
`model: {preset | hf_config, ...}` becomes an explicit model; a missing `routing` the model's own; paths become
absolute, relative to the scenario file (or, from `--set`, to the working directory).
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.scenario.catalogue import model_names, model_preset
from moesim.scenario.document import Node, find, list_node, mapping_node
from moesim.scenario.hf_config import read_hf_config
from moesim.scenario.overrides import FLAT_CLUSTER_KEYS
from moesim.scenario.routing import LIBRARY_PREFIX

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


def explicit_model(root: Node, *, base: Path) -> Node:
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
    return _with(root, routing=_node_of(routing_of(named if isinstance(named, str) else None), model))


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


def absolute_paths(root: Node, *, base: Path) -> Node:
    """The scenario with every path absolute. Raises UserError for a file that does not exist."""
    for path in _PATHS:
        node, reached = find(root, path)
        if reached != path or not isinstance(node.value, str) or node.value in _NAMED_CORPORA:
            continue
        if path in _LIBRARY and node.value.startswith(LIBRARY_PREFIX):
            continue
        target = _resolve(node.value, node, base)
        if not target.exists():
            raise UserError(f'{node.where}: {".".join(path)}: "{node.value}" does not exist (looked for {target})')
        root = _replace(root, path, Node(str(target), node.where, node.key_where))
    return root


def _resolve(text: str, node: Node, base: Path) -> Path:
    origin = Path() if node.where.startswith("--set ") else base
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
    children = {key: _node_of(value, like) for key, value in fields.items()}
    for key, node in given.items():
        default = fields.get(key)
        if isinstance(default, dict) and isinstance(node.value, dict):
            kind = node.value.get("kind")
            if kind is None or kind.value == default.get("kind"):
                node = _merge(default, node.value, node)
        children[key] = node
    return mapping_node(children, like)


def _node_of(value: Any, like: Node) -> Node:
    if isinstance(value, dict):
        return mapping_node({key: _node_of(child, like) for key, child in value.items()}, like)
    if isinstance(value, list):
        return list_node([_node_of(child, like) for child in value], like)
    return Node(value, like.where, like.key_where)


def _with(root: Node, **sections: Node) -> Node:
    return mapping_node({**root.value, **sections}, root)


def _replace(node: Node, path: tuple[str, ...], new: Node) -> Node:
    if not path:
        return new
    return mapping_node({**node.value, path[0]: _replace(node.value[path[0]], path[1:], new)}, node)
