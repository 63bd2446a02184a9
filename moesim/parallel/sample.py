"""Routing samples of a whole step: from a trace and a plan to the traffic of every layer, group and micro-batch.

Legend: L thin layers, B micro-batches, N data-parallel ranks, U sequences per rank and micro-batch (of a rank: their
pieces), V pieces of one sequence on a rank, S pieces of recorded sequences, T tokens per piece, K selections, R/D ranks
of an expert group, E experts, M nodes, P slots.

A rank's tokens are whole sequences; under context or tensor parallelism the ranks of one data-parallel rank share
them, each with its own pieces (`moesim.parallel.ownership`).
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.parallel.arrays import TrafficArrays
from moesim.parallel.counts import count_blocks
from moesim.parallel.dropping import device_keep_mask, expert_capacity, expert_keep_mask, ranks_of_rows
from moesim.parallel.mesh import GroupLayout, Mesh
from moesim.parallel.ownership import pieces_of_ranks
from moesim.parallel.placement import ExpertPlacement, place_experts
from moesim.parallel.relabelling import Relabelling, draw_relabellings, identity_relabelling
from moesim.parallel.traffic import LayerTraffic
from moesim.scenario import Scenario
from moesim.scenario.routing import DeviceCapacity, ExpertCapacity
from moesim.seeding import stream
from moesim.trace.record import RoutingTrace
from moesim.trace.sampling import SequenceDraw, choose_protected, draw_sequences

Array = NDArray[Any]


class _PieceCounts(NamedTuple):
    """Counts of every piece of the trace in one thin layer, int64; they add up over pieces."""

    rows_SE: Array
    rank_copies_SD: Array
    node_copies_SM: Array
    routed_S: Array


@dataclass(frozen=True, eq=False)
class TrafficSampler:
    """A trace laid out on a plan: prepared once, drawn from many times.

    Raises UserError when the trace does not fit the model, is shorter than one sequence, or has router groups that
    the placement splits.
    """

    scenario: Scenario
    trace: RoutingTrace
    _counts: dict[tuple[int, bytes], _PieceCounts] = field(init=False, default_factory=dict, repr=False)
    _ranks: dict[int, Array] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _check_fit(self.scenario, self.trace, self.placement)
        assert self.pieces_per_sequence * self.piece_length == self.scenario.workload.sequence_length

    @cached_property
    def mesh(self) -> Mesh:
        """The plan's ranks."""
        return Mesh(self.scenario.parallelism, self.scenario.cluster)

    @cached_property
    def placement(self) -> ExpertPlacement:
        """The experts of every model layer on the ranks of a group."""
        return place_experts(
            self.scenario.placement,
            num_experts=self.scenario.model.experts,
            num_ranks=self.scenario.parallelism.expert,
        )

    @cached_property
    def pieces_RV(self) -> NDArray[np.int64]:
        """The pieces of a sequence that each of the ranks sharing it holds."""
        return pieces_of_ranks(context=self.scenario.parallelism.context, tensor=self.scenario.parallelism.tensor)

    @property
    def pieces_per_sequence(self) -> int:
        """Pieces that a sequence is cut into."""
        return self.pieces_RV.size

    @property
    def piece_length(self) -> int:
        """Tokens of one piece."""
        return self.scenario.workload.sequence_length // self.pieces_per_sequence

    @cached_property
    def sequences(self) -> RoutingTrace:
        """The trace cut into sequences of the workload's length."""
        return self.trace.resequence(self.scenario.workload.sequence_length)

    @cached_property
    def layouts(self) -> list[list[GroupLayout]]:
        """Nodes and rails of every expert-parallel group, by stage and group."""
        stages = range(self.scenario.parallelism.pipeline)
        return [[self.mesh.layout(ranks) for ranks in self.mesh.expert_groups(stage)] for stage in stages]

    @cached_property
    def relabellings(self) -> list[Relabelling]:
        """The expert permutation of every MoE layer of the model (prediction layers last).

        The same for every group, micro-batch and sample: it belongs to the model. A trace that has a layer of its own
        for each of the model's keeps its experts where they are.
        """
        model = self.scenario.model
        num_layers = model.moe_layers + model.mtp_layers
        if self.trace.num_layers >= num_layers:
            return [identity_relabelling(self.placement)] * num_layers
        patterns = {layout.node_of_rank_R.tobytes(): layout for stage in self.layouts for layout in stage}
        return draw_relabellings(
            self.placement,
            num_groups=self.trace.router.num_groups,
            nodes_of_ranks=[layout.node_of_rank_R for layout in patterns.values()],
            generators=(stream(self.scenario.seed, "relabelling", layer) for layer in range(num_layers)),
        )

    @cached_property
    def expert_rows(self) -> int:
        """Rows per expert, rank and micro-batch under expert capacity."""
        capacity = self.scenario.capacity
        assert isinstance(capacity, ExpertCapacity)
        return expert_capacity(
            factor=capacity.factor,
            top_k=self.trace.router.top_k,
            num_tokens=self.scenario.workload.micro_batch * self.piece_length * self.pieces_RV.shape[1],
            num_experts=self.trace.router.num_experts,
        )

    def draw(self, rng: np.random.Generator, *, bootstrap: bool = False) -> "TrafficSample":
        """One routing sample of a step; with `bootstrap` from a trace resampled with replacement."""
        draw = draw_sequences(
            self.sequences.num_sequences,
            num_micro_batches=self.scenario.num_drawn_micro_batches,
            num_data_ranks=self.scenario.parallelism.data,
            micro_batch=self.scenario.workload.micro_batch,
            rng=rng,
            bootstrap=bootstrap,
        )
        capacity = self.scenario.capacity
        share = capacity.protected_share if isinstance(capacity, DeviceCapacity) else 0.0
        protected_BNU = choose_protected(draw.sequences_BNU.shape, share=share, rng=rng)
        return TrafficSample(self, draw, protected_BNU)

    def expert_ids_STK(self, thin_layer: int) -> Array:
        """Selections of every piece in one thin layer, before dropping."""
        return self._pieces(self.sequences.final.expert_ids_LSTK[thin_layer])

    def affinities_STK(self, thin_layer: int) -> Array:
        """Affinities of the selections of every piece in one thin layer."""
        return self._pieces(self.sequences.final.affinities_LSTK[thin_layer])

    def ranks_STK(self, thin_layer: int) -> Array:
        """The rank of the group that computes each selection; D where there is none."""
        if thin_layer not in self._ranks:
            self._ranks[thin_layer] = ranks_of_rows(
                self.expert_ids_STK(thin_layer),
                rank_of_expert_E=self.placement.rank_of_expert_E,
                num_ranks=self.placement.num_ranks,
            )
        return self._ranks[thin_layer]

    @cached_property
    def counts_add_up(self) -> bool:
        """Whether counts of pieces add up to those of a micro-batch: what is dropped depends on no other piece."""
        capacity, pieces = self.scenario.capacity, self.scenario.workload.micro_batch * self.pieces_RV.shape[1]
        return capacity.kind == "none" or (isinstance(capacity, ExpertCapacity) and pieces == 1)

    def piece_counts(self, thin_layer: int, layout: GroupLayout) -> _PieceCounts:
        """The counts of every piece, made once per thin layer and way in which a group lies on nodes."""
        assert self.counts_add_up
        key = (thin_layer, layout.node_of_rank_R.tobytes())
        if key not in self._counts:
            ids_STK = self.expert_ids_STK(thin_layer)
            kept_STK = ids_STK
            if isinstance(self.scenario.capacity, ExpertCapacity):
                kept_STK = self.keep_by_expert(ids_STK, self.affinities_STK(thin_layer))
            self._counts[key] = _PieceCounts(*self.count(kept_STK, layout), _num_rows(ids_STK))
        return self._counts[key]

    def count(self, kept_ids_NTK: Array, layout: GroupLayout) -> tuple[Array, Array, Array]:
        """Rows, rank copies and node copies of blocks of tokens."""
        return count_blocks(
            kept_ids_NTK, rank_of_expert_E=self.placement.rank_of_expert_E, node_of_rank_D=layout.node_of_rank_R
        )

    def keep_by_expert(self, ids_NTK: Array, affinities_NTK: Array) -> Array:
        """The ids with -1 for rows beyond their expert's capacity; a block is one rank's micro-batch."""
        capacity = self.scenario.capacity
        assert isinstance(capacity, ExpertCapacity)
        keep_NTK = expert_keep_mask(
            ids_NTK,
            affinities_NTK,
            num_experts=self.placement.num_experts,
            capacity=self.expert_rows,
            by=capacity.by,
        )
        return np.where(keep_NTK, ids_NTK, ids_NTK.dtype.type(-1))

    def _pieces(self, array_STK: Array) -> Array:
        return array_STK.reshape(-1, self.piece_length, array_STK.shape[-1])


