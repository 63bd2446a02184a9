"""One routing sample of a step: the traffic of every layer, group and micro-batch, drawn by a `TrafficSampler`.

Legend: see `moesim.parallel.sample`.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.counts import device_keep_mask
from moesim.parallel.expert_map import ExpertMap
from moesim.parallel.mesh import GroupLayout
from moesim.parallel.placement import ExpertPlacement
from moesim.parallel.traffic import LayerTraffic
from moesim.scenario.routing import DeviceCapacity, ExpertCapacity
from moesim.trace.record import SequenceDraw

if TYPE_CHECKING:
    from moesim.parallel.sample import TrafficSampler

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class TrafficSample:
    """One routing sample of a step. Model layers are numbered among the MoE layers, from 0.

    `protected_BNU`: the sequences that device capacity never drops. `spread`: the counterfactual of equal loads.
    """

    sampler: "TrafficSampler"
    draw: SequenceDraw
    protected_BNU: NDArray[np.bool_]
    spread: bool = False
    _thin: dict[tuple[int, int, int], LayerTraffic] = field(init=False, default_factory=dict, repr=False)
    # The latest model layer made of a thin one, which the counterfactual asks for next: from which, its number, it.
    _latest: list[tuple[LayerTraffic, int, LayerTraffic]] = field(init=False, default_factory=list, repr=False)

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of the step."""
        return int(self.draw.sequences_BNU.shape[0])

    @property
    def placement(self) -> ExpertPlacement:
        """The experts of every model layer on the ranks of a group."""
        return self.sampler.placement

    def balanced(self) -> "TrafficSample":
        """The same sample with every layer's copies and time of computing spread evenly (`LayerTraffic.balanced`).

        It shares the counts of thin layers and the latest model layer with this one, and spreads them after
        relabelling: a model layer decides which copies stay on their own rank.
        """
        even = replace(self, spread=True)
        object.__setattr__(even, "_thin", self._thin)
        object.__setattr__(even, "_latest", self._latest)
        return even

    def arrays(self, group: int, model_layer: int, *, stage: int = 0) -> LayerTraffic:
        """The traffic of one expert-parallel group and MoE layer over all micro-batches."""
        thin = self.thin_arrays(group, self.sampler.counted_layer(model_layer), stage=stage)
        return self._model_layer(thin, model_layer)

    def same_traffic(self, group: int, other: int, *, stage: int = 0) -> bool:
        """Whether two expert groups drew the same pieces, lie on nodes in the same way and protect the same."""
        layouts = self.sampler.layouts[stage]
        first, second = layouts[group], layouts[other]
        alike = np.array_equal(first.node_of_rank_R, second.node_of_rank_R) and np.array_equal(
            first.local_rank_R, second.local_rank_R
        )
        if not alike or not np.array_equal(self.pieces_BRU(group, stage=stage), self.pieces_BRU(other, stage=stage)):
            return False
        data_R, other_R = (
            self._index_in_stage(which, stage) // len(self.sampler.pieces_RV) for which in (group, other)
        )
        return np.array_equal(self.protected_BNU[:, data_R], self.protected_BNU[:, other_R])

    def _model_layer(self, thin: LayerTraffic, model_layer: int) -> LayerTraffic:
        if not self._latest or self._latest[0][:2] != (thin, model_layer):
            arrays = thin.relabel(self.sampler.relabellings[model_layer], self.placement)
            self._latest[:] = [(thin, model_layer, arrays)]
        arrays = self._latest[0][2]
        return arrays.balanced(self.placement) if self.spread else arrays

    def map_of(self, model_layer: int) -> ExpertMap | None:
        """What the slots of a layer of the model hold; None where every expert has one slot, the same in all layers."""
        return self.sampler.map_of(model_layer)

    def slot_rows_BDP(self, group: int, model_layer: int, *, stage: int = 0) -> Array:
        """Rows that every (micro-batch, rank, slot) of one expert-parallel group and MoE layer computes."""
        return self.arrays(group, model_layer, stage=stage).slot_rows_BDP(self.placement)

    def pieces_BRU(self, group: int, *, stage: int = 0) -> NDArray[np.int64]:
        """The pieces of recorded sequences that every rank of a group holds in every micro-batch."""
        pieces_RV = self.sampler.pieces_RV
        data_R, place_R = np.divmod(self._index_in_stage(group, stage), len(pieces_RV))
        first_BRU = self.draw.sequences_BNU[:, data_R] * pieces_RV.size
        pieces_BRUV = first_BRU[..., None] + pieces_RV[place_R][:, None]
        return pieces_BRUV.reshape(*first_BRU.shape[:2], -1)

    def thin_arrays(self, group: int, layer: int, *, stage: int = 0) -> LayerTraffic:
        """The traffic of one counted layer with the trace's own expert numbers, or its slots; built once and kept."""
        stage = self._first_alike(group, stage)
        key = (stage, group, layer)
        if key not in self._thin:
            self._thin[key] = self._build(group, layer, stage)
        return self._thin[key]

    def _first_alike(self, group: int, stage: int) -> int:
        """The first stage on which the group lies on nodes in the same way: its traffic is the same there."""
        layouts = [stage_layouts[group] for stage_layouts in self.sampler.layouts]
        mine = (layouts[stage].node_of_rank_R.tobytes(), layouts[stage].local_rank_R.tobytes())
        return next(
            number
            for number, layout in enumerate(layouts)
            if (layout.node_of_rank_R.tobytes(), layout.local_rank_R.tobytes()) == mine
        )

    def _build(self, group: int, layer: int, stage: int) -> LayerTraffic:
        count = self._sum_pieces if self.sampler.counts_add_up else self._drop_and_count
        arrays = count(group, layer, stage)
        capacity = self.sampler.scenario.capacity
        if isinstance(capacity, ExpertCapacity) and capacity.pad:
            return arrays.pad(self.sampler.expert_rows, self.placement)
        return arrays

    def _index_in_stage(self, group: int, stage: int) -> NDArray[np.int64]:
        mesh = self.sampler.mesh
        return mesh.expert_groups(stage)[group] - mesh.rank(stage=stage, index=0)

    def _sum_pieces(self, group: int, layer: int, stage: int) -> LayerTraffic:
        layout = self.sampler.layouts[stage][group]
        pieces_BRU = self.pieces_BRU(group, stage=stage)
        sources = self.sampler.sources(layer, layout)
        counts = [(self.sampler.piece_counts(layer, layout, node=node), ranks) for node, ranks in sources]
        rows_BRE, rank_copies_BRD, node_copies_BRJ = (
            _of_ranks([(getattr(of_node, name), ranks) for of_node, ranks in counts], pieces_BRU)
            for name in ("rows_SE", "rank_copies_SD", "node_copies_SJ")
        )
        routed_B = counts[0][0].routed_S[pieces_BRU].sum(axis=(1, 2))
        return LayerTraffic.of(
            rows_BRE=rows_BRE,
            rank_copies_BRD=rank_copies_BRD,
            node_copies_BRJ=node_copies_BRJ,
            routed_rows_B=routed_B,
            dropped_rows_B=routed_B - rows_BRE.sum(axis=(1, 2)),
            padded_rows_B=np.zeros_like(routed_B),
            layout=layout,
        )

    def _drop_and_count(self, group: int, layer: int, stage: int) -> LayerTraffic:
        layout = self.sampler.layouts[stage][group]
        pieces_BRU = self.pieces_BRU(group, stage=stage)
        ids_STK = self.sampler.expert_ids_STK(layer)
        ranks, pieces = self.sampler.pieces_RV.shape
        protected_BRU = self.protected_BNU[:, self._index_in_stage(group, stage) // ranks].repeat(pieces, axis=2)
        counted, routed = [], []
        for pieces_RU, protected_RU in zip(pieces_BRU, protected_BRU, strict=True):
            kept_RTK = self._keep(layer, pieces_RU, protected_RU, layout)
            counted.append(self.sampler.count(kept_RTK, layout))
            routed.append(int(num_rows(ids_STK[pieces_RU.reshape(-1)]).sum()))
        rows_BRE, rank_copies_BRD, node_copies_BRJ = (np.stack(arrays) for arrays in zip(*counted, strict=True))
        return LayerTraffic.of(
            rows_BRE=rows_BRE,
            rank_copies_BRD=rank_copies_BRD,
            node_copies_BRJ=node_copies_BRJ,
            routed_rows_B=np.array(routed),
            dropped_rows_B=np.array(routed) - rows_BRE.sum(axis=(1, 2)),
            padded_rows_B=np.zeros(len(routed), dtype=np.int64),
            layout=layout,
        )

    def _keep(self, layer: int, pieces_RU: Array, protected_RU: Array, layout: GroupLayout) -> Array:
        """Experts (or slots) of the rows that a group keeps in one micro-batch, -1 for the others: a block per rank."""
        sampler, capacity = self.sampler, self.sampler.scenario.capacity
        pieces = pieces_RU.reshape(-1)
        ids_STK = sampler.expert_ids_STK(layer)[pieces]
        affinities_STK = sampler.affinities_STK(layer)[pieces]
        blocks = (len(pieces_RU), -1, ids_STK.shape[-1])
        ids_RTK = ids_STK.reshape(blocks)
        if isinstance(capacity, ExpertCapacity):
            kept_RTK = sampler.keep_by_expert(ids_RTK, affinities_STK.reshape(blocks))
            return sampler.to_slots(kept_RTK, layer, layout, layout.node_of_rank_R)
        assert isinstance(capacity, DeviceCapacity)
        slots_RTK = sampler.to_slots(ids_RTK, layer, layout, layout.node_of_rank_R)
        ranks_STK = sampler.ranks_STK(layer)[pieces] if sampler.maps is None else sampler.ranks_of(slots_RTK)
        keep_STK = device_keep_mask(
            ranks_STK.reshape(ids_STK.shape),
            affinities_STK,
            protected_S=protected_RU.reshape(-1),
            num_ranks=sampler.placement.num_ranks,
            factor=capacity.factor,
        )
        return np.where(keep_STK.reshape(ids_RTK.shape), slots_RTK, ids_STK.dtype.type(-1))


def _of_ranks(counts: list[tuple[Array, Any]], pieces_BRU: NDArray[np.int64]) -> Array:
    """[B, R, ...]: sums over each rank's pieces, of the counts [S, ...] that belong to its node."""
    if len(counts) == 1:
        return np.asarray(counts[0][0][pieces_BRU].sum(axis=2))
    sums = np.zeros((*pieces_BRU.shape[:2], *counts[0][0].shape[1:]), dtype=np.int64)
    for count, ranks in counts:
        sums[:, ranks] = count[pieces_BRU[:, ranks]].sum(axis=2)
    return sums


def num_rows(ids_STK: Array) -> NDArray[np.int64]:
    """Selections of every block of tokens that name an expert."""
    return np.asarray((ids_STK >= 0).sum(axis=(1, 2)))
