"""Transfers among the ranks of a group: one call, three models of sharing.

Legend: S routing samples in lockstep, R ranks of the group (bytes_RR: source, target).
"""

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, Self, get_args

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.network.contention import LinkUse, Window, common_use, opening
from moesim.network.fabric import Fabric
from moesim.network.flows import Demand, Ranks, as_numbers, build_flows, ladder_link_bytes, link_bytes, make_demand
from moesim.network.parameters import NVLINK_LATENCY_SOURCE, Evidence
from moesim.network.ports import Ports
from moesim.network.rank_ports import RankPorts

if TYPE_CHECKING:
    from moesim.network.fair import FairSharing

FloatArray = NDArray[np.float64]
Model = Literal["ports", "fluid", "exact"]
START_GRID: dict[str, float] = {"exact": 1e-6, "fluid": 1e-3}  # starts closer than this share of a transfer are alike


class Sharing(Protocol):
    """How flows share links: arrival times for given starts."""

    def finish(self, start_SR: FloatArray) -> FloatArray:
        """When each rank has sent and received all, latency included, [S, R]."""

    def part(self, samples: slice) -> Self:
        """The same for some of the samples."""


def share_links(
    fabric: Fabric, demand: Demand, *, model: Model, two_sided: bool, compiled: bool | None = None
) -> "Ports | FairSharing":
    """The chosen model, prepared for one demand. `compiled`: see `Ports`. Raises UserError for an unknown model."""
    if model not in get_args(Model):
        raise UserError(f'model: "{model}" is unknown; use {", ".join(get_args(Model))}')
    if model == "ports":
        return Ports(fabric, demand, two_sided=two_sided, compiled=compiled)
    from moesim.network.fair import FLUID_WINDOW, FairSharing  # numba takes most of a second; `ports` does without it

    return FairSharing(fabric, demand, two_sided=two_sided, window=FLUID_WINDOW if model == "fluid" else 0.0)


def prepare_sharing(
    fabric: Fabric,
    demand: Demand,
    *,
    model: Model,
    two_sided: bool,
    per_rank_starts: bool = True,
    compiled: bool | None = None,
) -> Sharing:
    """The chosen model for many calls with the same demand; see prepare_transfer for `per_rank_starts`."""
    sharing = share_links(fabric, demand, model=model, two_sided=two_sided, compiled=compiled)
    if isinstance(sharing, Ports):
        return sharing
    from moesim.network.fair import CommonStart, Remembered

    shape = demand.bytes_SRR.shape[:2]
    if per_rank_starts:
        return Remembered(sharing, shape=shape, grid=START_GRID[model])
    return CommonStart(sharing, shape=shape, two_sided=two_sided)


def transfer_times(
    fabric: Fabric,
    bytes_RR: FloatArray,
    *,
    start_R: FloatArray | None = None,
    model: Model = "exact",
    ranks: Ranks = None,
    two_sided: bool = True,
) -> FloatArray:
    """When the last byte of each (source, target) pair arrives, seconds [R, R]; pairs without bytes end at release.

    A two-sided flow is released when both ends have started, a one-sided one when its source has. `start_R` (seconds)
    defaults to 0. `ranks` are the fabric's ranks that the matrix's rows stand for (default: all). Links, efficiencies
    and latencies count; the software's cost per call does not (see prepare_dispatch). Raises UserError for an unknown
    model, ranks that are not there, and bytes or starts of another shape, negative (bytes) or not finite.
    """
    demand = make_demand(fabric, bytes_RR, ranks=ranks)
    if np.ndim(bytes_RR) != 2:
        raise UserError(f"bytes: needs one matrix [R, R], not {np.ndim(bytes_RR)} dimensions")
    start = np.zeros(len(demand.ranks_R)) if start_R is None else as_numbers(start_R, "start_R")
    if start.shape != demand.ranks_R.shape or not np.isfinite(start).all():
        raise UserError(f"start_R: needs one finite number of seconds for each of {len(demand.ranks_R)} ranks")
    release_RR = np.maximum(start[:, None], start) if two_sided else np.repeat(start[:, None], len(start), axis=1)
    sharing = share_links(fabric, demand, model=model, two_sided=two_sided)
    return np.asarray(np.maximum(sharing.flow_finish(start[None])[0], release_RR))


