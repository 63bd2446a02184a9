"""The fabric as arrays: links with bandwidth, latency and efficiency, and the route of every pair of GPUs.

Legend: X links, V graph nodes, R ranks (GPUs in rank order, node-major), F flows, P hops (padded with -1), Q = F*P,
U distinct links.
"""

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.network.ladder import NONE, Ladder, build_ladder
from moesim.network.parameters import NetworkParameters
from moesim.network.shortest_routes import ShortestRoutes, SplitRoutes
from moesim.network.topology import Site, build_graph, sites_of
from moesim.scenario.cluster import TRANSPORTS, Cluster, FabricKind
from moesim.scenario.dispatch import DispatchAlgorithm, Kernel, rate_of_both
from moesim.scenario.failures import Degraded

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int32]
IntegerArray = NDArray[np.integer]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fabric:
    """Links and routes of one cluster.

    `bandwidth_X` (bytes/s, degradations applied) times `efficiency_X` is `capacity_X`, what long transfers share: of
    NCCL, or (`stated_X`) of all software, where the scenario states it.
    `redundant_X` marks links that can never be the only bottleneck, because the links before or behind them on every
    route carry less together. `graph` has failed links taken out. `node_of_rank_R` and `rail_of_rank_R` are the node
    and the index in the node, `domain_of_rank_R` the NVLink domain (differs from the node in nvl72).
    """

    graph: "nx.DiGraph[str]"
    links: tuple[tuple[str, str], ...]
    bandwidth_X: FloatArray
    latency_X: FloatArray
    efficiency_X: FloatArray
    stated_X: NDArray[np.bool_]
    capacity_X: FloatArray
    redundant_X: NDArray[np.bool_]
    tier_X: tuple[str, ...]
    node_of_rank_R: IntArray
    rail_of_rank_R: IntArray
    domain_of_rank_R: IntArray
    gpus: tuple[str, ...]
    nccl: tuple[str | None, ...]
    parameters: NetworkParameters
    kind: FabricKind
    pxn: bool
    multipath: bool
    ladder: Ladder | None = field(repr=False)
    shortest_routes: ShortestRoutes = field(repr=False)
    # What the functions of these names and contention.common_use found on these links; a copy with others has none.
    pair_ports: dict[tuple[bytes, bool], object] = field(init=False, repr=False, default_factory=dict)
    flow_ports: dict[tuple[bytes, bool, bytes], object] = field(init=False, repr=False, default_factory=dict)
    common_hops: dict[tuple[bytes, ...], tuple[IntegerArray, IntegerArray, FloatArray]] = field(
        init=False, repr=False, default_factory=dict
    )

    _reached: dict[tuple[float, float, float, float], "Fabric"] = field(init=False, repr=False, default_factory=dict)

    @property
    def is_rack_scale(self) -> bool:
        """Whether NVLink joins the trays of a rack, so that nothing within it needs a NIC."""
        return self.kind.rack_gpus is not None

    def reached_by(
        self, algorithm: DispatchAlgorithm, kernel: Kernel, *, row_bytes: float, sms: float | None = None
    ) -> "Fabric":
        """The links as the software of a dispatch algorithm finds them: with the shares of bandwidth that it reaches.

        `row_bytes`: of what `kernel` sends at once. `sms`: those of each GPU that it holds, where the scenario says so.
        Links whose share the scenario states are the same for everybody.
        """
        sms = algorithm.sms if sms is None else sms
        nvlink, nic = algorithm.nvlink_share, algorithm.nic_share if kernel.nic_share is None else kernel.nic_share
        limits = [kernel.rate] if kernel.rate else []
        if sms:
            limits.append(sms * kernel.of_one_sm(row_bytes, usual=self.parameters.bytes_per_sm))
        sharpness = algorithm.sharpness or self.parameters.sm_sharpness
        # -1: NCCL's, or nothing but the port
        key = (-1.0 if nvlink is None else nvlink, -1.0 if nic is None else nic, min(limits, default=-1.0), sharpness)
        if key[:3] == (-1.0, -1.0, -1.0):
            return self
        if key not in self._reached:
            is_nvlink_X = np.array([tier == "nvlink" for tier in self.tier_X], dtype=bool)
            own_X = np.where(is_nvlink_X, key[0], key[1])
            share_X = np.where(self.stated_X | (own_X < 0), self.efficiency_X, own_X)
            if limits:
                for link in np.flatnonzero(is_nvlink_X & ~self.stated_X):
                    whole = float(self.bandwidth_X[link])
                    port = float(share_X[link]) * whole
                    share_X[link] = rate_of_both(port, key[2], sharpness=sharpness) / whole
            self._reached[key] = replace(self, efficiency_X=share_X, capacity_X=self.bandwidth_X * share_X)
        return self._reached[key]

    def nccl_kind(self, ranks_R: IntegerArray) -> str | None:
        """The kind of GPU whose tables of NCCL's calls hold among these ranks; None where none does.

        They must be alike in one NVLink domain, with links whose share the scenario does not state.
        """
        if not self.parameters.by_gpu or not self.are_equal(ranks_R):
            return None
        return self.nccl[int(ranks_R[0])]

    def are_equal(self, ranks_R: IntegerArray) -> bool:
        """Whether these ranks are GPUs of one kind in one NVLink domain whose share the scenario does not state."""
        if self.kind.listed or self._states_nvlink or len(ranks_R) < 2:
            return False
        if (self.domain_of_rank_R[ranks_R] != self.domain_of_rank_R[ranks_R[0]]).any():
            return False
        return len({self.nccl[rank] for rank in ranks_R.tolist()}) == 1

    @cached_property
    def _states_nvlink(self) -> bool:
        return any(
            stated and tier == "nvlink" for stated, tier in zip(self.stated_X.tolist(), self.tier_X, strict=True)
        )

    @property
    def num_ranks(self) -> int:
        """GPUs of the fabric."""
        return len(self.node_of_rank_R)

    @cached_property
    def core_can_block(self) -> bool:
        """Whether links that GPUs share can be a bottleneck: `ports` may then be short by a fifth, `fluid` is not."""
        return (self.ladder is not None and self.ladder.shares_nics) or any(
            tier in ("leaf", "spine", "custom")
            for tier, spare in zip(self.tier_X, self.redundant_X, strict=True)
            if not spare
        )

    @cached_property
    def upper_links_are_redundant(self) -> bool:
        """Whether no link above the NICs' can be a bottleneck; False without a ladder."""
        if self.ladder is None:
            return False
        ladder = self.ladder
        upper = np.concatenate([ladder.leaf_up_R, ladder.leaf_down_R, ladder.spine_up_R, ladder.spine_down_R])
        return bool(np.append(self.redundant_X, True)[upper].all())

    @cached_property
    def _is_port_X(self) -> NDArray[np.bool_]:
        """Whether a link is that of one GPU."""
        own_nic = self.ladder is not None and not self.ladder.shares_nics

        def is_port(link: tuple[str, str]) -> bool:
            kinds = {self.graph.nodes[end]["kind"] for end in link}
            return "gpu" in kinds or (own_nic and "nic" in kinds)

        return np.array([is_port(link) for link in self.links], dtype=bool)

    @cached_property
    def common_links_X(self) -> NDArray[np.intp]:
        """Links that can be a bottleneck and are no port of one GPU: what groups of ranks can share."""
        return np.flatnonzero(~self.redundant_X & ~self._is_port_X)

    @cached_property
    def port_links_KW(self) -> NDArray[np.intp]:
        """The links of every rank that can be a bottleneck and are its own, padded with -1: [most of a rank, ranks].

        A link from GPU to GPU is that of the first.
        """
        number = {f"gpu{rank}": rank for rank in range(self.num_ranks)}
        behind = {nic: number[gpu] for gpu in number for nic in self.graph.successors(gpu) if nic not in number}
        behind |= {nic: number[gpu] for gpu in number for nic in self.graph.predecessors(gpu) if nic not in number}
        of_rank: list[list[int]] = [[] for _ in number]
        for link in np.flatnonzero(~self.redundant_X & self._is_port_X).tolist():
            source, target = self.links[link]
            owners = [of[end] for of in (number, behind) for end in (source, target) if end in of]
            if owners:
                of_rank[owners[0]].append(link)
        links_KW = np.full((max(1, *map(len, of_rank)), len(of_rank)), NONE, dtype=np.intp)
        for rank, links in enumerate(of_rank):
            links_KW[: len(links), rank] = links
        return links_KW

    def routes(
        self, sources_F: NDArray[np.integer], targets_F: NDArray[np.integer], *, avoid_nvlink: bool = False
    ) -> IntArray:
        """Links of each flow in order of travel, int32 [F, P], padded with -1.

        `avoid_nvlink` sends flows inside a node through their NICs, where there are any. A route that loses a link to
        a failure takes a shortest way around it. Raises UserError where there is none.
        """
        if self.ladder is None:
            return self.shortest_routes.routes(sources_F, targets_F)
        path_FP = self.ladder.routes(sources_F, targets_F, avoid_nvlink=avoid_nvlink, pxn=self.pxn)
        broken_F = (path_FP == self.ladder.failed).any(axis=1) if self.ladder.any_failed else np.zeros(0, bool)
        if broken_F.any():
            detour_BP = self.shortest_routes.routes(sources_F[broken_F], targets_F[broken_F])
            width = max(path_FP.shape[1], detour_BP.shape[1])
            path_FP = np.pad(path_FP, ((0, 0), (0, width - path_FP.shape[1])), constant_values=NONE)
            path_FP[broken_F] = NONE
            path_FP[broken_F, : detour_BP.shape[1]] = detour_BP
        return path_FP

    def split_routes(
        self, sources_F: NDArray[np.integer], targets_F: NDArray[np.integer], *, avoid_nvlink: bool = False
    ) -> SplitRoutes:
        """`routes`, or with `multipath` all equal ones with each flow's bytes parted among them."""
        if self.multipath:
            return self.shortest_routes.all_routes(sources_F, targets_F)
        path_FP = self.routes(sources_F, targets_F, avoid_nvlink=avoid_nvlink)
        return SplitRoutes(path_FP, np.arange(len(path_FP)), np.ones(len(path_FP)))

    def path_latency(self, path_FP: IntArray) -> FloatArray:
        """Seconds of latency along each route."""
        latency = np.append(self.latency_X, 0.0)  # index -1 reads the 0
        total_F = np.zeros(len(path_FP))
        for hop in range(path_FP.shape[1]):
            total_F += latency[path_FP[:, hop]]
        return total_F


