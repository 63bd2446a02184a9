"""Collectives of equal shares: all-reduce, reduce-scatter, all-gather, and one message from rank to rank.

A ring step moves bytes from every rank to the next: along the node over NVLink, and to the next node over all NICs of
the node's ranks at once (as many channels as NICs). The slowest link of that pattern sets the bandwidth. A chunk passes
all hops of the ring but one, one behind the other: of a ring over several nodes few of them are NICs'. A tree is one of
nodes, with a chain of ranks in each. Of calls across nodes no sizes were measured: they lose between small and large
messages what they lose inside one node.

Legend: X links, F flows of the pattern, R ranks.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.network.contention import LinkUse, common_use
from moesim.network.fabric import Fabric
from moesim.network.flows import Ranks, as_ranks, checked_bytes
from moesim.network.ladder import NONE
from moesim.network.nccl import NVLS_MIN_RANKS, hop_seconds, measured_call, reduces_in_switch
from moesim.network.parameters import Evidence, Protocol

Algorithm = Literal["auto", "ring", "tree", "nvls", "hierarchical"]
HalfRing = Literal["reduce_scatter", "all_gather"]
HALF_RINGS: tuple[HalfRing, ...] = ("reduce_scatter", "all_gather")


class CollectiveEstimate(NamedTuple):
    """Seconds of one call on every rank, the algorithm that was taken, and where the numbers come from."""

    seconds: float
    algorithm: str
    source: str
    evidence: Evidence = Evidence.NONE


_NOTHING = CollectiveEstimate(0.0, "none", "nothing to do")


class _Pattern(NamedTuple):
    """What one step costs: seconds per byte of each rank's share, and the latency of its slowest hop."""

    seconds_per_byte: float
    latency: float


class _Hops(NamedTuple):
    """Latencies of a hop between nodes (the slowest) and of one inside a node, and how many there are in the ring."""

    between: float
    inside: float
    nodes: int
    ranks: int

    @property
    def ring(self) -> float:
        """Seconds that a chunk takes round the ring, all but its shortest hop."""
        if self.nodes == 1:
            return (self.ranks - 1) * self.inside
        inside = self.ranks - self.nodes
        shortest = min(self.between, self.inside) if inside else self.between
        return self.nodes * self.between + inside * self.inside - shortest

    @property
    def tree(self) -> float:
        """Seconds from the leaves of a tree of nodes to its root, through the chain of ranks in a node of each."""
        if self.nodes == 1:
            return math.ceil(math.log2(self.ranks)) * self.inside
        return math.ceil(math.log2(self.nodes)) * self.between + (math.ceil(self.ranks / self.nodes) - 1) * self.inside


def all_reduce_seconds(
    fabric: Fabric, ranks: Ranks, num_bytes: float, *, algorithm: Algorithm = "auto"
) -> CollectiveEstimate:
    """Sum of `num_bytes` on every rank of `ranks`, left on all of them.

    ring: 2 (n-1) steps of bytes/n. tree: pipelined up and down, 2 ceil(log2 n) hops, bytes twice over the slowest
    link. nvls: the switch reduces and broadcasts, bytes (1 + 1/n) per port. hierarchical: reduce-scatter in each node,
    all-reduce of the shares across nodes, all-gather in the node. auto: the fastest that the ranks allow, as NCCL's
    tuner does. Raises UserError for an algorithm that these ranks cannot run.
    """
    chosen = as_ranks(fabric, ranks)
    if len(chosen) == 1 or checked_bytes(num_bytes) == 0:
        return _NOTHING
    if algorithm != "auto":
        if algorithm not in _ALL_REDUCE:
            raise UserError(f'all-reduce: algorithm "{algorithm}" is unknown; use auto, {", ".join(_ALL_REDUCE)}')
        return _ALL_REDUCE[algorithm](fabric, chosen, num_bytes)
    able = [name for name in _ALL_REDUCE if _able(name, fabric, chosen)]
    if measured_call(fabric, "all_reduce", chosen) is not None:  # what the library chose is in its table
        able = ["nvls" if "nvls" in able else "ring"]
    return min((_ALL_REDUCE[name](fabric, chosen, num_bytes) for name in able), key=lambda estimate: estimate.seconds)


def reduce_scatter_seconds(fabric: Fabric, ranks: Ranks, num_bytes: float) -> CollectiveEstimate:
    """Ring reduce-scatter: `num_bytes` on every rank before, num_bytes / n after; n - 1 steps."""
    return _half_ring(fabric, as_ranks(fabric, ranks), num_bytes, "reduce_scatter")


def all_gather_seconds(fabric: Fabric, ranks: Ranks, num_bytes: float) -> CollectiveEstimate:
    """Ring all-gather: num_bytes / n on every rank before, `num_bytes` after; n - 1 steps."""
    return _half_ring(fabric, as_ranks(fabric, ranks), num_bytes, "all_gather")


