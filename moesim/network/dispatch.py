"""Dispatch and combine of tokens by the algorithms of the table `moesim.scenario.dispatch.DISPATCH`.

direct        one all-to-all(v) of library calls, two-sided
hierarchical  DeepEP's normal kernels: over the network to the GPU of the same rail on each target node, one copy per
              node, and on from there over NVLink, in a pipeline. Inside one node: NVLink only, own rows pass through
              the same channel buffers and so through the rank's queue
low_latency   DeepEP's first low-latency kernels: one one-sided message per row over the NICs, inside a node too;
              low_latency_nvlink, the later ones, take NVLink to peers of the node
one_sided     stores into the peers' memory over NVLink
hybrid_ep     Hybrid-EP: the same two stages as `hierarchical`, by one-sided stores
allgather     an all-gather of all tokens, and a reduce-scatter of the outputs

Legend: S routing samples in lockstep, R ranks of the group (copies_RR: source, target), V ranks that feed a rank.
"""

import copy
from collections.abc import Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.network.collectives import all_gather_seconds, reduce_scatter_seconds
from moesim.network.fabric import Fabric
from moesim.network.flows import Demand, Ranks, as_ranks, make_demand
from moesim.network.nccl import measured_call
from moesim.network.parameters import NetworkParameters, Protocol
from moesim.network.ports import Ports, loops
from moesim.network.transfer import (
    FloatArray,
    Model,
    PreparedTransfer,
    Sharing,
    Traffic,
    prepare_sharing,
    transfer_source,
)
from moesim.scenario.dispatch import DISPATCH, DispatchAlgorithm, Kernel

Algorithm = str  # a name of `moesim.scenario.dispatch.DISPATCH`
Stages = Sequence[NDArray[np.floating] | NDArray[np.integer]]


class Pipeline:
    """Two stages that overlap: bytes of the second flow as those of the first arrive, through the same ports.

    A rank is done when all that it sends and receives in `both` stages has passed its ports, and when the `first`
    stages of all that forward to it have. `forwards` is the second stage's demand.
    """

    def __init__(self, first: Sharing, both: Sharing, forwards: Demand) -> None:
        self._first, self._both = first, both
        self._feeders_SRV = _feeders(forwards.bytes_SRR > 0)
        self._is_compiled = all(isinstance(stage, Ports) and stage.is_compiled for stage in (first, both))

    def part(self, samples: slice) -> "Pipeline":
        """See Sharing."""
        part = copy.copy(self)
        part._first, part._both = self._first.part(samples), self._both.part(samples)
        part._feeders_SRV = self._feeders_SRV[samples]
        return part

    def finish(self, start_SR: FloatArray) -> FloatArray:
        """See Sharing."""
        first, both = self._first, self._both
        if isinstance(first, Ports) and isinstance(both, Ports) and self._is_compiled:
            start_SR = np.ascontiguousarray(start_SR)
            finish_SR: FloatArray = loops().finish_stages(
                start_SR, self._feeders_SRV, *first.for_loops, *both.for_loops
            )
            return finish_SR
        first_SR = first.finish(start_SR)
        fed_SRV = first_SR[np.arange(len(first_SR))[:, None, None], self._feeders_SRV]
        return np.asarray(np.maximum(fed_SRV.max(axis=2), both.finish(start_SR)))


