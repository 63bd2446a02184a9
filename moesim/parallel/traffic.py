"""What one layer sends between the ranks of one expert-parallel group, over all the micro-batches of a step.

Legend: B micro-batches, R source ranks, D destination ranks (the same ranks), E experts, J nodes that the group
touches, P slots.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.mesh import GroupLayout
from moesim.parallel.placement import ExpertPlacement, Relabelling
from moesim.scenario.base import BYTES_PER_ELEMENT, DType
from moesim.scenario.dispatch import Deduplicate

Array = NDArray[Any]
FloatArray = NDArray[np.float64]

FP8_SCALE_BLOCK = 128  # values that share one 4-byte scale


def token_bytes(hidden: int, dtype: DType) -> float:
    """Bytes of one token's hidden vector on the wire; fp8 carries one 4-byte scale per 128 values."""
    scales = 4 * math.ceil(hidden / FP8_SCALE_BLOCK) if dtype == "fp8" else 0
    return hidden * BYTES_PER_ELEMENT[dtype] + scales


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerTraffic:
    """The kept rows and token copies of one layer; dropped rows are neither sent nor computed.

    rows_BRE: rows that expert e gets of rank r's tokens, `padded_rows_B` empty ones included. They are most of the
    numbers, and most layers are asked for the other ones alone: `make_rows` makes them where they are wanted.
    computed_BE: rows that expert e computes, those of `rows_BRE` but in a counterfactual.
    rank_copies_BRD: distinct (token, destination rank) pairs, own rank included.
    node_copies_BRJ: distinct (token, destination node) pairs, own node included.
    layout: the nodes and rails of the group's ranks.
    The counts are int64, or float64 in a counterfactual that spreads them evenly (`is_even`), but for `computed_BE`.
    """

    make_rows: Callable[[], Array]
    computed_BE: Array
    rank_copies_BRD: Array
    node_copies_BRJ: Array
    routed_rows_B: NDArray[np.int64]
    dropped_rows_B: NDArray[np.int64]
    padded_rows_B: NDArray[np.int64]
    layout: GroupLayout
    is_even: bool = False

    @classmethod
    def of(cls, rows_BRE: Array, **others: Any) -> Self:
        """The traffic with these rows, all of which are computed."""
        return cls(make_rows=lambda: rows_BRE, computed_BE=rows_BRE.sum(axis=1), **others)

    @cached_property
    def rows_BRE(self) -> Array:
        """Rows by the rank of their token and their expert."""
        return self.make_rows()

    def relabel(self, relabelling: Relabelling, placement: ExpertPlacement) -> "LayerTraffic":
        """The traffic of a model layer whose experts are the thin layer's in another order."""
        node_from_J = relabelling.node_from_J(placement, self.layout.node_of_rank_R)
        return replace(  # `take` is several times as fast as indexing
            self,
            make_rows=lambda: self.rows_BRE.take(relabelling.expert_from_E, axis=2),
            computed_BE=self.computed_BE.take(relabelling.expert_from_E, axis=1),
            rank_copies_BRD=self.rank_copies_BRD.take(relabelling.rank_from_D, axis=2),
            node_copies_BRJ=self.node_copies_BRJ.take(node_from_J, axis=2),
        )

    def slot_rows_BDP(self, placement: ExpertPlacement) -> Array:
        """Rows that each (rank, slot) computes in each micro-batch; empty slots get 0."""
        rows_BE = np.concatenate([self.computed_BE, np.zeros_like(self.computed_BE[:, :1])], axis=1)
        return np.asarray(rows_BE[:, placement.slot_experts_DP])

    def pad(self, capacity: int, placement: ExpertPlacement) -> "LayerTraffic":
        """Every (rank, expert) computes `capacity` rows; the empty ones are sent too, each as a copy of its own."""
        rank_of_expert_E = placement.rank_of_expert_E
        empty_BRE = capacity - self.rows_BRE
        assert (empty_BRE >= 0).all(), "capacity bounds the kept rows"
        empty_BRD = sum_columns(empty_BRE, rank_of_expert_E, self.rank_copies_BRD.shape[2])
        empty_BRJ = sum_columns(empty_BRD, self.layout.node_of_rank_R, self.node_copies_BRJ.shape[2])
        rows_BRE = self.rows_BRE + empty_BRE
        return replace(
            self,
            make_rows=lambda: rows_BRE,
            computed_BE=rows_BRE.sum(axis=1),
            rank_copies_BRD=self.rank_copies_BRD + empty_BRD,
            node_copies_BRJ=self.node_copies_BRJ + empty_BRJ,
            padded_rows_B=empty_BRE.sum(axis=(1, 2)),
        )

    def balanced(self, placement: ExpertPlacement) -> "LayerTraffic":
        """The counterfactual without imbalance: the same kept rows and copies in total, spread evenly (float64).

        Totals are kept per micro-batch and per class of pair - own rank, another rank of the own node, a rank of
        another node - so that only the imbalance goes and the locality of the traffic stays. Where the group's ranks
        lie unevenly on nodes no such spread gives equal ranks: then all pairs but the own rank form one class.

        What travels is spread; the rows that experts compute stay, and it is the time for them that
        `moesim.program.writer` spreads over the ranks. Kernels round rows up to tiles: equal rows just below a multiple
        of a tile, or just above it, would be a fifth faster or slower than the mean of uneven ones, and an expert
        without rows spares its weights. None of that is due to balance.
        """
        layout, rank_of_expert_E = self.layout, placement.rank_of_expert_E
        class_RD = np.where(np.eye(layout.num_ranks, dtype=bool), 0, 1)
        if len(np.unique(np.bincount(layout.node_of_rank_R))) == 1:
            class_RD += ~layout.same_node_RD
        own_node_RJ = np.equal.outer(layout.node_of_rank_R, np.arange(layout.num_nodes))

        def rows() -> Array:
            share_E = 1.0 / np.bincount(rank_of_expert_E, minlength=layout.num_ranks)[rank_of_expert_E]
            rank_rows_BRD = sum_columns(self.rows_BRE, rank_of_expert_E, layout.num_ranks)
            return np.asarray(_class_means(rank_rows_BRD, class_RD)[:, :, rank_of_expert_E] * share_E)

        return replace(
            self,
            make_rows=rows,
            rank_copies_BRD=_class_means(self.rank_copies_BRD, class_RD),
            node_copies_BRJ=_class_means(self.node_copies_BRJ, np.where(own_node_RJ, 0, 1)),
            is_even=True,
        )