def all_to_all_seconds(fabric: Fabric, ranks: Ranks, num_bytes: float) -> CollectiveEstimate:
    """An exchange in which every rank sends `num_bytes` / n to each of n, of which its own stay.

    Right inside one NVLink domain; across nodes the slowest hop of a ring stands for what each pair shares.
    """
    chosen = as_ranks(fabric, ranks)
    n = len(chosen)
    if n == 1 or checked_bytes(num_bytes) == 0:
        return _NOTHING
    sent, pattern = (n - 1) / n * num_bytes, _ring_pattern(fabric, chosen)
    protocol = measured_call(fabric, "all_to_all", chosen) or fabric.parameters.point_to_point
    return _estimate(protocol, "all_to_all", sent, sent * pattern.seconds_per_byte, 1, pattern.latency, messages=0)


def crowded(fabric: Fabric, members: Sequence[NDArray[np.int64]]) -> Fabric:
    """The links as the first of `members` finds them when a ring runs among each of these at the same time.

    Of a link that several rings use it has the share that it needs; links that it has to itself stay as they are.
    """
    if len(members) == 1 or not len(fabric.common_links_X):
        return fabric
    loads_mX = [_link_load(fabric, *_ring_flows(fabric, ranks)) for ranks in members if len(ranks) > 1]
    if not loads_mX:
        return fabric
    own_X, all_X = loads_mX[0], np.sum(loads_mX, axis=0)
    share_X = np.divide(own_X, all_X, out=np.ones_like(own_X), where=own_X > 0)
    return fabric if (share_X == 1.0).all() else replace(fabric, capacity_X=fabric.capacity_X * share_X)


def ring_use(fabric: Fabric, members: Sequence[NDArray[np.int64]], seconds: float) -> LinkUse:
    """What rings among each of `members` put on the fabric's common links in `seconds`, at their pace side by side."""
    rings = [_ring_flows(fabric, ranks) for ranks in members if len(ranks) > 1]
    pace = _pattern(crowded(fabric, members), *rings[0]).seconds_per_byte
    sources_F, targets_F, shares_F = (np.concatenate(parts) for parts in zip(*rings, strict=True))
    return common_use(fabric, sources_F, targets_F, seconds / pace * shares_F[None])


def ring_shares(fabric: Fabric, members: Sequence[NDArray[np.int64]]) -> NDArray[np.float64]:
    """How much of each link [X] rings among each of `members` fill side by side while their slowest link is full."""
    busy_X = ring_seconds(fabric, members, 1.0)
    return np.asarray(busy_X / max(float(busy_X.max()), np.finfo(float).tiny))


def ring_seconds(fabric: Fabric, members: Sequence[NDArray[np.int64]], sent_bytes: float) -> NDArray[np.float64]:
    """How long each link [X] is busy with rings among each of `members` in which every rank sends so many bytes."""
    rings = [_ring_flows(fabric, ranks) for ranks in members if len(ranks) > 1]
    if not rings:
        return np.zeros(len(fabric.links))
    flows = (np.concatenate(parts) for parts in zip(*rings, strict=True))
    return np.asarray(_link_load(fabric, *flows) * sent_bytes / fabric.capacity_X)


def send_recv_seconds(fabric: Fabric, source: int, target: int, num_bytes: float) -> CollectiveEstimate:
    """One message of `num_bytes` from rank to rank, alone on its links."""
    as_ranks(fabric, [source, target])
    if source == target or checked_bytes(num_bytes) == 0:
        return _NOTHING
    pattern = _pattern(fabric, np.array([source]), np.array([target]), np.ones(1))
    wire = pattern.seconds_per_byte * num_bytes
    protocol = measured_call(fabric, "send_recv", np.array([source, target])) or fabric.parameters.point_to_point
    found = _estimate(protocol, "point_to_point", num_bytes, wire, 1, pattern.latency)
    domain_R = fabric.domain_of_rank_R
    return found if domain_R[source] == domain_R[target] else _over_nics(fabric, found)


def _estimate(
    protocol: Protocol, name: str, payload: float, wire_seconds: float, hops: float, latency: float,
    *, messages: float | None = None,
) -> CollectiveEstimate:  # fmt: skip
    """`hops` of `latency` each; `messages` of the software, as many as hops where nothing is said."""
    overhead = protocol.overhead_seconds(payload, messages=hops if messages is None else messages)
    seconds = wire_seconds / protocol.efficiency + hops * latency + overhead
    return CollectiveEstimate(seconds, name, protocol.source, protocol.evidence)