class Traffic:
    """What a transfer puts on the wires: bytes per tier (mean of the samples), and on the links that groups share."""

    def __init__(self, fabric: Fabric, stages: Sequence[Demand], *, reached: Fabric | None = None) -> None:
        """`reached`: the fabric's links as the transfer's software finds them (see Fabric.reached_by)."""
        self._fabric, self._reached = fabric, reached or fabric
        self._stages = tuple(_PairBytes.of(stage) for stage in stages)

    def part(self, samples: slice) -> "Traffic":
        """Some of the samples."""
        part = Traffic(self._fabric, (), reached=self._reached)
        part._stages = tuple(stage._replace(bytes_SF=stage.bytes_SF[samples]) for stage in self._stages)
        return part

    @cached_property
    def intra_node_bytes(self) -> float:
        """Bytes between ranks of one node."""
        return sum(stage.moved(self._fabric, same_node=True) for stage in self._stages)

    @cached_property
    def inter_node_bytes(self) -> float:
        """Bytes between nodes."""
        return sum(stage.moved(self._fabric, same_node=False) for stage in self._stages)

    @cached_property
    def link_bytes_X(self) -> FloatArray:
        """Bytes over each link that can be a bottleneck, mean of the samples."""
        demands = [stage.demand() for stage in self._stages]
        return np.asarray(sum(link_bytes(self._fabric, build_flows(self._fabric, demand)) for demand in demands))

    def common_use(self, ranks_R: NDArray[np.integer]) -> LinkUse:
        """What is on the fabric's common links if other ranks send it.

        Bytes of software that reaches less than NCCL count as those that NCCL would send meanwhile.
        """
        first, *others = (stage.common_use(self._fabric, ranks_R) for stage in self._stages)
        use = sum(others, start=first)
        if self._reached is self._fabric:
            return use
        common_X = self._fabric.common_links_X
        slower_X = self._fabric.capacity_X[common_X] / self._reached.capacity_X[common_X]
        return LinkUse(bytes_SX=use.bytes_SX * slower_X, flows_SX=use.flows_SX)

    def port_seconds(self, ports: RankPorts, ranks_R: NDArray[np.integer]) -> FloatArray:
        """How long it keeps the ports of a group busy if `ranks_R` send it, at the pace that its software reaches."""
        stages = [
            ports.seconds(
                ranks_R[stage.source_F],
                ranks_R[stage.target_F],
                stage.bytes_SF,
                avoid_nvlink=stage.avoid_nvlink,
                reached=self._reached,
            )
            for stage in self._stages
        ]
        return sum(stages[1:], start=stages[0])


class _PairBytes(NamedTuple):
    """The pairs of a demand that have bytes in at least one sample."""

    ranks_R: NDArray[np.int64]
    avoid_nvlink: bool
    source_F: NDArray[np.intp]
    target_F: NDArray[np.intp]
    bytes_SF: FloatArray

    @classmethod
    def of(cls, demand: Demand) -> Self:
        source_F, target_F = np.nonzero(np.any(demand.bytes_SRR > 0, axis=0))
        bytes_SF = demand.bytes_SRR[:, source_F, target_F]
        return cls(demand.ranks_R, demand.avoid_nvlink, source_F, target_F, bytes_SF)

    def moved(self, fabric: Fabric, *, same_node: bool) -> float:
        """Bytes that leave their rank, for another rank of the same node or of another node."""
        node_R = fabric.domain_of_rank_R[self.ranks_R]
        chosen_F = (node_R[self.source_F] == node_R[self.target_F]) == same_node
        chosen_F &= self.source_F != self.target_F
        return float(self.bytes_SF[:, chosen_F].mean(axis=0).sum())

    def common_use(self, fabric: Fabric, ranks_R: NDArray[np.integer]) -> LinkUse:
        """See Traffic."""
        source_F, target_F = ranks_R[self.source_F], ranks_R[self.target_F]
        return common_use(fabric, source_F, target_F, self.bytes_SF, avoid_nvlink=self.avoid_nvlink)

    def demand(self) -> Demand:
        bytes_SRR = np.zeros((len(self.bytes_SF), len(self.ranks_R), len(self.ranks_R)))
        bytes_SRR[:, self.source_F, self.target_F] = self.bytes_SF
        return Demand(ranks_R=self.ranks_R, bytes_SRR=bytes_SRR, avoid_nvlink=self.avoid_nvlink)


