"""The traffic of one layer and expert-parallel group over all the micro-batches of a step, as arrays.

Copies that travel from rank to rank, per stage of a dispatch, are the array form of `LayerTraffic.send_stages` (bytes
of one micro-batch). Legend: B micro-batches, R source ranks, D destination ranks (the same), E experts, J nodes, P
slots.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.mesh import GroupLayout
from moesim.parallel.placement import ExpertPlacement
from moesim.parallel.relabelling import Relabelling
from moesim.parallel.traffic import LayerTraffic, node_stages, ring_copies, sum_columns, without_diagonal
from moesim.scenario.dispatch import Deduplicate

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrafficArrays:
    """The counts of `LayerTraffic` with the micro-batch as a leading axis.

    `computed_BE`: rows that each expert computes, in the counterfactual; in all other traffic they are those of
    `rows_BRE`.
    """

    rows_BRE: Array
    rank_copies_BRD: Array
    node_copies_BRJ: Array
    routed_rows_B: NDArray[np.int64]
    dropped_rows_B: NDArray[np.int64]
    padded_rows_B: NDArray[np.int64]
    layout: GroupLayout
    computed_BE: Array | None = None

    def micro_batch(self, index: int) -> LayerTraffic:
        """The traffic of one micro-batch."""
        return LayerTraffic(
            rows_RE=self.rows_BRE[index],
            rank_copies_RD=self.rank_copies_BRD[index],
            node_copies_RJ=self.node_copies_BRJ[index],
            layout=self.layout,
            routed_rows=int(self.routed_rows_B[index]),
            dropped_rows=int(self.dropped_rows_B[index]),
            padded_rows=int(self.padded_rows_B[index]),
        )

    def select(self, index: slice) -> "TrafficArrays":
        """The micro-batches of a slice."""
        return replace(
            self,
            rows_BRE=self.rows_BRE[index],
            rank_copies_BRD=self.rank_copies_BRD[index],
            node_copies_BRJ=self.node_copies_BRJ[index],
            routed_rows_B=self.routed_rows_B[index],
            dropped_rows_B=self.dropped_rows_B[index],
            padded_rows_B=self.padded_rows_B[index],
        )

    def relabel(self, relabelling: Relabelling, placement: ExpertPlacement) -> "TrafficArrays":
        """The traffic of a model layer whose experts are the thin layer's in another order."""
        node_from_J = relabelling.node_from_J(placement, self.layout.node_of_rank_R)
        return replace(
            self,
            rows_BRE=self.rows_BRE[:, :, relabelling.expert_from_E],
            rank_copies_BRD=self.rank_copies_BRD[:, :, relabelling.rank_from_D],
            node_copies_BRJ=self.node_copies_BRJ[:, :, node_from_J],
        )

    def slot_rows_BDP(self, placement: ExpertPlacement) -> Array:
        """Rows that each (rank, slot) computes in each micro-batch; empty slots get 0."""
        rows_BE = self.rows_BRE.sum(axis=1) if self.computed_BE is None else self.computed_BE
        rows_BE = np.concatenate([rows_BE, np.zeros_like(rows_BE[:, :1])], axis=1)
        return np.asarray(rows_BE[:, placement.slot_experts_DP])

    def pad(self, capacity: int, placement: ExpertPlacement) -> "TrafficArrays":
        """Every (rank, expert) computes `capacity` rows; the empty ones are sent too, each as a copy of its own."""
        rank_of_expert_E = placement.rank_of_expert_E
        empty_BRE = capacity - self.rows_BRE
        assert (empty_BRE >= 0).all(), "capacity bounds the kept rows"
        empty_BRD = sum_columns(empty_BRE, rank_of_expert_E, self.rank_copies_BRD.shape[2])
        empty_BRJ = sum_columns(empty_BRD, self.layout.node_of_rank_R, self.node_copies_BRJ.shape[2])
        return replace(
            self,
            rows_BRE=self.rows_BRE + empty_BRE,
            rank_copies_BRD=self.rank_copies_BRD + empty_BRD,
            node_copies_BRJ=self.node_copies_BRJ + empty_BRJ,
            padded_rows_B=empty_BRE.sum(axis=(1, 2)),
        )

    def balanced(self, placement: ExpertPlacement) -> "TrafficArrays":
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
        rank_rows_BRD = sum_columns(self.rows_BRE, rank_of_expert_E, layout.num_ranks)
        class_RD = np.where(np.eye(layout.num_ranks, dtype=bool), 0, 1)
        if len(np.unique(np.bincount(layout.node_of_rank_R))) == 1:
            class_RD += ~layout.same_node_RD
        own_node_RJ = np.equal.outer(layout.node_of_rank_R, np.arange(layout.num_nodes))
        share_E = 1.0 / np.bincount(rank_of_expert_E, minlength=layout.num_ranks)[rank_of_expert_E]
        return replace(
            self,
            rows_BRE=_class_means(rank_rows_BRD, class_RD)[:, :, rank_of_expert_E] * share_E,
            rank_copies_BRD=_class_means(self.rank_copies_BRD, class_RD),
            node_copies_BRJ=_class_means(self.node_copies_BRJ, np.where(own_node_RJ, 0, 1)),
            computed_BE=self.rows_BRE.sum(axis=1),
        )