def _class_means(values_BRX: Array, class_RX: NDArray[np.int64]) -> NDArray[np.float64]:
    """Every value replaced by the mean of its class in its micro-batch."""
    means_BRX = np.zeros(values_BRX.shape)
    for label in np.unique(class_RX):
        members = class_RX == label
        np.copyto(means_BRX, values_BRX[:, members].mean(axis=1)[:, None, None], where=members)
    return means_BRX


def held_copies(
    traffic: LayerTraffic, placement: ExpertPlacement, deduplicate: Deduplicate, *, tokens: int = 0
) -> Array:
    """Copies of rank r's tokens (`tokens` of them) that rank d gets in the end, own rank included: [B, R, D]."""
    if deduplicate == "all_ranks":
        return np.full(traffic.rank_copies_BRD.shape, tokens, dtype=np.int64)
    if deduplicate == "per_expert":
        return sum_columns(traffic.rows_BRE, placement.rank_of_expert_E, placement.num_ranks)
    return traffic.rank_copies_BRD


def copies_out(held_BRD: Array, deduplicate: Deduplicate) -> Array:
    """Copies of its own tokens that a rank puts into its send buffer, [B, R]: for a gather each once."""
    return np.asarray(held_BRD[:, :, 0] if deduplicate == "all_ranks" else held_BRD.sum(axis=2))


def stage_copies(
    traffic: LayerTraffic, placement: ExpertPlacement, deduplicate: Deduplicate, *, tokens: int = 0
) -> tuple[NDArray[np.float64], ...]:
    """Copies sent from rank to rank, float64 [B, R, D] with zero diagonals, one array per stage of the dispatch.

    per_expert and per_rank: one stage. per_node: first one copy per distinct remote node to the GPU of the same rail
    there, beside the copies for ranks of the own node, which go straight over NVLink; then the fan-out from the rail's
    GPU to the token's ranks on that node. all_ranks: the `tokens` of every rank round a ring. Combine uses the
    transposes in reverse order.
    """
    if deduplicate == "per_node":
        return node_stages(traffic.rank_copies_BRD, traffic.node_copies_BRJ, traffic.layout)
    if deduplicate == "all_ranks":
        batches, ranks, _ = traffic.rank_copies_BRD.shape
        return (np.broadcast_to(ring_copies(tokens, ranks), (batches, ranks, ranks)),)
    return (without_diagonal(held_copies(traffic, placement, deduplicate, tokens=tokens)),)


class TierCopies(NamedTuple):
    """Copies that leave ranks: within their node, and over the network between nodes."""

    intra_node: float
    inter_node: float


def tier_copies(
    traffic: LayerTraffic, placement: ExpertPlacement, deduplicate: Deduplicate, *, tokens: int = 0
) -> TierCopies:
    """Copies sent within nodes and between nodes, all stages and micro-batches together; see `stage_copies`."""
    sent_RD = sum(stage_BRD.sum(axis=0) for stage_BRD in stage_copies(traffic, placement, deduplicate, tokens=tokens))
    same_node_RD = traffic.layout.same_node_RD
    return TierCopies(float(sent_RD[same_node_RD].sum()), float(sent_RD[~same_node_RD].sum()))


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
    for node, (members, remote, relay, from_relay) in enumerate(layout.into_nodes):
        first_RD[..., remote, relay] += node_copies_RJ[..., remote, node]
        fan_out_RD[..., members[:, None], members] = from_relay @ rank_copies_RD[..., remote[:, None], members]
    return without_diagonal(first_RD), without_diagonal(fan_out_RD)


def without_diagonal(copies_RD: Array) -> FloatArray:
    """The copies that travel, float64: those of a rank to itself do not."""
    return np.asarray(np.where(np.eye(copies_RD.shape[-1], dtype=bool), 0.0, copies_RD))