def build_fabric(cluster: Cluster, *, parameters: NetworkParameters | None = None) -> Fabric:
    """The fabric of a scenario's cluster section, GPU i of the cluster being rank i (node-major).

    Raises UserError for a preset that does not fit the nodes, and for a degraded link, node or rail that is not there.
    """
    parameters = (parameters or NetworkParameters()).over(TRANSPORTS[cluster.fabric.transport])
    sites = sites_of(cluster)
    graph = build_graph(cluster, sites, parameters)
    for change in cluster.fabric.degraded:
        _degrade(graph, change, sites)
    failed = {edge for edge in graph.edges if graph.edges[edge]["bandwidth"] == 0}
    graph.remove_edges_from(failed)
    links = tuple(graph.edges)
    attributes = [graph.edges[link] for link in links]
    bandwidth_X, latency_X, efficiency_X = (
        np.array([a[key] for a in attributes], dtype=np.float64) for key in ("bandwidth", "latency", "efficiency")
    )
    capacity_X = bandwidth_X * efficiency_X
    return Fabric(
        graph=graph,
        links=links,
        bandwidth_X=bandwidth_X,
        latency_X=latency_X,
        efficiency_X=efficiency_X,
        stated_X=np.array([a["stated"] for a in attributes], dtype=bool),
        capacity_X=capacity_X,
        redundant_X=_redundant_links(graph, links, capacity_X),
        tier_X=tuple(a["tier"] for a in attributes),
        node_of_rank_R=np.array([site.node for site in sites], dtype=np.int32),
        rail_of_rank_R=np.array([site.rail for site in sites], dtype=np.int32),
        domain_of_rank_R=np.array([site.domain for site in sites], dtype=np.int32),
        gpus=tuple(site.gpu for site in sites),
        nccl=tuple(site.nccl for site in sites),
        parameters=parameters,
        kind=cluster.fabric_kind,
        pxn=cluster.fabric.pxn,
        multipath=cluster.fabric.multipath,
        ladder=None if cluster.fabric_kind.listed else build_ladder(sites, links, failed),
        shortest_routes=ShortestRoutes(graph, links, len(sites)),
    )


