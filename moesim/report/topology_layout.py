"""Where the parts of a fabric are drawn, and which of them are drawn as one.

A drawing of a thousand GPUs is grey. So vertices are merged, kind by kind, until every layer fits a page: first the
GPUs of a node, then nodes, NVSwitches, leaves and spines with equal neighbours. A part with a degraded link keeps
apart from whole ones. `fabric_parts` has the links one by one: which are degraded or failed, and what is cut off.
Legend: X links.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import networkx as nx

from moesim.network import Fabric, build_fabric
from moesim.scenario.cluster import Cluster


@dataclass(frozen=True, kw_only=True)
class FabricLink:
    """One directed link: bytes/s that it was built with and has now (0 when failed), seconds of latency."""

    source: str
    target: str
    tier: str
    nominal: float
    bandwidth: float
    latency: float
    efficiency: float

    @property
    def factor(self) -> float:
        """What is left of the bandwidth."""
        return self.bandwidth / self.nominal

    @property
    def name(self) -> str:
        """`nic0 -> leaf0.0`, the words that `cluster.fabric.degraded` takes as link: [nic0, leaf0.0]."""
        return f"{self.source} -> {self.target}"


@dataclass(frozen=True, kw_only=True)
class FabricParts:
    """A fabric as built and as it is: every link, the kind of every vertex, and the node of every GPU and NIC."""

    fabric: Fabric
    links: tuple[FabricLink, ...]
    kind_of: dict[str, str]
    node_of: dict[str, int]

    @property
    def degraded(self) -> list[FabricLink]:
        """Links that have lost bandwidth, but not all of it."""
        return [link for link in self.links if 0 < link.factor < 1]

    @property
    def failed(self) -> list[FabricLink]:
        """Links that are gone."""
        return [link for link in self.links if link.bandwidth == 0]

    @property
    def num_cut_off(self) -> int:
        """GPUs outside the largest set of GPUs that can all reach each other."""
        sets = nx.strongly_connected_components(self.fabric.graph)
        reached = max(sum(self.kind_of[name] == "gpu" for name in members) for members in sets)
        return self.fabric.num_ranks - reached


def fabric_parts(cluster: Cluster) -> FabricParts:
    """The parts of a cluster's fabric. Raises UserError as build_fabric does.

    What a degradation took is seen by building the same fabric without any.
    """
    healthy = fabric = build_fabric(cluster)
    if cluster.fabric.degraded:
        section = cluster.fabric.model_copy(update={"degraded": ()})
        healthy = build_fabric(cluster.model_copy(update={"fabric": section}), parameters=fabric.parameters)
    now = dict(zip(fabric.links, fabric.bandwidth_X.tolist(), strict=True))
    columns = (healthy.bandwidth_X.tolist(), healthy.latency_X.tolist(), healthy.efficiency_X.tolist())
    return FabricParts(
        fabric=fabric,
        links=tuple(
            FabricLink(
                source=link[0],
                target=link[1],
                tier=tier,
                nominal=nominal,
                bandwidth=now.get(link, 0.0),
                latency=latency,
                efficiency=efficiency,
            )
            for link, tier, nominal, latency, efficiency in zip(healthy.links, healthy.tier_X, *columns, strict=True)
        ),
        kind_of=dict(nx.get_node_attributes(healthy.graph, "kind")),
        node_of={
            name: node
            for rank, node in enumerate(fabric.node_of_rank_R.tolist())
            for name in (f"gpu{rank}", f"nic{rank}")
        },
    )


MOST_BUNDLES = 700  # lines beyond which a drawing says nothing and a browser crawls
_MOST_BESIDE = 80  # vertices of one layer
_LAYER = {"nvswitch": 0, "gpu": 1, "node": 1, "leaf": 2, "spine": 3, "core": 4}
_LAYER_NAMES = {"nvswitch": "NVSwitch", "gpu": "GPUs", "node": "nodes", "switch": "switches"}
_PLURALS = {"nvswitch": "NVSwitches", "leaf": "leaves", "switch": "switches"}
_GAP = 0.8  # between the GPUs of two nodes, in GPUs


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """Links drawn as one line, both directions: bytes/s upwards and downwards now and as built, `count` each way."""

    below: str
    above: str
    tier: str
    count: int
    up: float
    down: float
    nominal: float
    latency: float
    efficiency: float
    degraded: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class Vertex:
    """A drawn part at (x, layer): its short label and its full name."""

    kind: str
    label: str
    name: str
    x: float
    y: int


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One row of the drawing."""

    name: str
    count: int


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What is drawn. `layers` by y from the bottom, `marks` names places on the x axis (nodes)."""

    vertices: dict[str, Vertex]
    bundles: tuple[Bundle, ...]
    layers: dict[int, Layer]
    marks: dict[float, str]
    width: float
    explanation: str


@dataclass
class _Merged:
    """A partition of the fabric's vertices: members and kind of every class, and the bundles between classes."""

    members: dict[str, list[str]]
    kind: dict[str, str]
    bundles: dict[tuple[str, str], Bundle]
    layer: dict[str, int] = field(default_factory=dict)