class PreparedTransfer:
    """Traffic matrices with all that does not depend on when the ranks start.

    `alone_R` is each rank's finish when all start at 0, `sm_share` the share of each GPU's SMs that the communication
    kernels hold meanwhile, `source` where the numbers come from, `evidence` what rows tell of their errors.
    """

    def __init__(
        self,
        sharing: Sharing,
        *,
        shape: tuple[int, ...],
        two_sided: bool = True,
        synchronised: bool = False,
        overhead_R: FloatArray | float = 0.0,
        sm_share: float = 0.0,
        traffic: Traffic,
        source: str,
        evidence: Evidence = Evidence.NONE,
    ) -> None:
        self._sharing = None if synchronised else sharing  # asked once: then all that it holds may go
        self._shape = shape
        self._two_sided, self._synchronised = two_sided, synchronised
        self._overhead_SR = np.broadcast_to(overhead_R, shape).reshape(-1, shape[-1])
        self.sm_share = sm_share
        self._all_traffic, self._samples = traffic, slice(None)
        self.source, self.evidence = source, evidence
        self._alone_SR = sharing.finish(np.zeros(self._overhead_SR.shape)) + self._overhead_SR
        self.alone_R = self._alone_SR.reshape(shape)

    def parts(self, count: int) -> "tuple[PreparedTransfer, ...]":
        """The samples in `count` equal runs, each as a transfer of its own [S, R]: prepared together, used apart."""
        length, rest = divmod(len(self._alone_SR), count)
        assert not rest and len(self._shape) == 2, (self._shape, count)
        return tuple(self._part(slice(first, first + length)) for first in range(0, count * length, length))

    def _part(self, samples: slice) -> "PreparedTransfer":
        part = copy.copy(self)
        part._sharing = None if self._sharing is None else self._sharing.part(samples)
        part._overhead_SR, part._samples = self._overhead_SR[samples], samples
        part._alone_SR = part.alone_R = self._alone_SR[samples]
        part._shape = part._alone_SR.shape
        return part

    @property
    def is_synchronised(self) -> bool:
        """Whether nobody sends before the last has come: ranks are done `alone_R` seconds behind it."""
        return self._synchronised

    @property
    def traffic(self) -> Traffic:
        """The bytes."""
        return self._all_traffic.part(self._samples)

    def common_use(self, ranks_R: NDArray[np.integer]) -> LinkUse:
        """What it puts on the fabric's common links, on `ranks_R` in the place of those that it was prepared for."""
        return self.traffic.common_use(ranks_R)

    def port_seconds(self, ports: RankPorts, ranks_R: NDArray[np.integer]) -> FloatArray:
        """How long it keeps each port of a group busy, [S, K, R]: on `ranks_R` as in `common_use`."""
        traffic = self._all_traffic if self._samples == slice(None) else self.traffic
        return traffic.port_seconds(ports, ranks_R)

    def port_seconds_of_parts(
        self, parts: "Sequence[PreparedTransfer]", ports: RankPorts, ranks_R: NDArray[np.integer]
    ) -> FloatArray | None:
        """The same of several parts that this one is the first of, [M, S, K, R]; None where they do not follow it."""
        length, first = len(self._alone_SR), self._samples.start or 0
        for number, part in enumerate(parts):
            follows = part._samples == slice(first + number * length, first + (number + 1) * length)
            if part._all_traffic is not self._all_traffic or not follows:
                return None
        whole = self._all_traffic.part(slice(first, first + len(parts) * length))
        seconds_QKR = whole.port_seconds(ports, ranks_R)
        return seconds_QKR.reshape(len(parts), length, *seconds_QKR.shape[1:])

    def window(self, start_R: FloatArray) -> Window:
        """When the bytes move while the transfer is alone, software's time before and behind apart."""
        work_SR = self._alone_SR - self._overhead_SR
        least_S1 = self._overhead_SR.min(axis=1, keepdims=True)
        start_SR = start_R.reshape(work_SR.shape) + least_S1
        opens_S = opening(start_SR, work_SR.max(axis=1), two_sided=self._two_sided, synchronised=self._synchronised)
        return Window(opens_S, work_SR, self._overhead_SR - least_S1)

    def finish(self, start_R: FloatArray) -> FloatArray:
        """When each rank is done (seconds, same clock as `start_R`); [R], or [S, R] for S matrices in lockstep."""
        start_SR = start_R.reshape(self._overhead_SR.shape)
        if self._sharing is None:
            return np.asarray((start_SR.max(axis=1, keepdims=True) + self._alone_SR).reshape(self._shape))
        if start_SR[0, 0] == start_SR[0, -1] and (start_SR == start_SR[:, :1]).all():
            return np.asarray((start_SR + self._alone_SR).reshape(self._shape))
        finish_SR = self._sharing.finish(start_SR)
        finish_SR += self._overhead_SR
        return finish_SR.reshape(self._shape)


