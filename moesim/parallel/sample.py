"""Routing samples of a whole step: from a trace and a plan to the traffic of every layer, group and micro-batch.

Where experts have copies, or layers differ, slots stand for experts (`moesim.parallel.expert_map`): rows are counted
by slot, and `placement` says on which rank a slot is. A counted layer is a layer of the trace, or of the model where
each has a map of its own.

Legend: L thin layers, B micro-batches, N data-parallel ranks, U sequences per rank and micro-batch (of a rank: their
pieces), V pieces of one sequence on a rank, S pieces of recorded sequences, T tokens per piece, K selections, R/D ranks
of an expert group, E experts or slots, J nodes, P slots of a rank.

A rank's tokens are whole sequences; under context or tensor parallelism the ranks of one data-parallel rank share
them, each with its own pieces (`moesim.parallel.mesh`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.parallel.counts import count_blocks, count_rows, expert_capacity, expert_keep_mask, ranks_of_rows
from moesim.parallel.expert_map import ExpertMap
from moesim.parallel.layer_maps import LayerMaps, PlacingRows, layer_maps
from moesim.parallel.mesh import GroupLayout, Mesh, pieces_of_ranks
from moesim.parallel.placement import (
    ExpertPlacement,
    Relabelling,
    draw_relabellings,
    identity_relabelling,
    place_experts,
)
from moesim.parallel.replacing import check_interval, loads_ago
from moesim.parallel.traffic_sample import TrafficSample, num_rows
from moesim.scenario import Scenario
from moesim.scenario.placement import MadeFromCounts, MadeFromRows
from moesim.scenario.routing import DeviceCapacity, ExpertCapacity
from moesim.seeding import stream
from moesim.trace.record import RoutingTrace, choose_protected, draw_sequences

Array = NDArray[Any]


class _PieceCounts(NamedTuple):
    """Counts of every piece of the trace in one counted layer, int64; they add up over pieces. E: experts or slots."""

    rows_SE: Array
    rank_copies_SD: Array
    node_copies_SJ: Array
    routed_S: Array


@dataclass(frozen=True, eq=False)
class TrafficSampler:
    """A trace laid out on a plan: prepared once, drawn from many times.

    Raises UserError when the trace does not fit the model, or is shorter than one sequence (two, where one part of it
    makes the placement and another one is simulated). `placed_ago`: training steps since the experts were placed; None:
    as the scenario's placement says.
    """

    scenario: Scenario
    trace: RoutingTrace
    placed_ago: float | None = None
    _counts: dict[tuple[int, bytes, int], _PieceCounts] = field(init=False, default_factory=dict, repr=False)
    _ranks: dict[int, Array] = field(init=False, default_factory=dict, repr=False)
    _maps: dict[int, ExpertMap] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        _check_fit(self.scenario, self.trace)
        if isinstance(self.scenario.placement, MadeFromCounts) and self.scenario.placement.every is not None:
            check_interval(self.trace, self.scenario.placement.every)
        assert self.pieces_per_sequence * self.piece_length == self.scenario.workload.sequence_length

    @cached_property
    def mesh(self) -> Mesh:
        """The plan's ranks."""
        return Mesh(self.scenario.parallelism, self.scenario.cluster)

    @cached_property
    def placement(self) -> ExpertPlacement:
        """The experts of every model layer, or its slots where there are `maps`, on the ranks of a group."""
        if self.maps is not None:
            return self.maps.maps[0].placement
        return place_experts(
            self.scenario.placement,
            num_experts=self.scenario.model.experts,
            num_ranks=self.scenario.parallelism.expert,
        )

    @cached_property
    def maps(self) -> LayerMaps | None:
        """Which slot holds which expert in every counted layer; None where each expert has its one place in all."""
        return self._maps_by(self.placing_rows)

    def maps_of(self, load_LE: Array) -> LayerMaps:
        """The maps that a placement made from rows of experts, and from these alone, would have with others."""
        maps = self._maps_by(lambda: PlacingRows(load_LE))
        assert maps is not None, "the placement is made from rows"
        return maps

    def _maps_by(self, rows: Callable[[], PlacingRows]) -> LayerMaps | None:
        return layer_maps(
            self.scenario,
            num_groups=self.trace.router.num_groups,
            num_layers=self.trace.num_layers,
            node_of_rank_D=self.layouts[0][0].node_of_rank_R,
            rows=rows,
        )

    def placing_rows(self) -> PlacingRows:
        """The rows of each layer of the trace, before dropping, in the part that places the experts."""
        ids_LSTK = self._all_sequences.final.expert_ids_LSTK[:, slice(*self.placing_sequences)]
        load_LE = count_rows(ids_LSTK, num_experts=self.trace.router.num_experts)
        if self.steps_ago:
            return PlacingRows(loads_ago(self.trace, load_LE, steps_ago=self.steps_ago))
        return PlacingRows(load_LE, ids_LSTK.reshape(len(ids_LSTK), -1, ids_LSTK.shape[-1]))

    @property
    def steps_ago(self) -> float:
        """Training steps since the experts were placed."""
        placement = self.scenario.placement
        if not isinstance(placement, MadeFromRows):
            return 0.0
        return placement.steps_ago if self.placed_ago is None else self.placed_ago

    @property
    def placing_sequences(self) -> tuple[int, int]:
        """First and last sequence (not included) that experts are placed by; none where the trace places nothing."""
        placement, half, last = self.scenario.placement, self._half, self._all_sequences.num_sequences
        if isinstance(placement, MadeFromRows):
            return (0, half) if placement.made_on == "earlier" else (half if placement.held_back else 0, last)
        return (0, 0)

    def placing_part(self) -> RoutingTrace:
        """The part of the trace that places the experts, as a trace of its own."""
        first, last = self.placing_sequences
        return some_sequences(self._all_sequences, first=first, last=last)

    @property
    def _half(self) -> int:
        return self._all_sequences.num_sequences // 2

    def counted_layer(self, model_layer: int) -> int:
        """The counted layer of a layer of the model with a router."""
        if self.maps is not None and self.maps.per_model_layer:
            return model_layer
        return model_layer % self.trace.num_layers

    def map_of(self, model_layer: int) -> ExpertMap | None:
        """What the slots of a layer of the model hold."""
        if self.maps is None:
            return None
        if model_layer not in self._maps:
            counted = self.maps.maps[self.counted_layer(model_layer)]
            self._maps[model_layer] = counted.reordered(self.relabellings[model_layer].expert_from_E)
        return self._maps[model_layer]

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
        """The simulated part of the trace, cut into sequences of the workload's length."""
        if not self.scenario.placement.held_back:
            return self._all_sequences
        return some_sequences(self._all_sequences, first=self._half)

    @cached_property
    def _all_sequences(self) -> RoutingTrace:
        whole = self.trace.resequence(self.scenario.workload.sequence_length)
        if self.scenario.placement.held_back and whole.num_sequences < 2:
            raise UserError(
                "placement: the second half of the trace's sequences is simulated, but it holds one sequence; use "
                "made_on: same and judged_on: all, or record more tokens"
            )
        return whole

    @cached_property
    def layouts(self) -> list[list[GroupLayout]]:
        """Nodes and rails of every expert-parallel group, by stage and group."""
        stages = range(self.scenario.parallelism.pipeline)
        return [[self.mesh.layout(ranks) for ranks in self.mesh.expert_groups(stage)] for stage in stages]

    @cached_property
    def relabellings(self) -> list[Relabelling]:
        """The expert permutation of every MoE layer of the model (prediction layers last).

        The same for every group, micro-batch and sample: it belongs to the model. A trace that has a layer of its own
        for each of the model's keeps its experts where they are. Slots that stand for experts know no router groups:
        the experts of a rank change places with those of another rank, whichever they are.
        """
        model = self.scenario.model
        num_layers = model.moe_layers + model.mtp_layers
        if self.trace.num_layers >= num_layers or (self.maps is not None and not self.maps.moved):
            return [identity_relabelling(self.placement)] * num_layers
        patterns = {layout.node_of_rank_R.tobytes(): layout for stage in self.layouts for layout in stage}
        return draw_relabellings(
            self.placement,
            num_groups=self.trace.router.num_groups if self.maps is None else 1,
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
            num_phases=self.sequences.num_phases,
        )
        capacity = self.scenario.capacity
        share = capacity.protected_share if isinstance(capacity, DeviceCapacity) else 0.0
        protected_BNU = choose_protected(draw.sequences_BNU.shape, share=share, rng=rng)
        return TrafficSample(self, draw, protected_BNU)

    def expert_ids_STK(self, layer: int) -> Array:
        """Experts that every piece selects in one counted layer, before dropping."""
        return self._pieces(self.sequences.final.expert_ids_LSTK[layer % self.trace.num_layers])

    def affinities_STK(self, layer: int) -> Array:
        """Affinities of the selections of every piece in one counted layer."""
        return self._pieces(self.sequences.final.affinities_LSTK[layer % self.trace.num_layers])

    def ranks_STK(self, layer: int) -> Array:
        """The rank of the group that computes each selection, where there are no `maps`; D where there is none."""
        assert self.maps is None, "which rank depends on the source"
        if layer not in self._ranks:
            self._ranks[layer] = self.ranks_of(self.expert_ids_STK(layer))
        return self._ranks[layer]

    def ranks_of(self, ids_NTK: Array) -> Array:
        """The ranks of experts, or of slots where there are `maps`; D for -1."""
        return ranks_of_rows(
            ids_NTK, rank_of_expert_E=self.placement.rank_of_expert_E, num_ranks=self.placement.num_ranks
        )

    def to_slots(self, ids_NTK: Array, layer: int, layout: GroupLayout, node_N: NDArray[np.int64]) -> Array:
        """The slots of experts in a counted layer; the ids themselves where there are no `maps`.

        `node_N`: the node of the group on which each block's tokens are.
        """
        if self.maps is None:
            return ids_NTK
        return self.maps.choice(layer, layout.node_of_rank_R).slots(ids_NTK, node_B=node_N)

    def sources(self, layer: int, layout: GroupLayout) -> list[tuple[int, Any]]:
        """(node, ranks on it) of ranks whose rows find their slots alike; one entry where all of a group's do."""
        if self.maps is None or not self.maps.choice(layer, layout.node_of_rank_R).by_node:
            return [(0, slice(None))]
        return [(node, np.flatnonzero(layout.node_of_rank_R == node)) for node in range(layout.num_nodes)]

    @cached_property
    def counts_add_up(self) -> bool:
        """Whether counts of pieces add up to those of a micro-batch: what is dropped depends on no other piece."""
        capacity, pieces = self.scenario.capacity, self.scenario.workload.micro_batch * self.pieces_RV.shape[1]
        return capacity.kind == "none" or (isinstance(capacity, ExpertCapacity) and pieces == 1)

    def piece_counts(self, layer: int, layout: GroupLayout, *, node: int = 0) -> _PieceCounts:
        """The counts of every piece on a node, made once per counted layer and way in which a group lies on nodes."""
        assert self.counts_add_up
        key = (layer, layout.node_of_rank_R.tobytes(), node)
        if key not in self._counts:
            ids_STK = self.expert_ids_STK(layer)
            kept_STK = ids_STK
            if isinstance(self.scenario.capacity, ExpertCapacity):
                kept_STK = self.keep_by_expert(ids_STK, self.affinities_STK(layer))
            kept_STK = self.to_slots(kept_STK, layer, layout, np.full(len(kept_STK), node))
            self._counts[key] = _PieceCounts(*self.count(kept_STK, layout), num_rows(ids_STK))
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
            num_experts=self.trace.router.num_experts,
            capacity=self.expert_rows,
            by=capacity.by,
        )
        return np.where(keep_NTK, ids_NTK, ids_NTK.dtype.type(-1))

    def _pieces(self, array_STK: Array) -> Array:
        return array_STK.reshape(-1, self.piece_length, array_STK.shape[-1])


def some_sequences(trace: RoutingTrace, *, first: int, last: int | None = None) -> RoutingTrace:
    """The trace with the sequences from number `first` up to `last` (not included) of its final step alone."""
    final, chosen = trace.final, slice(first, last)
    kept = replace(
        final,
        expert_ids_LSTK=final.expert_ids_LSTK[:, chosen],
        affinities_LSTK=final.affinities_LSTK[:, chosen],
        gates_LSTK=final.gates_LSTK[:, chosen],
    )
    return replace(trace, steps=(*trace.steps[:-1], kept))


def _check_fit(scenario: Scenario, trace: RoutingTrace) -> None:
    model, router = scenario.model, trace.router
    if router.num_experts != model.experts or router.top_k != model.top_k:
        raise UserError(
            f"the trace routes each token to {router.top_k} of {router.num_experts} experts, the model to "
            f"{model.top_k} of {model.experts}; use a trace of this model's expert layout"
        )
