"""What one layer and micro-batch sends between the ranks of one expert-parallel group.

Legend: R source ranks, D destination ranks (the same ranks), E experts, M nodes that the group touches, P slots.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.placement import EMPTY_SLOT, ExpertPlacement
from moesim.scenario.base import BYTES_PER_ELEMENT, DType

Deduplicate = Literal["per_expert", "per_rank", "per_node"]
Array = NDArray[Any]

FP8_SCALE_BLOCK = 128  # values that share one 4-byte scale


def token_bytes(hidden: int, dtype: DType) -> float:
    """Bytes of one token's hidden vector on the wire; fp8 carries one 4-byte scale per 128 values."""
    scales = 4 * math.ceil(hidden / FP8_SCALE_BLOCK) if dtype == "fp8" else 0
    return hidden * BYTES_PER_ELEMENT[dtype] + scales


class TierBytes(NamedTuple):
    """Bytes that leave ranks: within their node, and over the network between nodes."""

    intra_node: float
    inter_node: float


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTraffic:
    """The kept rows and token copies of one layer and micro-batch; dropped rows are neither sent nor computed.

    rows_RE: rows that expert e computes for rank r's tokens, `padded_rows` empty ones included.
    rank_copies_RD: distinct (token, destination rank) pairs, own rank included.
    node_copies_RM: distinct (token, destination node) pairs, own node included.
    node_of_rank_R: node of each rank, numbered 0..M-1 within the group.
    local_rank_R: rail of each rank: its index among the GPUs of its node.
    The counts are int64, or float64 in a counterfactual that spreads them evenly.
    """

    rows_RE: Array
    rank_copies_RD: Array
    node_copies_RM: Array
    node_of_rank_R: NDArray[np.int64]
    local_rank_R: NDArray[np.int64]
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
        rows_RE = np.concatenate([self.rows_RE, np.zeros_like(self.rows_RE[:, :1])], axis=1)
        assert placement.slot_experts_DP.min() >= EMPTY_SLOT
        return np.asarray(rows_RE[:, placement.slot_experts_DP].sum(axis=-1))

    def send_stages(
        self, placement: ExpertPlacement, deduplicate: Deduplicate, token_bytes: float
    ) -> tuple[Array, ...]:
        """Bytes from rank to rank, float64 [R, D] with zero diagonal, one matrix per stage of the dispatch.

        per_expert and per_rank: one stage. per_node: first one copy per distinct remote node to the GPU of the same
        rail there, beside the copies for ranks of the own node, which go straight over NVLink; then the fan-out from
        the rail's GPU to the token's ranks on that node. Combine uses the transposed matrices in reverse order.
        """
        if deduplicate == "per_node":
            return tuple(token_bytes * copies_RD for copies_RD in self._node_stages())
        copies_RD = self.rank_rows_RD(placement) if deduplicate == "per_expert" else self.rank_copies_RD
        return (token_bytes * _without_diagonal(copies_RD),)

    def send_bytes_RD(self, placement: ExpertPlacement, deduplicate: Deduplicate, token_bytes: float) -> Array:
        """Bytes from rank to rank, float64 [R, D] with zero diagonal, all stages together."""
        return np.asarray(sum(self.send_stages(placement, deduplicate, token_bytes)))

    def tier_bytes(self, placement: ExpertPlacement, deduplicate: Deduplicate, token_bytes: float) -> TierBytes:
        """Bytes within nodes and between nodes, all stages together."""
        bytes_RD = self.send_bytes_RD(placement, deduplicate, token_bytes)
        same_node_RD = self.node_of_rank_R[:, None] == self.node_of_rank_R
        return TierBytes(float(bytes_RD[same_node_RD].sum()), float(bytes_RD[~same_node_RD].sum()))

    def _node_stages(self) -> tuple[Array, Array]:
        num_ranks = len(self.node_of_rank_R)
        relay_RM = relay_ranks(self.node_of_rank_R, self.local_rank_R)
        same_node_RD = self.node_of_rank_R[:, None] == self.node_of_rank_R
        first_RD = np.where(same_node_RD, self.rank_copies_RD, 0).astype(np.float64)
        fan_out_RD = np.zeros((num_ranks, num_ranks))
        for source, node in zip(*np.nonzero(np.arange(relay_RM.shape[1]) != self.node_of_rank_R[:, None]), strict=True):
            relay = relay_RM[source, node]
            first_RD[source, relay] += self.node_copies_RM[source, node]
            members = np.flatnonzero(self.node_of_rank_R == node)
            fan_out_RD[relay, members] += self.rank_copies_RD[source, members]
        return _without_diagonal(first_RD), _without_diagonal(fan_out_RD)


def relay_ranks(node_of_rank_R: NDArray[np.int64], local_rank_R: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rank on each node that receives rank r's copies for the node, int64 [R, M].

    It is the rank of the same rail; a node with only part of the group that lacks the rail takes its ranks in turn.
    """
    num_nodes = int(node_of_rank_R.max()) + 1
    relay_RM = np.empty((len(node_of_rank_R), num_nodes), dtype=np.int64)
    for node in range(num_nodes):
        members = np.flatnonzero(node_of_rank_R == node)
        rail_of_member = local_rank_R[members]
        for rank, rail in enumerate(local_rank_R):
            same_rail = np.flatnonzero(rail_of_member == rail)
            relay_RM[rank, node] = members[same_rail[0] if len(same_rail) else rail % len(members)]
    return relay_RM


def _without_diagonal(copies_RD: Array) -> Array:
    off_diagonal = copies_RD.astype(np.float64)
    np.fill_diagonal(off_diagonal, 0.0)
    return off_diagonal