def fabric_picture(parts: FabricParts) -> Picture:
    """The finest drawing of a fabric in which every layer fits a page, or the coarsest there is."""
    for merged in _levels(parts):
        beside: dict[int, int] = defaultdict(int)
        for layer in merged.layer.values():
            beside[layer] += 1
        if max(beside.values()) <= _MOST_BESIDE and len(merged.bundles) <= MOST_BUNDLES:
            break
    return _place(parts, merged)


def _levels(parts: FabricParts) -> Iterator[_Merged]:
    merged = _unmerged(parts)
    yield merged
    if "switch" not in merged.kind.values():
        merged = _merge_nodes(parts, merged)
        yield merged
    for kind in ("gpu", "node", "nvswitch", "leaf", "spine", "switch"):
        if kind in merged.kind.values():
            merged = _merge_equal(merged, kind)
            yield merged


def _unmerged(parts: FabricParts) -> _Merged:
    """Every part for itself but the NICs, which are drawn as part of their GPUs' links."""
    gpu_of = {name: f"gpu{name[3:]}" if kind == "nic" else name for name, kind in parts.kind_of.items()}
    names = [name for name, kind in parts.kind_of.items() if kind != "nic"]
    layer = _layers(parts)
    inner = {(link.source, link.target): link for link in parts.links}
    bundles: dict[tuple[str, str], Bundle] = {}
    for link in parts.links:
        source, target = gpu_of[link.source], gpu_of[link.target]
        if source == target:  # GPU to its own NIC
            continue
        upwards = (layer[source], source) < (layer[target], target)
        low, high = (source, target) if upwards else (target, source)
        bandwidth, latency = link.bandwidth, link.latency
        for outer, own in ((link.source, source), (link.target, target)):
            if outer != own:  # a NIC: what is drawn is the way through it
                leg = inner[(own, outer) if outer == link.source else (outer, own)]
                bandwidth, latency = min(bandwidth, leg.bandwidth), latency + leg.latency
        single = Bundle(
            below=low, above=high, tier=link.tier, count=1,
            up=bandwidth if upwards else 0.0, down=0.0 if upwards else bandwidth, nominal=link.nominal,
            latency=latency, efficiency=link.efficiency,
            degraded=int(0 < bandwidth < link.nominal), failed=int(bandwidth == 0),
        )  # fmt: skip
        other = bundles.get((low, high))
        bundles[low, high] = single if other is None else _join(other, single, count=1, nominal=other.nominal)
    return _Merged({name: [name] for name in names}, {name: parts.kind_of[name] for name in names}, bundles, layer)


def _layers(parts: FabricParts) -> dict[str, int]:
    """The row of every vertex but NICs: by kind, or in a custom fabric by the hops from the next GPU."""
    if "switch" not in parts.kind_of.values():
        return {name: _LAYER.get(kind, 0) for name, kind in parts.kind_of.items() if kind != "nic"}
    near: dict[str, set[str]] = defaultdict(set)
    for link in parts.links:
        near[link.source].add(link.target)
        near[link.target].add(link.source)
    row = {name: 0 for name, kind in parts.kind_of.items() if kind == "gpu"}
    front = list(row)
    while front:
        front = sorted({other for name in front for other in near[name]} - row.keys())
        row |= dict.fromkeys(front, max(row.values()) + 1)
    return {name: row.get(name, max(row.values()) + 1) for name in parts.kind_of}