def _feeders(feeds_SRR: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Per rank those that forward to it and itself, whose first stage brings rows of its own: [S, R, V], padded."""
    feeds_SRR = feeds_SRR | np.eye(feeds_SRR.shape[1], dtype=bool)
    sample_E, target_E, source_E = np.nonzero(feeds_SRR.swapaxes(1, 2))
    count_SR = feeds_SRR.sum(axis=1)
    own_R1 = np.arange(feeds_SRR.shape[1], dtype=np.int32)[:, None]
    feeders_SRV = np.repeat(np.broadcast_to(own_R1, (*count_SR.shape, 1)), int(count_SR.max()), axis=2)
    first_SR = (np.cumsum(count_SR) - count_SR.ravel()).reshape(count_SR.shape)
    feeders_SRV[sample_E, target_E, np.arange(len(source_E)) - first_SR[sample_E, target_E]] = source_E
    return feeders_SRV


def _prepare(
    fabric: Fabric,
    copies_stages: Stages,
    *,
    token_bytes: float,
    algorithm: Algorithm = "direct",
    ranks: Ranks = None,
    own_copies_R: FloatArray | None = None,
    model: Model = "ports",
    synchronised: bool = False,
    per_rank_starts: bool = True,
    sm_share: float = 0.0,
    sms: float | None = None,
    compiled: bool | None = None,
    combine: bool,
) -> PreparedTransfer:
    """Tokens on their way to their experts, or (`combine`) outputs on their way back: the same stages reversed.

    `copies_stages`: copies from rank to rank, [R, R] or [S, R, R], as `moesim.parallel.traffic.stage_copies`
    gives them: one matrix, or for deduplication per node the network stage (with direct NVLink copies) and the
    fan-out. `own_copies_R` [R] or [S, R]: tokens that stay on their rank, which only the single-node kernels of
    `hierarchical` move. `sms`: those of a GPU that its kernels hold; None: as usual. `compiled`: see `Ports`. Of
    an algorithm that gathers the matrix is a ring's (`moesim.parallel.traffic.ring_copies`). Raises UserError where
    algorithm and deduplication do not fit.
    """
    chosen = as_ranks(fabric, ranks)
    if algorithm not in DISPATCH:
        raise UserError(f'dispatch: algorithm "{algorithm}" is unknown; use {", ".join(DISPATCH)}')
    facts = DISPATCH[algorithm]
    if sms is not None and not 0 <= sms < np.inf:  # 0: copy engines, which no SM limits
        raise UserError(f"dispatch: sms = {sms} is no number of SMs; use e.g. 24, or None for the algorithm's own")
    if facts.gathers:
        return _prepare_gather(fabric, facts, copies_stages, chosen, token_bytes=token_bytes, combine=combine)
    domain_R = fabric.domain_of_rank_R[chosen]
    one_domain = bool((domain_R == domain_R[0]).all())
    avoids_nvlink = facts.avoids_nvlink and not fabric.is_rack_scale
    over_nics = avoids_nvlink or not one_domain
    kernels = facts.kernels_on(fabric.nccl[int(chosen[0])], over_nics=over_nics)
    peers = len(set(domain_R.tolist())) if over_nics else len(chosen)
    protocol = fabric.parameters.of_dispatch(facts, kernels, combine=combine, peers=peers)
    kernel = kernels.combine if combine else kernels.dispatch
    message_bytes = token_bytes if combine else token_bytes + facts.header_bytes
    reached = fabric.reached_by(facts, kernel, row_bytes=message_bytes, sms=sms)
    if facts.uses_nccl:
        protocol = measured_call(fabric, "all_to_all", chosen) or protocol
    if facts.needs_one_domain and not one_domain:
        raise UserError(f"dispatch: algorithm {facts.name} needs all ranks in one NVLink domain; use direct")
    _check(facts, len(copies_stages), one_node=one_domain)
    stages = [np.asarray(c, dtype=np.float64).reshape(-1, len(chosen), len(chosen)) for c in copies_stages]
    if one_domain and len(stages) == 2 and not stages[1].any():  # nothing to fan out: the kernels for one node
        stages = stages[:1]
    has_ports = fabric.ladder is not None  # a list of links names none for rows that stay
    loopback = facts.passes_own_rows and len(stages) == 1 and own_copies_R is not None and has_ports
    if loopback:
        own = np.asarray(own_copies_R, dtype=np.float64).reshape(-1, len(chosen))
        stages = [stages[0] + own[:, :, None] * np.eye(len(chosen))]
    if combine:
        stages = [np.swapaxes(copies, 1, 2) for copies in reversed(stages)]
    demands = [
        make_demand(fabric, copies * message_bytes, ranks=chosen, avoid_nvlink=avoids_nvlink, loopback=loopback)
        for copies in stages
    ]
    loads = [demands[0], *(demands[0] + second for second in demands[1:])]  # of one stage, of both
    parts = [
        prepare_sharing(
            reached, part.slowed(protocol), model=model, two_sided=facts.two_sided,
            per_rank_starts=per_rank_starts, compiled=compiled,
        )
        for part in loads
    ]  # fmt: skip
    return PreparedTransfer(
        parts[0] if len(parts) == 1 else Pipeline(parts[0], parts[1], demands[1]),
        shape=np.shape(copies_stages[0])[:-1],
        two_sided=facts.two_sided,
        synchronised=synchronised,
        overhead_R=_overhead(protocol, stages, message_bytes).reshape(np.shape(copies_stages[0])[:-1]),
        sm_share=sm_share,
        traffic=Traffic(fabric, demands, reached=reached),
        source=f"{algorithm}: {protocol.source}{_on_sms(facts, kernel, fabric.parameters, sms)}; "
        + transfer_source(
            fabric,
            model,
            reached=None if reached is fabric else "the algorithm's",
            one_domain=one_domain and not avoids_nvlink,
        ),
        evidence=protocol.evidence,
    )


prepare_dispatch = partial(_prepare, combine=False)
prepare_combine = partial(_prepare, combine=True)


class _Met:
    """A collective: all are done `seconds_S` after the last has come."""

    def __init__(self, seconds_S: FloatArray) -> None:
        self._seconds_S = seconds_S

    def part(self, samples: slice) -> "_Met":
        """See Sharing."""
        return _Met(self._seconds_S[samples])

    def finish(self, start_SR: FloatArray) -> FloatArray:
        """See Sharing."""
        last_SR = np.broadcast_to(start_SR.max(axis=1, keepdims=True), start_SR.shape)
        return np.asarray(last_SR + self._seconds_S[:, None])


def _prepare_gather(
    fabric: Fabric, facts: DispatchAlgorithm, copies_stages: Stages, chosen: NDArray[np.int64], *, token_bytes: float,
    combine: bool,
) -> PreparedTransfer:  # fmt: skip
    """All tokens to all ranks by an all-gather, outputs back by a reduce-scatter: NCCL's, with its constants."""
    assert len(copies_stages) == 1, len(copies_stages)
    ranks = len(chosen)
    copies_SRR = np.asarray(copies_stages[0], dtype=np.float64).reshape(-1, ranks, ranks)
    total_S = copies_SRR.sum(axis=(1, 2)) / max(1, ranks - 1) * token_bytes
    call = reduce_scatter_seconds if combine else all_gather_seconds
    known = {total: call(fabric, chosen, total) for total in dict.fromkeys(total_S.tolist())}
    demand = make_demand(fabric, copies_SRR * token_bytes, ranks=chosen)
    first = next(iter(known.values()))
    return PreparedTransfer(
        _Met(np.array([known[total].seconds for total in total_S.tolist()])),
        shape=np.shape(copies_stages[0])[:-1],
        traffic=Traffic(fabric, [demand]),
        source=f"{facts.name}: {facts.source}: {first.source}",
        evidence=first.evidence,
    )


def _overhead(protocol: Protocol, stages: list[FloatArray], message_bytes: float) -> FloatArray:
    """Software seconds of each rank [S, R]: it posts its own messages, one per copy for `message_seconds`."""
    messages_SR = sum(copies.sum(axis=2) - np.einsum("srr->sr", copies) for copies in stages)
    payload_SR = messages_SR * message_bytes
    transition_SR = protocol.transition_seconds * payload_SR / (payload_SR + protocol.transition_bytes)
    return np.asarray(protocol.call_seconds + messages_SR * protocol.message_seconds + transition_SR)


def _on_sms(facts: DispatchAlgorithm, kernel: Kernel, parameters: NetworkParameters, sms: float | None) -> str:
    sms = facts.sms if sms is None else sms
    if not sms:
        return ""
    if kernel.bytes_per_sm is not None:
        return f", {sms:.0f} SMs at {kernel.bytes_per_sm / 1e9:.1f} GB/s each"
    return f", {sms:.0f} SMs at {parameters.bytes_per_sm / 1e9:.1f} GB/s each ({parameters.sm_source})"


def _check(facts: DispatchAlgorithm, num_stages: int, *, one_node: bool) -> None:
    assert num_stages in (1, 2), num_stages
    if facts.fans_out and num_stages == 1 and not one_node:
        raise UserError(f"dispatch: algorithm {facts.name} over several nodes needs deduplicate: per_node")
    if not facts.fans_out and num_stages == 2:
        able = " or ".join(other.name for other in DISPATCH.values() if other.fans_out)
        raise UserError(f"dispatch: deduplicate: per_node needs algorithm: {able}, not {facts.name}")


def deepep_bytes(*, counted_copies: float, hidden: int, fp8: bool) -> float:
    """DeepEP's byte count for its GB/s: (token, node) pairs across nodes, (token, rank) pairs inside one, own included.

    `counted_copies` * hidden * 2 bytes, for fp8 times (1 + 4/128) / 2 (tests/test_internode.py at d8dd185).
    """
    return counted_copies * hidden * 2 * ((1 + 4 / 128) / 2 if fp8 else 1.0)