def _half_ring(fabric: Fabric, ranks: NDArray[np.int64], num_bytes: float, call: HalfRing) -> CollectiveEstimate:
    n = len(ranks)
    if n == 1 or checked_bytes(num_bytes) == 0:
        return _NOTHING
    flows = _ring_flows(fabric, ranks)
    ring = _pattern(fabric, *flows)
    wire = (n - 1) / n * num_bytes * ring.seconds_per_byte
    measured = measured_call(fabric, call, ranks)
    if measured is not None:
        return _estimate(measured, "ring", num_bytes, wire, 0, 0.0)
    hops, protocol = _hops(fabric, ranks, flows), getattr(fabric.parameters, call)
    found = _estimate(protocol, "ring", num_bytes, wire, 1, hops.ring, messages=n - 1)
    return _across(fabric, ranks, (call,), found, num_bytes=num_bytes)


def _ring(fabric: Fabric, ranks: NDArray[np.int64], num_bytes: float) -> CollectiveEstimate:
    n = len(ranks)
    flows = _ring_flows(fabric, ranks)
    ring = _pattern(fabric, *flows)
    wire = 2 * (n - 1) / n * num_bytes * ring.seconds_per_byte
    measured = measured_call(fabric, "all_reduce", ranks)
    if measured is not None and not _able("nvls", fabric, ranks):
        return _estimate(measured, "ring", num_bytes, wire, 0, 0.0)
    hops, protocol = _hops(fabric, ranks, flows), fabric.parameters.ring
    found = _estimate(protocol, "ring", num_bytes, wire, 2, hops.ring, messages=2 * (n - 1))
    return _across(fabric, ranks, HALF_RINGS, found, num_bytes=num_bytes)


def _tree(fabric: Fabric, ranks: NDArray[np.int64], num_bytes: float) -> CollectiveEstimate:
    flows = _ring_flows(fabric, ranks)
    ring = _pattern(fabric, *flows)  # a double binary tree loads ports as a chain does: bytes up and bytes down
    wire, hops, protocol = 2 * num_bytes * ring.seconds_per_byte, _hops(fabric, ranks, flows), fabric.parameters.tree
    messages = 2 * math.ceil(math.log2(len(ranks)))
    found = _estimate(protocol, "tree", num_bytes, wire, 2, hops.tree, messages=messages)
    return _across(fabric, ranks, HALF_RINGS, found, num_bytes=num_bytes)


def _nvls(fabric: Fabric, ranks: NDArray[np.int64], num_bytes: float) -> CollectiveEstimate:
    if not _able("nvls", fabric, ranks):
        raise UserError(
            f"all-reduce: nvls needs {NVLS_MIN_RANKS} or more ranks behind one NVSwitch of H100 or later; use auto"
        )
    n = len(ranks)
    ring = _ring_pattern(fabric, ranks)
    wire = (1 + 1 / n) * num_bytes * ring.seconds_per_byte
    measured = measured_call(fabric, "all_reduce", ranks)
    if measured is not None:
        return _estimate(measured, "nvls", num_bytes, wire, 0, 0.0)
    return _estimate(fabric.parameters.nvls, "nvls", num_bytes, wire, 2, ring.latency)


def _hierarchical(fabric: Fabric, ranks: NDArray[np.int64], num_bytes: float) -> CollectiveEstimate:
    if not _able("hierarchical", fabric, ranks):
        raise UserError(
            "all-reduce: hierarchical needs the same number of ranks, two or more, on each of several nodes"
        )
    nodes = _by_node(fabric, ranks)
    parameters = fabric.parameters
    inner = [_half_ring(fabric, nodes[0], num_bytes, call) for call in HALF_RINGS]
    # All shares cross at once: the pattern counts every rank's NIC and the core links that they share.
    rows = np.stack(nodes)
    pattern = _pattern(fabric, rows.ravel(), np.roll(rows, -1, axis=0).ravel(), np.ones(rows.size))
    m, share = len(nodes), num_bytes / rows.shape[1]
    wire = 2 * (m - 1) / m * share * pattern.seconds_per_byte
    outer = _estimate(parameters.ring, "ring", share, wire, 2 * (m - 1), pattern.latency)
    seconds = sum(part.seconds for part in inner) + outer.seconds
    return CollectiveEstimate(seconds, "hierarchical", outer.source)


_ALL_REDUCE: dict[str, Callable[[Fabric, NDArray[np.int64], float], CollectiveEstimate]] = {
    "ring": _ring,
    "tree": _tree,
    "nvls": _nvls,
    "hierarchical": _hierarchical,
}


