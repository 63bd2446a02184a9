"""The `cluster`, `network`, `dispatch` and `compute` sections: machines, links, how tokens travel over them, and how
fast kernels are.

Before them the kinds of fabric as data, one entry each: which switches there are and who is behind them. A scenario
names one in `cluster.fabric.preset`; checks, graph, routes and defaults read the entry and no name.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Discriminator, Field, Tag, WithJsonSchema, model_validator

from moesim.errors import UserError
from moesim.scenario.base import (
    Bandwidth,
    BandwidthFactor,
    Clock,
    DType,
    Efficiency,
    Flag,
    Gpus,
    GpusPerNode,
    Latency,
    Name,
    Oversubscribed,
    PositiveFloat,
    Rent,
    Section,
    Share,
    Text,
    one_of,
)
from moesim.scenario.catalogue import AnyGpu, GpuSpec, gpu_names, gpu_spec
from moesim.scenario.dispatch import DIRECT, DISPATCH, Deduplicate
from moesim.scenario.failures import Degraded, LinkChange, Slowdown, Speeds


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


NIC_BANDWIDTH = 50e9  # bytes/s of a GPU's NIC per direction where the scenario names none: 400 Gbps


class Pool(Section):
    """`nodes` machines with `gpus_per_node` GPUs of one kind."""

    name: Name = Field(default="main", description="Name of the pool, different from those of other pools.")
    gpu: AnyGpu = Field(description="Kind of GPU: a name of the catalogue, or the figures of one of your own.")
    nodes: Gpus = Field(description="Machines of the pool.")
    gpus_per_node: GpusPerNode = Field(default=8, description="GPUs of each machine.")
    nic: Bandwidth | None = Field(
        default=None, description="Network port of one NIC of the pool in one direction; absent: that of the fabric."
    )
    price_per_gpu_hour: Rent | None = Field(
        default=None, description="Rent of one GPU in USD per hour; absent: the catalogue's, with its source."
    )

    @property
    def spec(self) -> GpuSpec:
        """All facts of the GPU. Raises UserError for a name that the catalogue lacks."""
        return gpu_spec(self.gpu) if isinstance(self.gpu, str) else self.gpu.spec

    @property
    def gpu_name(self) -> str:
        """The name of the GPU, in the catalogue or its own."""
        return self.gpu if isinstance(self.gpu, str) else self.gpu.name

    @property
    def usd_per_gpu_hour(self) -> float:
        """The rent of one GPU: the scenario's price, or the catalogue's when it names none."""
        return self.spec.price_per_gpu_hour if self.price_per_gpu_hour is None else self.price_per_gpu_hour

    @property
    def price_source(self) -> str:
        """Where the rent comes from, to be shown beside every cost."""
        return self.spec.price_source if self.price_per_gpu_hour is None else "scenario"


class Oversubscription(Section):
    """Ratio of capacity below to capacity above a tier."""

    leaf: Oversubscribed = Field(default=1.0, description="Capacity below a leaf switch over that above it.")
    spine: Oversubscribed = Field(default=1.0, description="Capacity below a spine switch over that above it.")


def _oversubscription_form(value: object) -> str:
    return "<mapping>" if isinstance(value, dict | Oversubscription) else "<number>"


# The tags in angle brackets never show: they only keep pydantic from reporting both forms for one mistake.
AnyOversubscription = Annotated[
    Annotated[Oversubscribed, Tag("<number>")] | Annotated[Oversubscription, Tag("<mapping>")],
    Discriminator(_oversubscription_form),
]


class Link(Section):
    """A directed link of a custom fabric; `both` adds the opposite direction."""

    source: Name = Field(description="Where the link begins; GPUs are gpu0, gpu1, ...")
    target: Name = Field(description="Where the link ends.")
    bandwidth: Bandwidth = Field(description="Bandwidth in this direction.")
    latency: Latency = Field(default=0.0, description="Latency of the link.")
    both: Flag = Field(default=True, description="Whether a link like it leads back.")


FabricPreset = Annotated[str, one_of(FABRICS), WithJsonSchema({"enum": list(FABRICS), "type": "string"})]
TransportName = Annotated[str, one_of(TRANSPORTS), WithJsonSchema({"enum": list(TRANSPORTS), "type": "string"})]


class Fabric(Section):
    """Links of the cluster. Bandwidths are per link and direction."""

    preset: FabricPreset | None = Field(
        default=None,
        description="Shape of the fabric. "
        + "; ".join(f"{kind.name}: {kind.about}" for kind in FABRICS.values())
        + "; absent: nvl72 for GPUs of such racks (gb200, gb300), else rail_optimised.",
    )
    nvlink: Bandwidth | None = Field(
        default=None, description="NVLink of one GPU in one direction; absent: the catalogue's for the GPU."
    )
    nvlink_latency: Latency | None = Field(
        default=None, description="Latency of one NVLink hop; absent: the calibrated value."
    )
    nvlink_efficiency: Efficiency | None = Field(
        default=None,
        description="Share of NVLink's bandwidth that long transfers reach; absent: that of each software.",
    )
    nic: Bandwidth | None = Field(
        default=None, description="Network port of one NIC in one direction; absent: 400 Gbps."
    )
    nics_per_node: GpusPerNode | None = Field(
        default=None,
        description="NICs of each node, shared evenly by GPUs next to each other; absent: one for each GPU.",
    )
    transport: TransportName = Field(
        default=INFINIBAND.name, description="What carries messages between nodes: the latencies of its links."
    )
    nic_latency: Latency | None = Field(
        default=None, description="Latency between GPU and leaf switch; absent: the transport's."
    )
    nic_efficiency: Efficiency | None = Field(
        default=None,
        description="Share of the network's bandwidth that long transfers reach; absent: that of each software.",
    )
    leaf_latency: Latency | None = Field(
        default=None, description="Latency of a link above the leaf switches; absent: the transport's."
    )
    pod_nodes: Gpus | None = Field(
        default=None,
        description="Nodes under one leaf (rail_optimised: one set of rails); absent: 4 in leaf_spine, else all.",
    )
    planes: GpusPerNode = Field(default=1, description="Separate network planes of preset multi_plane.")
    oversubscription: AnyOversubscription = Field(
        default=1.0, description="Capacity below the leaf switches over that above them, or both tiers as a mapping."
    )
    pxn: Flag = Field(
        default=False, description="Whether a copy to another rail first crosses NVLink, so that it stays on its rail."
    )
    multipath: Flag = Field(
        default=False,
        description="Whether a message takes all equal routes of preset custom at once (adaptive routing, packet "
        "spraying), each with its share, and not one of them.",
    )
    bandwidth_factor: BandwidthFactor = Field(
        default=1.0, description="Factor on the bandwidth of every link, wherever it comes from; latencies stay."
    )
    degraded: tuple[Degraded, ...] = Field(
        default=(), max_length=10_000, description="Links that are slow or have failed."
    )
    changes: tuple[LinkChange, ...] = Field(
        default=(), max_length=100, description="Links that are slow or down for a part of a step, or in some steps."
    )
    links: tuple[Link, ...] = Field(default=(), max_length=100_000, description="The links of preset custom.")
    file: Text | None = Field(
        default=None, description="The links of preset custom as a networkx node-link JSON file, relative to this file."
    )


class Cluster(Section):
    """Pools of GPUs and the fabric between them. The flat form (gpu, nodes, ...) is short for one pool."""

    pools: tuple[Pool, ...] = Field(min_length=1, max_length=1_000, description="Machines by kind of GPU.")
    fabric: Fabric = Field(default=Fabric(), description="The links between the GPUs.")
    slowdowns: tuple[Slowdown, ...] = Field(
        default=(), max_length=1_000, description="Ranks that are slow for a part of a step, or in some steps."
    )
    jitter: Flag = Field(
        default=True,
        description="Whether ranks that meet wait for the slowest of their chips and hosts, as far apart as measured; "
        "stated speeds take the place of the chips'.",
    )
    speeds: Speeds = Field(default=Speeds(), description="Ranks slower or faster than their kind; absent: none.")

    @property
    def main_pool(self) -> Pool:
        """The only pool of a cluster of one kind; of a mixed one the first, where one must speak for all."""
        return self.pools[0]

    @property
    def num_gpus(self) -> int:
        """GPUs of all pools."""
        return sum(pool.nodes * pool.gpus_per_node for pool in self.pools)

    @property
    def usd_per_hour(self) -> float:
        """The rent of all GPUs, idle ones included."""
        return sum(pool.usd_per_gpu_hour * pool.nodes * pool.gpus_per_node for pool in self.pools)

    @property
    def fabric_kind(self) -> FabricKind:
        """The facts of the fabric: of what the scenario names, or of what its GPUs come in."""
        if self.fabric.preset is not None:
            return FABRICS[self.fabric.preset]
        return usual_fabric([pool.spec.nvlink_domain for pool in self.pools])

    def trays_per_domain(self, pool: Pool) -> int:
        """Machines of a pool that one NVLink fabric joins. Raises UserError where GPUs or their number do not fit."""
        kind = self.fabric_kind
        if kind.rack_gpus is None:
            return 1
        if pool.spec.nvlink_domain != kind.rack_gpus:
            racks = ", ".join(name for name in gpu_names() if gpu_spec(name).nvlink_domain == kind.rack_gpus)
            what = f"cluster.fabric: preset {kind.name} joins GPUs of such a rack ({racks}), not {pool.gpu_name}"
            raise UserError(f"{what}; use rail_optimised, or a gpu that is like one of them")
        if kind.rack_gpus % pool.gpus_per_node:
            what = f"gpus_per_node = {pool.gpus_per_node} does not divide the {kind.rack_gpus} GPUs of {kind.name}"
            raise UserError(f"cluster: {what}; use {kind.rails} or {kind.rack_gpus}")
        return kind.rack_gpus // pool.gpus_per_node

    @property
    def domain_sizes(self) -> tuple[int, ...]:
        """GPUs of each NVLink domain in rank order: a node's, or in nvl72 those of a rack; its last may be smaller."""
        sizes: list[int] = []
        for pool in self.pools:
            trays = self.trays_per_domain(pool)
            full, rest = divmod(pool.nodes, trays)
            sizes += [trays * pool.gpus_per_node] * full + [rest * pool.gpus_per_node] * (rest > 0)
        return tuple(sizes)


