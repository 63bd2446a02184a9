"""The fabric as a graph: GPUs, NVSwitches, NICs, leaves, spines and the directed links between them.

Node names: gpu<rank>, nvswitch<domain>, nic<rank of its first GPU>, leaf<pod>.<rail>, spine<pod>, core. A leaf's links
to its spine are one link of their summed bandwidth, as ideal load balancing makes of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import networkx as nx

from moesim.errors import UserError
from moesim.network.nccl import kind_of
from moesim.network.parameters import NetworkParameters
from moesim.scenario.base import link_bandwidth, link_latency
from moesim.scenario.cluster import Cluster, Fabric, FabricKind, Oversubscription, kinds_with
from moesim.strict_json import parse_json


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where one GPU sits: its node, rail (index in the node), NVLink domain and pod, what it is, and its NVLink.

    `nccl` is the kind of GPU whose table of NCCL's calls holds (`moesim.network.nccl`). `nic` counts the node's NICs
    from 0 (GPUs next to each other share one), `nic_rank` is the first GPU on it; `leaf`, `spine` and `plane` are the
    switches and the network above it.
    """

    rank: int
    gpu: str
    nccl: str | None
    nvlink: float  # bytes/s in one direction
    nic_bandwidth: float | None  # of its port, likewise; None: the fabric's
    node: int
    node_size: int
    rail: int
    domain: int
    pod: int
    nic: int
    nic_rank: int
    leaf: str
    spine: str
    plane: int

    @property
    def nic_name(self) -> str:
        """The graph node of its NIC."""
        return f"nic{self.nic_rank}"


