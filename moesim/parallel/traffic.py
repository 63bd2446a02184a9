"""What one layer and micro-batch sends between the ranks of one expert-parallel group.

Legend: R source ranks, D destination ranks (the same ranks), E experts, J nodes that the group touches, P slots.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.mesh import GroupLayout
from moesim.parallel.placement import ExpertPlacement
from moesim.scenario.base import BYTES_PER_ELEMENT, DType
from moesim.scenario.dispatch import Deduplicate

Array = NDArray[Any]
FloatArray = NDArray[np.float64]

FP8_SCALE_BLOCK = 128  # values that share one 4-byte scale


def token_bytes(hidden: int, dtype: DType) -> float:
    """Bytes of one token's hidden vector on the wire; fp8 carries one 4-byte scale per 128 values."""
    scales = 4 * math.ceil(hidden / FP8_SCALE_BLOCK) if dtype == "fp8" else 0
    return hidden * BYTES_PER_ELEMENT[dtype] + scales


class TierBytes(NamedTuple):
    """Bytes that leave ranks: within their node, and over the network between nodes."""

    intra_node: float
    inter_node: float


class DeepEpBytes(NamedTuple):
    """`rdma_R`: one copy per (token, destination node) sent; `nvlink_R`: one per token received."""

    rdma_R: Array
    nvlink_R: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTraffic:
    """The kept rows and token copies of one layer and micro-batch; dropped rows are neither sent nor computed.

    rows_RE: rows that expert e computes for rank r's tokens, `padded_rows` empty ones included.
    rank_copies_RD: distinct (token, destination rank) pairs, own rank included.
    node_copies_RM: distinct (token, destination node) pairs, own node included.
    layout: the nodes and rails of the group's ranks.
    The counts are int64, or float64 in a counterfactual that spreads them evenly.
    """

    rows_RE: Array
    rank_copies_RD: Array
    node_copies_RJ: Array
    layout: GroupLayout
    routed_rows: int
    dropped_rows: int = 0
    padded_rows: int = 0

    @property
    def dropped_share(self) -> float:
        """Dropped rows / routed rows."""
        return self.dropped_rows / self.routed_rows if self.routed_rows else 0.0

    def rows_DP(self, placement: ExpertPlacement) -> Array:
        """Rows that each (rank, slot) computes: what the grouped GEMM of rank d gets. Empty slots get 0."""
        rows_E = np.append(self.rows_RE.sum(axis=0), 0)
        return np.asarray(rows_E[placement.slot_experts_DP])

    def rank_rows_RD(self, placement: ExpertPlacement) -> Array:
        """Rows that rank d computes for rank r's tokens."""
        return sum_columns(self.rows_RE, placement.rank_of_expert_E, placement.num_ranks)

    def send_stages(
        self, placement: ExpertPlacement, deduplicate: Deduplicate, token_bytes: float, *, tokens: float = 0.0
    ) -> tuple[Array, ...]:
        """Bytes from rank to rank, float64 [R, D] with zero diagonal, one matrix per stage of the dispatch.

        per_expert and per_rank: one stage. per_node: first one copy per distinct remote node to the GPU of the same
        rail there, beside the copies for ranks of the own node, which go straight over NVLink; then the fan-out from
        the rail's GPU to the token's ranks on that node. all_ranks: the `tokens` of every rank round a
        ring. Combine uses the transposed matrices in reverse order.
        """
        if deduplicate == "per_node":
            return tuple(
                token_bytes * copies_RD
                for copies_RD in node_stages(self.rank_copies_RD, self.node_copies_RJ, self.layout)
            )
        if deduplicate == "all_ranks":
            return (token_bytes * ring_copies(tokens, self.layout.num_ranks),)
        copies_RD = self.rank_rows_RD(placement) if deduplicate == "per_expert" else self.rank_copies_RD
        return (token_bytes * without_diagonal(copies_RD),)

    def send_bytes_RD(
        self, placement: ExpertPlacement, deduplicate: Deduplicate, token_bytes: float, *, tokens: float = 0.0
    ) -> Array:
        """Bytes from rank to rank, float64 [R, D] with zero diagonal, all stages together."""
        return np.asarray(sum(self.send_stages(placement, deduplicate, token_bytes, tokens=tokens)))

    def tier_bytes(
        self, placement: ExpertPlacement, deduplicate: Deduplicate, token_bytes: float, *, tokens: float = 0.0
    ) -> TierBytes:
        """Bytes within nodes and between nodes, all stages together."""
        bytes_RD = self.send_bytes_RD(placement, deduplicate, token_bytes, tokens=tokens)
        same_node_RD = self.layout.same_node_RD
        return TierBytes(float(bytes_RD[same_node_RD].sum()), float(bytes_RD[~same_node_RD].sum()))

    def deepep_bytes(self, token_bytes: float) -> "DeepEpBytes":
        """Bytes per rank as DeepEP counts them for its GB/s (facts: alltoall_h800), own node and rank included."""
        return DeepEpBytes(
            rdma_R=token_bytes * self.node_copies_RJ.sum(axis=1),
            nvlink_R=token_bytes * self.rank_copies_RD.sum(axis=0),
        )