def _join(a: Bundle, b: Bundle, *, count: int, nominal: float) -> Bundle:
    """Two bundles drawn as one; the latency is the longest, the share reached the least."""
    return replace(
        a,
        count=count,
        nominal=nominal,
        up=a.up + b.up,
        down=a.down + b.down,
        latency=max(a.latency, b.latency),
        efficiency=min(a.efficiency, b.efficiency),
        degraded=a.degraded + b.degraded,
        failed=a.failed + b.failed,
    )


def _merge(merged: _Merged, class_of: dict[str, str], kind_of: dict[str, str]) -> _Merged:
    """Classes with one name become one; bundles inside a class disappear."""
    members: dict[str, list[str]] = defaultdict(list)
    for name, parts in merged.members.items():
        members[class_of[name]] += parts
    bundles: dict[tuple[str, str], Bundle] = {}
    for bundle in merged.bundles.values():
        low, high = class_of[bundle.below], class_of[bundle.above]
        if low == high:
            continue
        moved = replace(bundle, below=low, above=high)
        if (high, low) in bundles:  # between two vertices of one layer, which changed their order
            low, high = high, low
            moved = replace(bundle, below=low, above=high, up=bundle.down, down=bundle.up)
        other = bundles.get((low, high))
        if other is not None:
            moved = _join(other, moved, count=other.count + moved.count, nominal=other.nominal + moved.nominal)
        bundles[low, high] = moved
    kind = {new: kind_of.get(new, merged.kind.get(old, "")) for old, new in class_of.items()}
    layer = {new: merged.layer[old] for old, new in class_of.items()}
    layer |= {name: _LAYER["node"] for name, what in kind.items() if what == "node"}
    return _Merged(dict(members), kind, bundles, layer)


def _merge_nodes(parts: FabricParts, merged: _Merged) -> _Merged:
    """GPUs of a node become one, with their NVSwitch where it serves no other node."""
    class_of = {name: f"node{parts.node_of[name]}" if kind == "gpu" else name for name, kind in merged.kind.items()}
    nodes_of: dict[str, set[int]] = defaultdict(set)
    for below, above in merged.bundles:
        for switch, gpu in ((below, above), (above, below)):
            if merged.kind[switch] == "nvswitch":
                nodes_of[switch].add(parts.node_of[gpu])
    class_of |= {switch: f"node{min(nodes)}" for switch, nodes in nodes_of.items() if len(nodes) == 1}
    return _merge(merged, class_of, {name: "node" for name in class_of.values() if name.startswith("node")})


def _merge_equal(merged: _Merged, kind: str) -> _Merged:
    """Classes of one kind with equal neighbours, and equally whole links to them, become one."""
    sides: dict[str, set[tuple[str, bool, bool]]] = defaultdict(set)
    for (below, above), bundle in merged.bundles.items():
        state = (bundle.degraded > 0, bundle.failed > 0)
        sides[below].add((above, *state))
        sides[above].add((below, *state))
    first: dict[frozenset[tuple[str, bool, bool]], str] = {}
    class_of = {
        name: first.setdefault(frozenset(sides[name]), name) if merged.kind[name] == kind else name
        for name in merged.members
    }
    return _merge(merged, class_of, {})