def _degrade(graph: "nx.DiGraph[str]", change: Degraded, sites: list[Site]) -> None:
    if sum(target is not None for target in (change.link, change.node, change.rail)) != 1:
        raise UserError("cluster.fabric.degraded: each entry names exactly one of link, node or rail")
    if change.link is not None:
        if not graph.has_edge(*change.link):
            raise UserError(
                f"cluster.fabric.degraded: no link {change.link[0]} -> {change.link[1]}; moesim topology lists them"
            )
        edges = [change.link]
    else:
        hit = [s for s in sites if change.node in (None, s.node) and change.rail in (None, s.rail)]
        if not hit:
            what, which = ("node", change.node) if change.node is not None else ("rail", change.rail)
            raise UserError(f"cluster.fabric.degraded: there is no {what} {which}; count from 0")
        # A node is degraded with all its links, a rail in the network only: NVLink has no rails.
        names = {site.nic_name for site in hit}
        if change.node is not None:
            names |= {f"gpu{site.rank}" for site in hit}
        edges = [edge for edge in graph.edges if names & set(edge)]
    for edge in edges:
        graph.edges[edge]["bandwidth"] *= change.factor


def _redundant_links(
    graph: "nx.DiGraph[str]", links: tuple[tuple[str, str], ...], capacity_X: FloatArray
) -> NDArray[np.bool_]:
    """Links out of a switch that carry all that can enter it, and links into a switch that carry all that can leave.

    Traffic starts and ends at GPUs only. A link is judged by links that stay, or by a chain of redundant ones that ends
    at such; a cycle of redundant links, none of which leads straight back, would break the chain, then all stay.
    """
    into: dict[str, float] = dict.fromkeys(graph, 0.0)
    out_of: dict[str, float] = dict.fromkeys(graph, 0.0)
    capacity = dict(zip(links, capacity_X.tolist(), strict=True))
    for (source, target), value in capacity.items():
        into[target] += value
        out_of[source] += value

    def carries(link: tuple[str, str], total: float) -> bool:
        reverse = capacity.get((link[1], link[0]), 0.0)  # no route turns back
        return bool(capacity[link] >= (total - reverse) * (1 - 1e-12))

    switch = {name: data["kind"] != "gpu" for name, data in graph.nodes(data=True)}
    behind = {link for link in links if switch[link[0]] and carries(link, into[link[0]])}
    behind_out = Counter(source for source, _ in behind)
    before = {
        link
        for link in links
        if link not in behind
        and switch[link[1]]
        and behind_out[link[1]] == ((link[1], link[0]) in behind)
        and carries(link, out_of[link[1]])
    }
    # `before` leans on no link of `behind` but its own reverse, so a chain of redundant links stays within one set.
    redundant = {
        link for chosen in (behind, before) if nx.is_directed_acyclic_graph(_following(chosen)) for link in chosen
    }
    return np.array([link in redundant for link in links], dtype=np.bool_)


