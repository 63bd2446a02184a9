"""From a routing sample to the expert ids that a real run is forced to use.

Legend: B micro-batches, L MoE layers, T tokens of one rank and micro-batch, K selections, R ranks, E experts.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesim.parallel import ExpertPlacement, Mesh, TrafficArrays, TrafficSample, place_experts
from moesim.parallel.traffic import sum_columns
from moesim.scenario import Scenario

Ids = NDArray[np.int16]


def forced_ids(sample: TrafficSample, *, rank: int) -> list[list[Ids]]:
    """Ids [T, K] of one rank for every micro-batch and MoE layer: `ids[micro_batch][layer]`."""
    sampler, scenario = sample.sampler, sample.sampler.scenario
    group, index = divmod(rank, scenario.parallelism.expert)
    pieces_BU = sample.pieces_BRU(group)[:, index]
    new_of_old_LE = [np.argsort(relabelling.expert_from_E) for relabelling in sampler.relabellings]
    ids_BL = []
    for pieces_U in pieces_BU:
        layers = []
        for layer in range(scenario.model.moe_layers):
            old_TK = sampler.expert_ids_STK(layer % sampler.trace.num_layers)[pieces_U].reshape(
                -1, scenario.model.top_k
            )
            layers.append(new_of_old_LE[layer][old_TK].astype(np.int16))
        ids_BL.append(layers)
    return ids_BL


@dataclass(frozen=True, eq=False)
class RecordedRows:
    """A routing sample made of what a real run recorded: rows per expert of every rank, micro-batch and MoE layer.

    `rows_RBLE`: rows that each rank sent to each expert. It stands where `build_program` takes a `TrafficSample`; only
    one copy per (token, expert) can be derived from rows.
    """

    scenario: Scenario
    rows_RBLE: NDArray[np.int64]

    @cached_property
    def placement(self) -> ExpertPlacement:
        """The experts of every layer on the ranks of a group."""
        return place_experts(
            self.scenario.placement,
            num_experts=self.scenario.model.experts,
            num_ranks=self.scenario.parallelism.expert,
        )

    def map_of(self, model_layer: int) -> None:
        """Every expert has one slot, the same in all layers."""

    def same_traffic(self, group: int, other: int, *, stage: int = 0) -> bool:
        """Recorded rows are each rank's own."""
        return group == other

    def arrays(self, group: int, model_layer: int, *, stage: int = 0) -> TrafficArrays:
        """The traffic of one expert group and MoE layer over all micro-batches."""
        mesh = Mesh(self.scenario.parallelism, self.scenario.cluster)
        ranks_R = mesh.expert_groups()[group]
        layout = mesh.layout(ranks_R)
        rows_BRE = self.rows_RBLE[ranks_R, :, model_layer].transpose(1, 0, 2)
        to_ranks_BRD = sum_columns(rows_BRE, self.placement.rank_of_expert_E, layout.num_ranks)
        routed_B = rows_BRE.sum(axis=(1, 2))
        return TrafficArrays(
            rows_BRE=rows_BRE,
            rank_copies_BRD=to_ranks_BRD,
            node_copies_BRM=sum_columns(to_ranks_BRD, layout.node_of_rank_R, layout.num_nodes),
            routed_rows_B=routed_B,
            dropped_rows_B=np.zeros_like(routed_B),
            padded_rows_B=np.zeros_like(routed_B),
            layout=layout,
        )
