"""What a fabric is, for people: switches, links, bisection, oversubscription."""

from collections import Counter, defaultdict
from dataclasses import dataclass

import networkx as nx

from moesim.network.fabric import Fabric

_LAYERS = {"gpu": 1, "nvswitch": 0, "nic": 2, "leaf": 3, "spine": 4, "core": 5}


@dataclass(frozen=True, kw_only=True)
class LinkGroup:
    """Directed links that are alike: bandwidth in bytes/s, latency in seconds."""

    tier: str
    count: int
    bandwidth: float
    latency: float
    efficiency: float


@dataclass(frozen=True, kw_only=True)
class FabricFacts:
    """A fabric in numbers.

    `bisection` is the nominal bytes/s that one half of the nodes (of the GPUs where there is one node) can send to the
    other half, `oversubscription` the largest bandwidth below / above of each tier of switches.
    """

    preset: str
    num_gpus: int
    num_nodes: int
    switches: dict[str, int]
    links: tuple[LinkGroup, ...]
    bisection: float
    oversubscription: dict[str, float]


def describe(fabric: Fabric) -> FabricFacts:
    """Count and measure a fabric; failed links are left out."""
    kinds = nx.get_node_attributes(fabric.graph, "kind")
    values = zip(fabric.tier_X, fabric.bandwidth_X, fabric.latency_X, fabric.efficiency_X, strict=True)
    alike = Counter((tier, float(b), float(latency), float(share)) for tier, b, latency, share in values)
    return FabricFacts(
        preset=fabric.kind.name,
        num_gpus=fabric.num_ranks,
        num_nodes=int(fabric.node_of_rank_R.max()) + 1,
        switches=dict(Counter(kind for kind in kinds.values() if kind not in ("gpu", "nic"))),
        links=tuple(
            LinkGroup(tier=tier, count=count, bandwidth=b, latency=latency, efficiency=share)
            for (tier, b, latency, share), count in sorted(alike.items())
        ),
        bisection=_bisection(fabric),
        oversubscription=_oversubscription(fabric, kinds),
    )


def _bisection(fabric: Fabric) -> float:
    """Maximum flow from the first half to the second; GPUs of a half are one vertex, their own NICs are left out."""
    nodes = fabric.node_of_rank_R
    half = (int(nodes.max()) + 1) // 2
    first = nodes < half if half else fabric.rail_of_rank_R < len(nodes) // 2
    if first.all() or not first.any():
        return 0.0
    side = {f"gpu{rank}": "first" if is_first else "second" for rank, is_first in enumerate(first)}
    small: nx.DiGraph[str] = nx.DiGraph()
    small.add_nodes_from(["first", "second"])

    def add(source: str, target: str, bandwidth: float) -> None:
        source, target = side.get(source, source), side.get(target, target)
        if source != target:
            before = small.get_edge_data(source, target, {"capacity": 0.0})["capacity"]
            small.add_edge(source, target, capacity=before + bandwidth)

    graph = fabric.graph
    series = {name for name, data in graph.nodes(data=True) if data["kind"] == "nic" and graph.out_degree(name) <= 2}
    for source, target, data in graph.edges(data=True):
        if source in series:
            continue
        if target in series:
            for beyond in graph.successors(target):
                if beyond != source:
                    add(source, beyond, min(data["bandwidth"], graph.edges[target, beyond]["bandwidth"]))
        else:
            add(source, target, data["bandwidth"])
    return float(nx.maximum_flow_value(small, "first", "second"))


def _oversubscription(fabric: Fabric, kinds: dict[str, str]) -> dict[str, float]:
    below: dict[str, float] = defaultdict(float)
    above: dict[str, float] = defaultdict(float)
    for (source, target), bandwidth in zip(fabric.links, fabric.bandwidth_X.tolist(), strict=True):
        low, high = _LAYERS.get(kinds[source], -1), _LAYERS.get(kinds[target], -1)
        if high > low >= _LAYERS["nic"]:
            above[source] += bandwidth
            below[target] += bandwidth
    ratios: dict[str, float] = {}
    for switch, up in above.items():
        if kinds[switch] in ("leaf", "spine"):
            ratios[kinds[switch]] = max(ratios.get(kinds[switch], 0.0), below[switch] / up)
    return ratios
