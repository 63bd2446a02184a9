"""Rows and copies of every rank, layer and micro-batch: what makes the memory of a rank depend on its routing.

Legend: S routing samples, L MoE layers of the model (prediction layers last), B micro-batches with rows of their own
(micro-batch m of the step has those of m mod B), W ranks of one pipeline stage, D ranks of an expert group.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.parallel.mesh import Mesh
from moesim.parallel.traffic import copies_out, held_copies
from moesim.parallel.traffic_sample import TrafficSample
from moesim.scenario import Scenario
from moesim.scenario.placement import keeps_groups

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedRows:
    """rows_SLBW: rows that a rank computes. copies_out_SLBW, copies_in_SLBW: copies that it sends and that reach it.

    Copies for itself are counted on both sides. Arrays of no layers describe a dense model.
    """

    rows_SLBW: Array
    copies_out_SLBW: Array
    copies_in_SLBW: Array

    @property
    def num_samples(self) -> int:
        """Routing samples."""
        return int(self.rows_SLBW.shape[0])


def routed_rows(scenario: Scenario, samples: Sequence[TrafficSample]) -> RoutedRows:
    """Counted from routing samples; without samples (a dense model) from `even_rows`.

    Every pipeline stage draws the same sequences, so that the ranks of one stage stand for those of all.
    """
    if not samples:
        return even_rows(scenario)
    mesh = Mesh(scenario.parallelism, scenario.cluster)
    layers = scenario.model.moe_layers + scenario.model.mtp_layers
    shape = (len(samples), layers, samples[0].num_micro_batches, mesh.stage_ranks)
    out = RoutedRows(
        rows_SLBW=np.zeros(shape, dtype=np.float32),
        copies_out_SLBW=np.zeros(shape, dtype=np.float32),
        copies_in_SLBW=np.zeros(shape, dtype=np.float32),
    )
    for number, sample in enumerate(samples):
        for group, ranks_D in enumerate(mesh.expert_groups()):
            _count_group(out, scenario, sample, number=number, group=group, ranks_D=ranks_D)
    return out


def _count_group(
    out: RoutedRows, scenario: Scenario, sample: TrafficSample, *, number: int, group: int, ranks_D: Array
) -> None:
    placement = sample.placement
    counts: dict[int, tuple[Array, Array, Array]] = {}
    for layer in range(out.rows_SLBW.shape[1]):
        thin = sample.sampler.counted_layer(layer)
        if thin not in counts:
            arrays = sample.thin_arrays(group, thin)
            deduplicate = scenario.dispatch.deduplicate
            held_BRD = held_copies(arrays, placement, deduplicate, tokens=scenario.tokens_per_rank)
            rows_BD = arrays.slot_rows_BDP(placement).sum(axis=2)
            counts[thin] = rows_BD, copies_out(held_BRD, deduplicate), held_BRD.sum(axis=1)
        rows_BD, out_BR, in_BD = counts[thin]
        rank_from_D = sample.sampler.relabellings[layer].rank_from_D  # relabelling moves whole ranks
        out.rows_SLBW[number, layer][:, ranks_D] = rows_BD[:, rank_from_D]
        out.copies_out_SLBW[number, layer][:, ranks_D] = out_BR
        out.copies_in_SLBW[number, layer][:, ranks_D] = in_BD[:, rank_from_D]


def even_rows(scenario: Scenario) -> RoutedRows:
    """One sample of equal loads without drops: T K rows a rank, and as many copies of a token as it can need at most.

    That is min(K, D) with deduplication, or fewer where a router's groups are ranks; K without. A gather brings all.
    """
    model, mesh = scenario.model, scenario.parallelism
    tokens = float(scenario.tokens_per_rank)
    copies = model.top_k
    if scenario.dispatch.deduplicate == "all_ranks":
        return _alike(scenario, rows=tokens * model.top_k, copies=tokens, copies_in=tokens * mesh.expert)
    if model.experts and scenario.dispatch.deduplicate != "per_expert":
        copies = min(copies, mesh.expert)
        router = scenario.router_shape()
        slots = scenario.placement.fixed_slots(num_experts=model.experts, num_ranks=mesh.expert)
        whole = slots is not None and keeps_groups(slots, num_groups=router.num_groups)
        if router.num_groups >= mesh.expert and whole:
            copies = min(copies, router.group_limit)
    return _alike(scenario, rows=tokens * model.top_k, copies=tokens * copies)


def no_rows(scenario: Scenario) -> RoutedRows:
    """One sample in which nothing is routed: what memory needs at least, whatever the routing."""
    return _alike(scenario, rows=0.0, copies=0.0)


def _alike(scenario: Scenario, *, rows: float, copies: float, copies_in: float | None = None) -> RoutedRows:
    model = scenario.model
    layers = (model.moe_layers + model.mtp_layers) * bool(model.experts)
    shape = (1, layers, 1, scenario.parallelism.stage_ranks)
    return RoutedRows(
        rows_SLBW=np.full(shape, rows),
        copies_out_SLBW=np.full(shape, copies),
        copies_in_SLBW=np.full(shape, copies if copies_in is None else copies_in),
    )


RowsOf = Callable[[Scenario], RoutedRows]