def _following(links: set[tuple[str, str]]) -> "nx.DiGraph[tuple[str, str]]":
    """Which of some links comes behind which on a route, that does not turn back."""
    into: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
    for link in links:
        into[link[1]].append(link)
    follows: nx.DiGraph[tuple[str, str]] = nx.DiGraph()
    follows.add_edges_from((before, link) for link in links for before in into[link[0]] if before[0] != link[1])
    return follows


def group_shape(fabric: Fabric, ranks_R: NDArray[np.int64]) -> bytes:
    """Equal for two groups where equal byte matrices take equal times in every model of sharing.

    A digest of all routes between the ranks with links numbered by first use, of what these links are, and of the
    ranks' nodes. On a custom fabric, where routes are searched for, and beside failed links every group is its own.
    """
    digest = hashlib.sha256(np.unique(fabric.domain_of_rank_R[ranks_R], return_inverse=True)[1].tobytes())
    if fabric.ladder is None or fabric.ladder.any_failed:
        digest.update(np.ascontiguousarray(ranks_R).tobytes())
        return digest.digest()
    source_F, target_F = np.nonzero(~np.eye(len(ranks_R), dtype=bool))
    for avoid_nvlink in (False, True):
        path_FP = fabric.routes(ranks_R[source_F], ranks_R[target_F], avoid_nvlink=avoid_nvlink)
        link_Q = path_FP.ravel()
        place_Q = np.arange(len(link_Q))
        first_X = np.empty(len(fabric.links) + 1, dtype=np.int64)  # of links that are used: the last entry is NONE's
        first_X[link_Q[::-1]] = place_Q[::-1]
        first_Q = first_X[link_Q]
        is_first_Q = first_Q == place_Q
        number_Q = np.cumsum(is_first_Q, dtype=np.int32) - 1
        links_U = link_Q[is_first_Q]
        digest.update(number_Q[first_Q].tobytes())
        for kind_X, none in (
            (fabric.capacity_X, np.inf),
            (fabric.latency_X, 0.0),
            (fabric.redundant_X.astype(np.float64), -1.0),
        ):
            digest.update(np.where(links_U == NONE, none, kind_X[links_U]).tobytes())
    return digest.digest()