def sites_of(cluster: Cluster) -> list[Site]:
    """Every GPU in rank order: pool by pool, node by node. Raises UserError where a domain does not fit the nodes."""
    fabric, kind = cluster.fabric, cluster.fabric_kind
    sites: list[Site] = []
    node = domain = 0
    pod_nodes, planes = fabric.pod_nodes or kind.pod_nodes, fabric.planes
    for pool in cluster.pools:
        domain_nodes = cluster.trays_per_domain(pool)
        sharing = _gpus_per_nic(fabric, kind, pool.gpus_per_node)
        spec = pool.spec
        nccl = kind_of(spec.name, spec.scaled_from)
        nvlink = spec.nvlink_bandwidth if fabric.nvlink is None else fabric.nvlink
        for index in range(pool.nodes):
            pod = node // pod_nodes if pod_nodes else 0
            for rail in range(pool.gpus_per_node):
                nic = rail // sharing
                sites.append(
                    Site(
                        rank=len(sites), gpu=spec.name, nccl=nccl, nvlink=nvlink, nic_bandwidth=pool.nic, node=node,
                        node_size=pool.gpus_per_node, rail=rail, domain=domain + index // domain_nodes, pod=pod,
                        nic=nic, nic_rank=len(sites) - rail % sharing, leaf=kind.leaf(nic, pod=pod, planes=planes),
                        spine=kind.spine(nic, pod=pod, planes=planes), plane=kind.plane(nic, planes=planes),
                    )
                )  # fmt: skip
            node += 1
        domain += -(-pool.nodes // domain_nodes)
    return sites


def _gpus_per_nic(fabric: Fabric, kind: FabricKind, gpus_per_node: int) -> int:
    """GPUs that share a NIC. Raises UserError where the node's GPUs cannot be shared out evenly."""
    if fabric.nics_per_node is None:
        return 1
    if not kind.has_network:
        what = f"nics_per_node = {fabric.nics_per_node} needs a preset with NICs, not {kind.name}"
        raise UserError(f"cluster.fabric: {what}; drop it")
    if gpus_per_node % fabric.nics_per_node:
        fits = ", ".join(str(n) for n in range(1, gpus_per_node + 1) if gpus_per_node % n == 0)
        raise UserError(
            f"cluster.fabric: nics_per_node = {fabric.nics_per_node} does not divide gpus_per_node = {gpus_per_node}; "
            f"use one of {fits}"
        )
    return gpus_per_node // fabric.nics_per_node


def build_graph(cluster: Cluster, sites: list[Site], parameters: NetworkParameters) -> "nx.DiGraph[str]":
    """The fabric of the cluster section. Edges carry bandwidth (bytes/s), latency (s), efficiency and tier."""
    fabric, kind = cluster.fabric, cluster.fabric_kind
    graph = _listed_graph(fabric, sites) if kind.listed else _built_graph(fabric, kind, sites, parameters)
    if fabric.multipath and not kind.listed:
        what = f"multipath needs preset {kinds_with('listed')}, not {kind.name}"
        raise UserError(f"cluster.fabric: {what}, where a leaf's links to its spine are one of their sum; drop it")
    for link in graph.edges.values():
        link["bandwidth"] *= fabric.bandwidth_factor
    return graph


def _built_graph(
    fabric: Fabric, kind: FabricKind, sites: list[Site], parameters: NetworkParameters
) -> "nx.DiGraph[str]":
    graph: nx.DiGraph[str] = nx.DiGraph()
    _add_nvlink(graph, fabric, sites, parameters)
    _check_keys(fabric, kind, sites)
    if kind.has_network:
        _add_network(graph, fabric, kind, sites, parameters)
    return graph


def _check_keys(fabric: Fabric, kind: FabricKind, sites: list[Site]) -> None:
    if not kind.has_network and sites[-1].node > 0:
        raise UserError(f"cluster.fabric: preset {kind.name} joins no nodes; use rail_optimised for nodes > 1")
    nics = {s.node_size if fabric.nics_per_node is None else fabric.nics_per_node for s in sites}
    if kind.has_planes and (fabric.planes < 2 or any(count % fabric.planes for count in nics)):
        owners = "gpus_per_node" if fabric.nics_per_node is None else f"nics_per_node = {fabric.nics_per_node}"
        raise UserError(f"cluster.fabric: {kind.name} needs planes >= 2 that divide {owners}, e.g. planes: {max(nics)}")
    if not kind.has_planes and fabric.planes != 1:
        able = kinds_with("has_planes")
        raise UserError(f"cluster.fabric: planes = {fabric.planes} needs preset {able}, not {kind.name}")
    if oversubscription_of(fabric).spine != 1 and (kind.one_spine or sites[-1].pod == 0):
        raise UserError(
            "cluster.fabric: oversubscription.spine needs a tier above the spine: preset rail_optimised or nvl72 with "
            "pod_nodes below the number of nodes"
        )


def oversubscription_of(fabric: Fabric) -> Oversubscription:
    """Both tiers; a plain number is the leaf's."""
    ratio = fabric.oversubscription
    return ratio if isinstance(ratio, Oversubscription) else Oversubscription(leaf=ratio)


class _Reached(NamedTuple):
    """The share of the bandwidth that long transfers reach, and whether the scenario states it for all software."""

    efficiency: float
    stated: bool

    @classmethod
    def of(cls, scenario: float | None, library: float) -> "_Reached":
        return cls(library if scenario is None else scenario, scenario is not None)


def _both(
    graph: "nx.DiGraph[str]", below: str, above: str, *, tier: str, bandwidth: float, latency: float, reached: _Reached
) -> None:
    efficiency, stated = reached
    for source, target in ((below, above), (above, below)):
        graph.add_edge(
            source, target, bandwidth=bandwidth, latency=latency, efficiency=efficiency, stated=stated, tier=tier
        )


def _add_nvlink(graph: "nx.DiGraph[str]", fabric: Fabric, sites: list[Site], parameters: NetworkParameters) -> None:
    latency = parameters.nvlink_latency if fabric.nvlink_latency is None else fabric.nvlink_latency
    reached = _Reached.of(fabric.nvlink_efficiency, parameters.nvlink_efficiency)
    for site in sites:
        graph.add_node(f"gpu{site.rank}", kind="gpu", node=site.node)
        graph.add_node(f"nvswitch{site.domain}", kind="nvswitch", node=site.node)
        _both(graph, f"gpu{site.rank}", f"nvswitch{site.domain}", tier="nvlink", bandwidth=site.nvlink, latency=latency,
              reached=reached)  # fmt: skip


def _add_network(
    graph: "nx.DiGraph[str]", fabric: Fabric, kind: FabricKind, sites: list[Site], parameters: NetworkParameters
) -> None:
    usual = parameters.nic_bandwidth if fabric.nic is None else fabric.nic
    nic_latency = parameters.nic_latency if fabric.nic_latency is None else fabric.nic_latency
    leaf_latency = parameters.leaf_latency if fabric.leaf_latency is None else fabric.leaf_latency
    reached = _Reached.of(fabric.nic_efficiency, parameters.nic_efficiency)
    ratio = oversubscription_of(fabric)
    below: dict[str, float] = {}
    parent: dict[str, str] = {}
    for site in sites:
        gpu, nic, leaf, spine = f"gpu{site.rank}", site.nic_name, site.leaf, site.spine
        bandwidth = usual if site.nic_bandwidth is None else site.nic_bandwidth
        graph.add_node(nic, kind="nic", node=site.node)
        graph.add_node(leaf, kind="leaf")
        # The NIC's latency counts the way between GPU and NIC too, which is never slower than the port.
        _both(graph, gpu, nic, tier="nic", bandwidth=bandwidth, latency=0.0, reached=reached)
        if site.rank != site.nic_rank:
            continue
        _both(graph, nic, leaf, tier="nic", bandwidth=bandwidth, latency=nic_latency, reached=reached)
        below[leaf] = below.get(leaf, 0.0) + bandwidth
        parent[leaf] = spine
    for leaf, spine in parent.items():
        graph.add_node(spine, kind="spine")
        up = below[leaf] / ratio.leaf
        _both(graph, leaf, spine, tier="leaf", bandwidth=up, latency=leaf_latency, reached=reached)
        below[spine] = below.get(spine, 0.0) + up
    if not kind.one_spine and sites[-1].pod > 0:
        graph.add_node("core", kind="core")
        for spine in dict.fromkeys(parent.values()):
            up = below[spine] / ratio.spine
            _both(graph, spine, "core", tier="spine", bandwidth=up, latency=leaf_latency, reached=reached)


def _listed_graph(fabric: Fabric, sites: list[Site]) -> "nx.DiGraph[str]":
    if bool(fabric.links) == bool(fabric.file):
        raise UserError("cluster.fabric: preset custom needs either links or file (a networkx node-link JSON)")
    graph: nx.DiGraph[str] = nx.DiGraph()
    for source, target, bandwidth, latency in _file_links(fabric.file) if fabric.file else _listed_links(fabric):
        where = "file" if fabric.file else "links"
        if source == target:
            raise UserError(f"cluster.fabric.{where}: {source} -> {target} leads nowhere; name two ends")
        if graph.has_edge(source, target):
            raise UserError(
                f"cluster.fabric.{where}: {source} -> {target} is given twice (both: true gives the way back, too); "
                "give it once, with the bandwidth of all"
            )
        graph.add_edge(source, target, bandwidth=bandwidth, latency=latency, efficiency=1.0, stated=True, tier="custom")
    for name in graph:
        graph.nodes[name]["kind"] = "gpu" if name.startswith("gpu") and name[3:].isdigit() else "switch"
    for site in sites:
        if f"gpu{site.rank}" not in graph:
            raise UserError(
                f"cluster.fabric: no link reaches gpu{site.rank}; GPUs are named gpu0 to gpu{len(sites) - 1}"
            )
    return graph


def _listed_links(fabric: Fabric) -> Iterator[tuple[str, str, float, float]]:
    for link in fabric.links:
        yield link.source, link.target, link.bandwidth, link.latency
        if link.both:
            yield link.target, link.source, link.bandwidth, link.latency


def _file_links(path: str) -> Iterator[tuple[str, str, float, float]]:
    try:
        data = parse_json(Path(path).read_text(encoding="utf-8"))
        links = data.get("links", data.get("edges")) if isinstance(data, dict) else None
        if not isinstance(links, list) or not links:
            raise ValueError('no "links" list; write it with networkx.node_link_data')
        for index, link in enumerate(links):
            if not isinstance(link, dict) or not {"source", "target", "bandwidth"} <= link.keys():
                raise ValueError(f"links[{index}] needs source, target and bandwidth")
            try:
                bandwidth, latency = link_bandwidth(link["bandwidth"]), link_latency(link.get("latency", "0 s"))
            except ValueError as error:
                raise ValueError(f"links[{index}]: {error}") from None
            yield str(link["source"]), str(link["target"]), bandwidth, latency
            if not data.get("directed", False):
                yield str(link["target"]), str(link["source"]), bandwidth, latency
    except OSError as error:
        raise UserError(
            f"cluster.fabric.file: cannot read {path}: {error.strerror}; give the path of a JSON file"
        ) from error
    except ValueError as error:
        raise UserError(f"cluster.fabric.file: {path}: {error}") from error