def prepare_transfer(
    fabric: Fabric,
    bytes_RR: FloatArray,
    *,
    ranks: Ranks = None,
    model: Model = "ports",
    two_sided: bool = True,
    synchronised: bool = False,
    per_rank_starts: bool = True,
) -> PreparedTransfer:
    """Prepare a byte matrix [R, R], or [S, R, R] for S routing samples in lockstep.

    `synchronised`: the implementation exchanges counts first, so that nobody sends before the last rank has arrived.
    `exact` and `fluid` solve for each new pattern of starts, to START_GRID of the transfer's length, and keep the
    answers; without `per_rank_starts` they reuse the one for a common start (see CommonStart for the error).
    """
    demand = make_demand(fabric, bytes_RR, ranks=ranks)
    return PreparedTransfer(
        prepare_sharing(fabric, demand, model=model, two_sided=two_sided, per_rank_starts=per_rank_starts),
        shape=np.shape(bytes_RR)[:-1],
        two_sided=two_sided,
        synchronised=synchronised,
        traffic=Traffic(fabric, [demand]),
        source=transfer_source(fabric, model),
    )


def transfer_source(fabric: Fabric, model: Model, *, reached: str | None = None, one_domain: bool = False) -> str:
    """Where a transfer's time comes from; `reached`: the source of shares of the bandwidth that are not NCCL's."""
    if one_domain:
        ports = f"achieved share: {reached or fabric.parameters.nvlink_source}; latency: {NVLINK_LATENCY_SOURCE}"
        return f"{model} sharing of NVLink ports ({ports})"
    latencies = f"latencies: {fabric.parameters.latency_source}"
    shares = "links' nominal bandwidth times achieved share"
    if model == "ports" and fabric.core_can_block:
        shares = f"the core can block, which ports may underestimate by a fifth: use fluid; {shares}"
    shares = f"{shares}: {reached or fabric.parameters.nic_source}"
    return f"{model} sharing of {fabric.kind.name} links ({shares}; {latencies})"


def lower_bound(fabric: Fabric, bytes_RR: FloatArray, *, ranks: Ranks = None) -> float:
    """Seconds that no sharing can beat: the largest (bytes over a link / its capacity), without latency."""
    demand = make_demand(fabric, bytes_RR, ranks=ranks)
    loads_X = ladder_link_bytes(fabric, demand)
    if loads_X is None:
        loads_X = link_bytes(fabric, build_flows(fabric, demand))
    return float((loads_X / fabric.capacity_X).max(initial=0.0))