def sum_columns(values_RX: Array, domain_of_column_X: NDArray[np.int64], num_domains: int) -> Array:
    """Sums over the columns of each domain, e.g. rows per expert to rows per rank: [..., R, num_domains]."""
    counts_D = np.bincount(domain_of_column_X, minlength=num_domains)
    if (counts_D == counts_D[0]).all() and (np.diff(domain_of_column_X) >= 0).all():  # equal blocks side by side
        blocks = values_RX.reshape(*values_RX.shape[:-1], num_domains, -1)
        if blocks.shape[-1] <= 64:  # a sum of whole arrays is far faster than many short ones
            total = blocks[..., 0].copy()
            for column in range(1, blocks.shape[-1]):
                total += blocks[..., column]
            return total
    one_hot_XD = np.equal.outer(domain_of_column_X, np.arange(num_domains)).astype(np.float64)
    values_NX = np.ascontiguousarray(values_RX, dtype=np.float64).reshape(-1, values_RX.shape[-1])
    sums = values_NX @ one_hot_XD  # exact: counts stay below 2**53; rows in one product, which is far faster
    return np.asarray(sums.astype(values_RX.dtype)).reshape(*values_RX.shape[:-1], num_domains)


def ring_copies(tokens: float, ranks: int) -> FloatArray:
    """Copies of an all-gather among ranks with `tokens` each, [R, D]: each sends all but one rank's to the next."""
    copies_RD = np.zeros((ranks, ranks))
    if ranks > 1:
        own_R = np.arange(ranks)
        copies_RD[own_R, (own_R + 1) % ranks] = tokens * (ranks - 1)
    return copies_RD


def node_stages(rank_copies_RD: Array, node_copies_RJ: Array, layout: GroupLayout) -> tuple[FloatArray, FloatArray]:
    """Copies of the two stages of `per_node`, float64 [..., R, D] with zero diagonals; any leading axes.

    First: to the relay of each remote node, beside the copies that stay on the own node and go straight. Second: from
    the relay to the token's ranks on its node.
    """
    first_RD = np.where(layout.same_node_RD, rank_copies_RD, 0).astype(np.float64)
    fan_out_RD = np.zeros_like(first_RD)
    for node in range(layout.num_nodes):
        members = np.flatnonzero(layout.node_of_rank_R == node)
        remote = np.flatnonzero(layout.node_of_rank_R != node)
        relay = layout.relay_RJ[remote, node]
        first_RD[..., remote, relay] += node_copies_RJ[..., remote, node]
        from_relay = np.equal.outer(members, relay).astype(np.float64)
        fan_out_RD[..., members[:, None], members] = from_relay @ rank_copies_RD[..., remote[:, None], members]
    return without_diagonal(first_RD), without_diagonal(fan_out_RD)


def without_diagonal(copies_RD: Array) -> FloatArray:
    """The copies that travel, float64: those of a rank to itself do not."""
    return np.asarray(np.where(np.eye(copies_RD.shape[-1], dtype=bool), 0.0, copies_RD))
