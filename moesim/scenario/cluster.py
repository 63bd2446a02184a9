"""The `cluster`, `network`, `dispatch` and `placement` sections: machines, links and how experts sit on them."""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

from moesim.scenario.base import (
    Bandwidth,
    DType,
    Flag,
    Latency,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Share,
)
from moesim.scenario.catalogue import gpu_spec


class Pool(Section):
    """`nodes` machines with `gpus_per_node` GPUs of one kind."""

    name: str = "main"
    gpu: str
    nodes: PositiveInt
    gpus_per_node: PositiveInt = 8
    price_per_gpu_hour: NonNegativeFloat | None = None

    @property
    def usd_per_gpu_hour(self) -> float:
        """The rent of one GPU: the scenario's price, or the catalogue's when it names none."""
        return gpu_spec(self.gpu).price_per_gpu_hour if self.price_per_gpu_hour is None else self.price_per_gpu_hour

    @property
    def price_source(self) -> str:
        """Where the rent comes from, to be shown beside every cost."""
        return gpu_spec(self.gpu).price_source if self.price_per_gpu_hour is None else "scenario"


class Oversubscription(Section):
    """Ratio of capacity below to capacity above a tier."""

    leaf: PositiveFloat = 1.0
    spine: PositiveFloat = 1.0


def _oversubscription_form(value: object) -> str:
    return "<mapping>" if isinstance(value, dict | Oversubscription) else "<number>"


# The tags in angle brackets never show: they only keep pydantic from reporting both forms for one mistake.
AnyOversubscription = Annotated[
    Annotated[PositiveFloat, Tag("<number>")] | Annotated[Oversubscription, Tag("<mapping>")],
    Discriminator(_oversubscription_form),
]


class Degraded(Section):
    """A link, node or rail whose bandwidth is multiplied by `factor`; 0 means failed."""

    link: tuple[str, str] | None = None
    node: int | None = None
    rail: int | None = None
    factor: Share


class Link(Section):
    """A directed link of a custom fabric; `both` adds the opposite direction."""

    source: str
    target: str
    bandwidth: Bandwidth
    latency: Latency = 0.0
    both: Flag = True


class Fabric(Section):
    """Links of the cluster. Bandwidths are per link and direction; what is absent comes from the GPU's catalogue entry.

    `*_efficiency` is the share of a link's bandwidth that long transfers reach; absent means the calibrated value.
    `bandwidth_factor` multiplies the bandwidth of every link, wherever it comes from; latencies stay.
    """

    preset: Literal["nvlink_node", "rail_optimised", "multi_plane", "leaf_spine", "nvl72", "custom"] = "rail_optimised"
    nvlink: Bandwidth | None = None
    nvlink_latency: Latency | None = None
    nvlink_efficiency: Share | None = None
    nic: Bandwidth | None = None
    nic_latency: Latency | None = None
    nic_efficiency: Share | None = None
    leaf_latency: Latency | None = None
    pod_nodes: PositiveInt | None = None
    planes: PositiveInt = 1
    oversubscription: AnyOversubscription = 1.0
    pxn: Flag = False
    bandwidth_factor: PositiveFloat = 1.0
    degraded: tuple[Degraded, ...] = ()
    links: tuple[Link, ...] = ()
    file: str | None = None


class Cluster(Section):
    """Pools of GPUs and the fabric between them. The flat form (gpu, nodes, ...) is short for one pool."""

    pools: tuple[Pool, ...] = Field(min_length=1)
    fabric: Fabric = Fabric()

    @property
    def num_gpus(self) -> int:
        """GPUs of all pools."""
        return sum(pool.nodes * pool.gpus_per_node for pool in self.pools)


class Dispatch(Section):
    """How tokens travel to their experts and back.

    `sm_share`: share of each GPU's SMs that communication kernels hold while a transfer is open (20 of 132 in
    DeepSeek-V3's training); absent means the measured slow-down of compute beside a transfer.
    """

    algorithm: Literal["direct", "hierarchical", "low_latency"] = "direct"
    deduplicate: Literal["per_expert", "per_rank", "per_node"] = "per_rank"
    dtype: DType = "bf16"
    combine_dtype: DType = "bf16"
    sm_share: Annotated[Share, Field(lt=1)] | None = None


class Network(Section):
    """Which model shares the links: the closed form over ports, merged completions, or exact max-min filling."""

    model: Literal["ports", "fluid", "exact"] = "ports"


class Contiguous(Section):
    """Rank r of an EP group holds experts r*N/D .. (r+1)*N/D - 1."""

    kind: Literal["contiguous"] = "contiguous"


class RoundRobin(Section):
    """Expert e sits on rank e mod D. It splits a router's groups, so it needs a router without groups."""

    kind: Literal["round_robin"]


class Explicit(Section):
    """`slots[r]` lists the experts of rank r; an expert may appear once."""

    kind: Literal["explicit"]
    slots: tuple[tuple[Annotated[int, Field(ge=0, strict=True)], ...], ...]


Placement = Annotated[Contiguous | RoundRobin | Explicit, Field(discriminator="kind")]


def keeps_groups(slots: Sequence[Sequence[int]], *, num_groups: int) -> bool:
    """Whether a placement (`slots[r]`: the experts of rank r, equally many on each) keeps a router's groups together.

    Together means: every rank holds whole groups, or every group fills whole consecutive ranks.
    """
    per_rank, group_size = len(slots[0]), len(slots) * len(slots[0]) // num_groups
    groups = [{expert // group_size for expert in experts} for experts in slots]
    if per_rank >= group_size:
        return all(len(held) * group_size == per_rank for held in groups)
    if group_size % per_rank or any(len(held) > 1 for held in groups):
        return False
    ranks_per_group = group_size // per_rank
    blocks = [groups[first : first + ranks_per_group] for first in range(0, len(groups), ranks_per_group)]
    return all(len(set.union(*block)) == 1 for block in blocks)