AlgorithmName = Annotated[str, one_of(DISPATCH), WithJsonSchema({"enum": list(DISPATCH), "type": "string"})]


class Dispatch(Section):
    """How tokens travel to their experts and back."""

    algorithm: AlgorithmName = Field(
        default=DIRECT.name,
        description="; ".join(f"{facts.name}: {facts.about}" for facts in DISPATCH.values()) + ".",
    )
    deduplicate: Deduplicate = Field(
        default="per_rank",
        description="A token is sent once per selected expert, per rank or per node, or to all ranks of the group.",
    )
    dtype: DType = Field(default="bf16", description="Number format of the tokens on their way to the experts.")
    combine_dtype: DType = Field(default="bf16", description="Number format of the expert outputs on their way back.")
    sm_share: Annotated[Share, Field(lt=1)] | None = Field(
        default=None,
        description="Share of each GPU's SMs that communication kernels hold while a transfer is open (20 of 132 in "
        "DeepSeek-V3's training), which also bounds what NVLink moves; absent: as measured, compute and a transfer of "
        "NCCL slow each other.",
    )

    def sms(self, sm_count: float) -> float | None:
        """SMs of a GPU with `sm_count` that communication kernels hold; None: as the software chooses."""
        return None if self.sm_share is None else self.sm_share * sm_count


