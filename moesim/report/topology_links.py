"""The links of a fabric one by one: which are degraded or failed, and what is cut off.

Legend: X links.
"""

from dataclasses import dataclass

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


def fabric_parts(cluster: Cluster, fabric: Fabric | None = None) -> FabricParts:
    """The parts of a cluster's fabric; `fabric` spares building it again. Raises UserError as build_fabric does.

    What a degradation took is seen by building the same fabric without any.
    """
    fabric = fabric or build_fabric(cluster)
    healthy = fabric
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