def _natural(name: str) -> tuple[int | str, ...]:
    """Sort key by the numbers in a name: leaf0.2 before leaf0.10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def _place(parts: FabricParts, merged: _Merged) -> Picture:
    """Rows from the bottom: GPUs side by side with gaps between nodes, switches over the middle of what they join."""
    rows: dict[int, list[str]] = defaultdict(list)
    for name in merged.members:
        rows[merged.layer[name]].append(name)
    ground = _LAYER["gpu"] if _LAYER["gpu"] in rows and "switch" not in merged.kind.values() else 0
    x = _ground(parts, merged, sorted(rows[ground], key=_natural))
    width = max(x.values()) + 0.5
    near: dict[str, list[str]] = defaultdict(list)
    for below, above in merged.bundles:
        near[above].append(below)
        near[below].append(above)
    for row in sorted(rows, key=lambda row: (row < ground, row)):
        if row == ground:
            continue
        middle = {name: _mean([x[other] for other in near[name] if other in x], width / 2) for name in rows[row]}
        ordered = sorted(rows[row], key=lambda name: (round(middle[name], 6), _natural(name)))
        x |= {name: (index + 0.5) / len(ordered) * width for index, name in enumerate(ordered)}
        if row < ground:  # each NVSwitch under its own GPUs, which no other shares
            x |= {name: middle[name] for name in ordered if len(rows[row]) > 1}
    vertices = {name: _vertex(parts, merged, name, x[name]) for name in merged.members}
    return Picture(
        vertices=vertices,
        bundles=tuple(merged.bundles.values()),
        layers={row: Layer(name=_row_name(merged, names), count=len(names)) for row, names in sorted(rows.items())},
        marks=_node_marks(parts, merged, x),
        width=width,
        explanation=_explanation(parts, merged),
    )


def _mean(values: list[float], otherwise: float) -> float:
    return math.fsum(values) / len(values) if values else otherwise


def _ground(parts: FabricParts, merged: _Merged, names: list[str]) -> dict[str, float]:
    x, place, before = {}, 0.5, None
    for name in names:
        node = parts.node_of.get(name) if merged.kind[name] == "gpu" else None
        place += _GAP if before is not None and node != before else 0.0
        x[name], before = place, node
        place += 1.0
    return x


def _vertex(parts: FabricParts, merged: _Merged, name: str, x: float) -> Vertex:
    kind, members = merged.kind[name], merged.members[name]
    label = full = name
    if kind == "gpu" and len(members) == 1:
        label = name.removeprefix("gpu")
    elif kind == "node":
        gpus = [member for member in members if member.startswith("gpu")]
        nodes = len({parts.node_of[gpu] for gpu in gpus})
        label = name.removeprefix("node") if nodes == 1 else f"{nodes:,} nodes, {len(gpus):,} GPUs"
        full = f"{name}: {len(gpus)} GPUs" if nodes == 1 else f"{label}, first {name}"
    elif len(members) > 1:
        label = f"{len(members):,} {_PLURALS.get(kind, kind + 's')}"
        full = f"{label}, first {min(members, key=_natural)}"
    return Vertex(kind=kind, label=label, name=full, x=x, y=merged.layer[name])


def _row_name(merged: _Merged, names: list[str]) -> str:
    kind = merged.kind[names[0]]
    return _LAYER_NAMES.get(kind, kind)


def _node_marks(parts: FabricParts, merged: _Merged, x: dict[str, float]) -> dict[float, str]:
    """The middle of every node's GPUs, where single GPUs are drawn; else the axis stays empty."""
    places: dict[int, list[float]] = defaultdict(list)
    for name, members in merged.members.items():
        if merged.kind[name] == "gpu" and len(members) == 1:
            places[parts.node_of[name]].append(x[name])
    return {_mean(values, 0.0): str(node) for node, values in places.items()}


def _explanation(parts: FabricParts, merged: _Merged) -> str:
    """What stands for what."""
    sizes: dict[str, int] = defaultdict(int)
    for name, members in merged.members.items():
        kind = merged.kind[name]
        inside = {parts.node_of[member] for member in members if member in parts.node_of}
        sizes[kind] = max(sizes[kind], len(inside) if kind == "node" else len(members))
    drawn = "Every GPU is drawn" + ("." if "switch" in sizes else ", its NIC as part of its line to the network.")
    if "node" in sizes:
        drawn = "The GPUs of a node are drawn as one, with their NICs; a line stands for all their links."
    several = [_PLURALS.get(kind, kind + "s") for kind, size in sizes.items() if size > 1]
    if several:
        drawn += f" So are {' and '.join(several)} that join the same parts."
    return f"{drawn} Wider lines carry more; point at a line or a box for its numbers."