class Network(Section):
    """How transfers share the links."""

    model: Literal["ports", "fluid", "exact"] | None = Field(
        default=None,
        description="ports: closed form over the ports of each rank; fluid: max-min fair shares in time windows; "
        "exact: max-min fair shares at every completion; absent: fluid among nodes where links that GPUs share can be "
        "a bottleneck, else ports.",
    )


class Compute(Section):
    """Where kernel durations come from."""

    profile: Text | None = Field(
        default=None, description="A profile by name or path, or roofline; absent: the best that there is for the GPU."
    )
    host_factor: PositiveFloat = Field(
        default=1.0,
        description="How many times as long as on the profile's host a launch takes on yours; a virtual machine was "
        "5.5 times as slow (docs/software.md).",
    )
    regime: Literal["step", "sustained", "short", "at_clock"] = Field(
        default="step",
        description="How kernels run: step, all at the clock that the power limit leaves the whole step; sustained, "
        "each as it would without pause; short, as benchmarks of milliseconds find it; at_clock, at `clock`.",
    )
    clock: Clock | None = Field(
        default=None, description="SM clock of regime at_clock; only of GPUs whose clocks were measured."
    )

    @model_validator(mode="after")
    def _one_clock(self) -> Self:
        if self.regime == "at_clock" and self.clock is None:
            raise ValueError("regime at_clock needs a clock; add compute.clock, such as 1500 MHz")
        if self.regime != "at_clock" and self.clock is not None:
            raise ValueError(
                f"clock goes with regime at_clock, not with {self.regime}; set compute.regime or leave it out"
            )
        return self

    @property
    def held_regime(self) -> str | float | None:
        """For `moesim.kernels.in_regime`: the regime, or the clock in MHz; None where a step finds its own clock."""
        if self.regime == "step":
            return None
        return self.regime if self.clock is None else self.clock / 1e6
