"""What one layer and micro-batch sends between the ranks of one expert-parallel group.

Legend: R source ranks, D destination ranks (the same ranks), E experts, M nodes that the group touches, P slots.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.mesh import GroupLayout
from moesim.parallel.placement import ExpertPlacement
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
    layout: the nodes and rails of the group's ranks.
    The counts are int64, or float64 in a counterfactual that spreads them evenly.
    """

    rows_RE: Array
    rank_copies_RD: Array
    node_copies_RM: Array
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
        rows_RE = np.concatenate([self.rows_RE, np.zeros_like(self.rows_RE[:, :1])], axis=1)
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
        same_node_RD = self.layout.same_node_RD
        return TierBytes(float(bytes_RD[same_node_RD].sum()), float(bytes_RD[~same_node_RD].sum()))

    def _node_stages(self) -> tuple[Array, Array]:
        layout = self.layout
        ranks = np.arange(layout.num_ranks)
        own_node_RD = np.where(layout.same_node_RD, self.rank_copies_RD, 0)
        network_RD = np.zeros(own_node_RD.shape)
        network_RD[ranks[:, None], layout.relay_RM] = self.node_copies_RM
        network_RD[layout.same_node_RD] = 0  # the own node's copies are not relayed
        relay_RD = layout.relay_RM[:, layout.node_of_rank_R]
        fan_out_RD = np.zeros(own_node_RD.shape)
        remote_RD = np.where(layout.same_node_RD, 0, self.rank_copies_RD)
        np.add.at(fan_out_RD, (relay_RD, np.broadcast_to(ranks, relay_RD.shape)), remote_RD)
        return _without_diagonal(network_RD + own_node_RD), _without_diagonal(fan_out_RD)


def _without_diagonal(copies_RD: Array) -> Array:
    off_diagonal = copies_RD.astype(np.float64)
    np.fill_diagonal(off_diagonal, 0.0)
    return off_diagonal