def _able(algorithm: str, fabric: Fabric, ranks: NDArray[np.int64]) -> bool:
    if algorithm == "nvls":
        one_switch = len(set(fabric.domain_of_rank_R[ranks].tolist())) == 1
        able = all(reduces_in_switch(kind) for kind in {fabric.nccl[rank] for rank in ranks.tolist()})
        return one_switch and len(ranks) >= NVLS_MIN_RANKS and able
    if algorithm == "hierarchical":
        sizes = {len(members) for members in _by_node(fabric, ranks)}
        return len(sizes) == 1 and 1 < sizes.pop() < len(ranks)
    return True


def _hops(fabric: Fabric, ranks: NDArray[np.int64], flows: "_RingFlows") -> _Hops:
    domain_R = fabric.domain_of_rank_R
    latency_F = fabric.path_latency(fabric.routes(flows.sources_F, flows.targets_F))
    crosses_F = domain_R[flows.sources_F] != domain_R[flows.targets_F]
    inside = float(latency_F[~crosses_F].max(initial=0.0))
    kind = fabric.nccl[int(ranks[0])]
    if crosses_F.any() and kind is not None and fabric.parameters.by_gpu:
        inside = min(inside, hop_seconds(kind))
    return _Hops(float(latency_F[crosses_F].max(initial=0.0)), inside, len(set(domain_R[ranks].tolist())), len(ranks))


def _across(
    fabric: Fabric, ranks: NDArray[np.int64], calls: Sequence[HalfRing], found: CollectiveEstimate, *, num_bytes: float
) -> CollectiveEstimate:
    """A call across nodes, with what `calls` lose inside the first of them between small and large messages."""
    nodes = _by_node(fabric, ranks)
    inside = [measured_call(fabric, call, nodes[0]) for call in calls] if len(nodes) > 1 else []
    known = [protocol for protocol in inside if protocol is not None]
    found = _over_nics(fabric, found) if len(nodes) > 1 else found
    if not known:
        return found
    lost = sum(protocol.overhead_seconds(num_bytes) - protocol.call_seconds for protocol in known)
    sources = dict.fromkeys(protocol.source for protocol in known)
    source = f"{found.source}; what large messages lose: {', '.join(sources)}"
    return found._replace(seconds=found.seconds + lost, source=source)


def _over_nics(fabric: Fabric, found: CollectiveEstimate) -> CollectiveEstimate:
    """The same with the source of what links between nodes reach."""
    links = f"{fabric.parameters.nic_source}; latencies: {fabric.parameters.latency_source}"
    return found._replace(source=f"{found.source}; links between nodes: {links}")


def _by_node(fabric: Fabric, ranks: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    places: dict[int, list[int]] = {}
    for place, node in enumerate(fabric.domain_of_rank_R[ranks].tolist()):
        places.setdefault(node, []).append(place)
    return [ranks[of_node] for of_node in places.values()]


def _ring_pattern(fabric: Fabric, ranks: NDArray[np.int64]) -> _Pattern:
    return _pattern(fabric, *_ring_flows(fabric, ranks))


class _RingFlows(NamedTuple):
    """The flows of one ring step, and the share of a rank's bytes that each carries."""

    sources_F: NDArray[np.int64]
    targets_F: NDArray[np.int64]
    shares_F: NDArray[np.float64]


def _ring_flows(fabric: Fabric, ranks: NDArray[np.int64]) -> _RingFlows:
    sources: list[int] = []
    targets: list[int] = []
    shares: list[float] = []
    nodes = _by_node(fabric, ranks)
    for node, following in zip(nodes, nodes[1:] + nodes[:1], strict=True):
        if len(node) > 1:
            sources += node.tolist()
            targets += np.roll(node, -1).tolist()
            shares += [1.0] * len(node)
        if len(nodes) > 1:
            channels = max(len(node), len(following))
            sources += [int(node[c % len(node)]) for c in range(channels)]
            targets += [int(following[c % len(following)]) for c in range(channels)]
            shares += [1 / channels] * channels
    return _RingFlows(np.array(sources), np.array(targets), np.array(shares))


def _pattern(
    fabric: Fabric, sources_F: NDArray[np.int64], targets_F: NDArray[np.int64], shares_F: NDArray[np.float64]
) -> _Pattern:
    latency = float(fabric.path_latency(fabric.routes(sources_F, targets_F)).max())
    return _Pattern(float((_link_load(fabric, sources_F, targets_F, shares_F) / fabric.capacity_X).max()), latency)


def _link_load(
    fabric: Fabric, sources_F: NDArray[np.int64], targets_F: NDArray[np.int64], shares_F: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Shares of a step's bytes over each link, [X]."""
    path_QP, flow_Q, share_Q = fabric.split_routes(sources_F, targets_F)
    load_X = np.zeros(len(fabric.links))
    for hop in range(path_QP.shape[1]):
        used = path_QP[:, hop] != NONE
        np.add.at(load_X, path_QP[used, hop], (shares_F[flow_Q] * share_Q)[used])
    return load_X