@dataclass(frozen=True, eq=False)
class TrafficSample:
    """One routing sample of a step. Model layers are numbered among the MoE layers, from 0.

    `protected_BNU`: the sequences that device capacity never drops. `spread`: the counterfactual of equal loads.
    """

    sampler: TrafficSampler
    draw: SequenceDraw
    protected_BNU: NDArray[np.bool_]
    spread: bool = False
    _thin: dict[tuple[int, int, int], TrafficArrays] = field(init=False, default_factory=dict, repr=False)

    @property
    def num_distinct_sequences(self) -> int:
        """Different recorded sequences in the step."""
        return self.draw.num_distinct

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of the step."""
        return int(self.draw.sequences_BNU.shape[0])

    @property
    def placement(self) -> ExpertPlacement:
        """The experts of every model layer on the ranks of a group."""
        return self.sampler.placement

    def balanced(self) -> "TrafficSample":
        """The same sample with every layer's copies and time of computing spread evenly (`TrafficArrays.balanced`).

        It shares the counts of thin layers with this one, and spreads them after relabelling: a model layer decides
        which copies stay on their own rank.
        """
        even = replace(self, spread=True)
        object.__setattr__(even, "_thin", self._thin)
        return even

    def layer(self, group: int, micro_batch: int, model_layer: int, *, stage: int = 0) -> LayerTraffic:
        """The traffic of one expert-parallel group (of `stage`), micro-batch and MoE layer."""
        thin = self.thin_arrays(group, model_layer % self.sampler.trace.num_layers, stage=stage)
        one = thin.select(slice(micro_batch, micro_batch + 1))
        return self._model_layer(one, model_layer).micro_batch(0)

    def arrays(self, group: int, model_layer: int, *, stage: int = 0) -> TrafficArrays:
        """The traffic of one expert-parallel group and MoE layer over all micro-batches."""
        thin = self.thin_arrays(group, model_layer % self.sampler.trace.num_layers, stage=stage)
        return self._model_layer(thin, model_layer)

    def _model_layer(self, thin: TrafficArrays, model_layer: int) -> TrafficArrays:
        arrays = thin.relabel(self.sampler.relabellings[model_layer], self.placement)
        return arrays.balanced(self.placement) if self.spread else arrays

    def slot_rows_MDP(self, group: int, model_layer: int, *, stage: int = 0) -> Array:
        """Rows that every (micro-batch, rank, slot) of one expert-parallel group and MoE layer computes."""
        return self.arrays(group, model_layer, stage=stage).slot_rows_BDP(self.placement)

    def pieces_BRU(self, group: int, *, stage: int = 0) -> NDArray[np.int64]:
        """The pieces of recorded sequences that every rank of a group holds in every micro-batch."""
        pieces_RV = self.sampler.pieces_RV
        data_R, place_R = np.divmod(self._index_in_stage(group, stage), len(pieces_RV))
        first_BRU = self.draw.sequences_BNU[:, data_R] * pieces_RV.size
        pieces_BRUV = first_BRU[..., None] + pieces_RV[place_R][:, None]
        return pieces_BRUV.reshape(*first_BRU.shape[:2], -1)

    def thin_arrays(self, group: int, thin_layer: int, *, stage: int = 0) -> TrafficArrays:
        """The traffic of one thin layer with the trace's own expert numbers; built once and kept."""
        stage = self._first_alike(group, stage)
        key = (stage, group, thin_layer)
        if key not in self._thin:
            self._thin[key] = self._build(group, thin_layer, stage)
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

    def _build(self, group: int, thin_layer: int, stage: int) -> TrafficArrays:
        count = self._sum_pieces if self.sampler.counts_add_up else self._drop_and_count
        arrays = count(group, thin_layer, stage)
        capacity = self.sampler.scenario.capacity
        if isinstance(capacity, ExpertCapacity) and capacity.pad:
            return arrays.pad(self.sampler.expert_rows, self.placement)
        return arrays

    def _index_in_stage(self, group: int, stage: int) -> NDArray[np.int64]:
        mesh = self.sampler.mesh
        return mesh.expert_groups(stage)[group] - mesh.rank(stage=stage, index=0)

    def _sum_pieces(self, group: int, thin_layer: int, stage: int) -> TrafficArrays:
        layout = self.sampler.layouts[stage][group]
        counts = self.sampler.piece_counts(thin_layer, layout)
        pieces_BRU = self.pieces_BRU(group, stage=stage)
        rows_BRE = counts.rows_SE[pieces_BRU].sum(axis=2)
        routed_B = counts.routed_S[pieces_BRU].sum(axis=(1, 2))
        return TrafficArrays(
            rows_BRE=rows_BRE,
            rank_copies_BRD=counts.rank_copies_SD[pieces_BRU].sum(axis=2),
            node_copies_BRM=counts.node_copies_SM[pieces_BRU].sum(axis=2),
            routed_rows_B=routed_B,
            dropped_rows_B=routed_B - rows_BRE.sum(axis=(1, 2)),
            padded_rows_B=np.zeros_like(routed_B),
            layout=layout,
        )

    def _drop_and_count(self, group: int, thin_layer: int, stage: int) -> TrafficArrays:
        layout = self.sampler.layouts[stage][group]
        pieces_BRU = self.pieces_BRU(group, stage=stage)
        ids_STK = self.sampler.expert_ids_STK(thin_layer)
        ranks, pieces = self.sampler.pieces_RV.shape
        protected_BRU = self.protected_BNU[:, self._index_in_stage(group, stage) // ranks].repeat(pieces, axis=2)
        blocks = (len(pieces_BRU[0]), -1, ids_STK.shape[-1])
        counted, routed = [], []
        for pieces_RU, protected_RU in zip(pieces_BRU, protected_BRU, strict=True):
            kept_STK = self._keep(thin_layer, pieces_RU, protected_RU)
            counted.append(self.sampler.count(kept_STK.reshape(blocks), layout))
            routed.append(int(_num_rows(ids_STK[pieces_RU.reshape(-1)]).sum()))
        rows_BRE, rank_copies_BRD, node_copies_BRM = (np.stack(arrays) for arrays in zip(*counted, strict=True))
        return TrafficArrays(
            rows_BRE=rows_BRE,
            rank_copies_BRD=rank_copies_BRD,
            node_copies_BRM=node_copies_BRM,
            routed_rows_B=np.array(routed),
            dropped_rows_B=np.array(routed) - rows_BRE.sum(axis=(1, 2)),
            padded_rows_B=np.zeros(len(routed), dtype=np.int64),
            layout=layout,
        )

    def _keep(self, thin_layer: int, pieces_RU: Array, protected_RU: Array) -> Array:
        """The ids of the rows that a group keeps in one micro-batch, -1 for the others."""
        sampler, capacity = self.sampler, self.sampler.scenario.capacity
        pieces = pieces_RU.reshape(-1)
        ids_STK = sampler.expert_ids_STK(thin_layer)[pieces]
        affinities_STK = sampler.affinities_STK(thin_layer)[pieces]
        if isinstance(capacity, ExpertCapacity):
            blocks = (len(pieces_RU), -1, ids_STK.shape[-1])
            return sampler.keep_by_expert(ids_STK.reshape(blocks), affinities_STK.reshape(blocks))
        assert isinstance(capacity, DeviceCapacity)
        keep_STK = device_keep_mask(
            sampler.ranks_STK(thin_layer)[pieces],
            affinities_STK,
            protected_S=protected_RU.reshape(-1),
            num_ranks=sampler.placement.num_ranks,
            factor=capacity.factor,
        )
        return np.where(keep_STK, ids_STK, ids_STK.dtype.type(-1))


def sample_traffic(
    scenario: Scenario, trace: RoutingTrace, *, rng: np.random.Generator, bootstrap: bool = False
) -> TrafficSample:
    """One routing sample of a step. For several samples keep one `TrafficSampler` and draw from it."""
    return TrafficSampler(scenario, trace).draw(rng, bootstrap=bootstrap)


def _num_rows(ids_STK: Array) -> NDArray[np.int64]:
    return np.asarray((ids_STK >= 0).sum(axis=(1, 2)))


def _check_fit(scenario: Scenario, trace: RoutingTrace, placement: ExpertPlacement) -> None:
    model, router = scenario.model, trace.router
    if router.num_experts != model.experts or router.top_k != model.top_k:
        raise UserError(
            f"the trace routes each token to {router.top_k} of {router.num_experts} experts, the model to "
            f"{model.top_k} of {model.experts}; use a trace of this model's expert layout"
        )
    if router.num_groups > 1 and placement.splits_groups(router.num_groups):
        raise UserError(
            f"the placement splits the trace's {router.num_groups} router groups over ranks that also hold parts of "
            "other groups; use placement: {kind: contiguous}"
        )
