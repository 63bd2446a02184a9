"""Kinds of fabric as data, one entry each: which switches there are and who is behind them.

A scenario names one in `cluster.fabric.preset`; checks, graph, routes and defaults read the entry and no name.
"""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FabricKind:
    """The facts of one kind.

    listed: the scenario gives every link; nothing below applies. has_network: NICs, leaves and spines join the nodes.
    rack_gpus: GPUs of a rack that one NVLink domain joins, whose nodes are trays of it; None: a domain is a node.
    one_leaf: a leaf takes all NICs of a pod, else those of one rail (the NIC's number in its node). rails: so many,
    however a rack is cut into nodes; None: one for each NIC of a node. has_planes: the NICs of a node are dealt to
    `planes` networks that meet in the nodes alone. one_spine: all leaves (of a plane) are under one spine; else each
    pod has its own, and core switches join the pods. pod_nodes: nodes of a pod where the scenario says nothing; None:
    all.
    """

    name: str
    about: str
    listed: bool = False
    has_network: bool = True
    rack_gpus: int | None = None
    one_leaf: bool = False
    rails: int | None = None
    has_planes: bool = False
    one_spine: bool = False
    pod_nodes: int | None = None

    def leaf(self, nic: int, *, pod: int, planes: int) -> str:
        """The leaf switch of a node's NIC."""
        if self.one_leaf:
            return f"leaf{pod}"
        lanes = planes if self.has_planes else self.rails
        return f"leaf{pod}.{nic if lanes is None else nic % lanes}"

    def spine(self, nic: int, *, pod: int, planes: int) -> str:
        """The spine switch above that leaf."""
        if self.one_spine:
            return f"spine.{nic % planes}" if self.has_planes else "spine"
        return f"spine{pod}"

    def plane(self, nic: int, *, planes: int) -> int:
        """The network that a node's NIC belongs to."""
        return nic % planes if self.has_planes else 0


RAIL_OPTIMISED = FabricKind(
    name="rail_optimised", about="NICs of the same number in their nodes share a leaf, a spine joins the rails"
)
_KINDS = (
    FabricKind(name="nvlink_node", about="one node, NVLink alone", has_network=False),
    RAIL_OPTIMISED,
    FabricKind(
        name="multi_plane", about="as many separate networks as `planes`", has_planes=True, one_spine=True
    ),
    FabricKind(
        name="leaf_spine",
        about="a leaf takes all NICs of a pod (of 4 nodes), a spine joins the leaves",
        one_leaf=True,
        one_spine=True,
        pod_nodes=4,
    ),
    FabricKind(
        name="nvl72", about="racks whose trays NVLink joins, a network of 4 rails among them", rack_gpus=72, rails=4
    ),
    FabricKind(name="custom", about="made of links, or of file", listed=True, has_network=False),
)  # fmt: skip
FABRICS = {kind.name: kind for kind in _KINDS}


def usual_fabric(nvlink_domains: Collection[int | None]) -> FabricKind:
    """What GPUs come in that all have such a rack (GPUs of it; None: no rack)."""
    racks = [
        kind for kind in FABRICS.values() if kind.rack_gpus is not None and {kind.rack_gpus} == set(nvlink_domains)
    ]
    return racks[0] if racks else RAIL_OPTIMISED


def kinds_with(fact: str) -> str:
    """The names of the kinds of which a fact is true, for messages."""
    return " or ".join(kind.name for kind in FABRICS.values() if getattr(kind, fact))


@dataclass(frozen=True, kw_only=True)
class Transport:
    """What carries messages between nodes: seconds of 64 bytes from GPU to GPU under one leaf, and over the spine."""

    name: str
    one_leaf: float
    over_spine: float
    source: str

    @property
    def nic_latency(self) -> float:
        """Between a GPU and its leaf switch."""
        return self.one_leaf / 2

    @property
    def leaf_latency(self) -> float:
        """Of a link above the leaf switches."""
        return (self.over_spine - self.one_leaf) / 2


_PAPER = "ISCA 2025 DeepSeek-V3 paper, 64-byte latencies"
INFINIBAND = Transport(name="infiniband", one_leaf=2.8e-6, over_spine=3.7e-6, source=_PAPER)
_TRANSPORTS = (
    INFINIBAND,
    Transport(name="roce", one_leaf=3.6e-6, over_spine=5.6e-6, source=_PAPER),
    Transport(
        name="efa",
        one_leaf=10.4e-6,
        over_spine=10.4e-6,
        source="OSU latency of 64 bytes between two hpc6a of one placement group (aws/aws-parallelcluster issue 6449), "
        "MPI included; a message is spread over all paths",
    ),
)
TRANSPORTS = {transport.name: transport for transport in _TRANSPORTS}