def balanced(traffic: LayerTraffic, placement: ExpertPlacement) -> LayerTraffic:
    """The counterfactual without imbalance of one layer and micro-batch; see `TrafficArrays.balanced`."""
    return arrays_of(traffic).balanced(placement).micro_batch(0)


def arrays_of(traffic: LayerTraffic) -> TrafficArrays:
    """One micro-batch as arrays of length one."""
    return TrafficArrays(
        rows_BRE=traffic.rows_RE[None],
        rank_copies_BRD=traffic.rank_copies_RD[None],
        node_copies_BRJ=traffic.node_copies_RJ[None],
        layout=traffic.layout,
        routed_rows_B=np.array([traffic.routed_rows]),
        dropped_rows_B=np.array([traffic.dropped_rows]),
        padded_rows_B=np.array([traffic.padded_rows]),
    )


def _class_means(values_BRX: Array, class_RX: NDArray[np.int64]) -> NDArray[np.float64]:
    """Every value replaced by the mean of its class in its micro-batch."""
    means_BRX = np.zeros(values_BRX.shape)
    for label in np.unique(class_RX):
        members = class_RX == label
        means_BRX[:, members] = values_BRX[:, members].mean(axis=1)[:, None]
    return means_BRX


def held_copies(
    arrays: TrafficArrays, placement: ExpertPlacement, deduplicate: Deduplicate, *, tokens: int = 0
) -> Array:
    """Copies of rank r's tokens (`tokens` of them) that rank d gets in the end, own rank included: [B, R, D]."""
    if deduplicate == "all_ranks":
        return np.full(arrays.rank_copies_BRD.shape, tokens, dtype=np.int64)
    if deduplicate == "per_expert":
        return sum_columns(arrays.rows_BRE, placement.rank_of_expert_E, placement.num_ranks)
    return arrays.rank_copies_BRD


def copies_out(held_BRD: Array, deduplicate: Deduplicate) -> Array:
    """Copies of its own tokens that a rank puts into its send buffer, [B, R]: for a gather each once."""
    return np.asarray(held_BRD[:, :, 0] if deduplicate == "all_ranks" else held_BRD.sum(axis=2))


def stage_copies(
    arrays: TrafficArrays, placement: ExpertPlacement, deduplicate: Deduplicate, *, tokens: int = 0
) -> tuple[NDArray[np.float64], ...]:
    """Copies sent from rank to rank, float64 [B, R, D] with zero diagonals, one array per stage of the dispatch.

    per_expert and per_rank: one stage. per_node: two (`node_stages`). all_ranks: one, round a ring (`ring_copies`).
    Combine uses the transposes in reverse order.
    """
    if deduplicate == "per_node":
        return node_stages(arrays.rank_copies_BRD, arrays.node_copies_BRJ, arrays.layout)
    if deduplicate == "all_ranks":
        batches, ranks, _ = arrays.rank_copies_BRD.shape
        return (np.broadcast_to(ring_copies(tokens, ranks), (batches, ranks, ranks)),)
    return (without_diagonal(held_copies(arrays, placement, deduplicate, tokens=tokens)),)
