"""The simulation of a case on the rows that a real run recorded, cut into the parts that such a run measures.

Legend: N spans in issue order, R ranks, B micro-batches, L MoE layers, E experts.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.engine import simulate_step, step_kernels
from moesim.parallel import ExpertPlacement, LayerTraffic, Mesh, place_experts
from moesim.parallel.traffic import sum_columns
from moesim.program import build_program
from moesim.program.scenario_fabric import scenario_fabric, scenario_kernels
from moesim.results.spans import Label, Part, Phase, SpanTable, Stream
from moesim.scenario import Scenario
from moesim.validation.cases import Case


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

    def arrays(self, group: int, model_layer: int, *, stage: int = 0) -> LayerTraffic:
        """The traffic of one expert group and MoE layer over all micro-batches."""
        mesh = Mesh(self.scenario.parallelism, self.scenario.cluster)
        ranks_R = mesh.expert_groups()[group]
        layout = mesh.layout(ranks_R)
        rows_BRE = self.rows_RBLE[ranks_R, :, model_layer].transpose(1, 0, 2)
        to_ranks_BRD = sum_columns(rows_BRE, self.placement.rank_of_expert_E, layout.num_ranks)
        routed_B = rows_BRE.sum(axis=(1, 2))
        return LayerTraffic.of(
            rows_BRE=rows_BRE,
            rank_copies_BRD=to_ranks_BRD,
            node_copies_BRJ=sum_columns(to_ranks_BRD, layout.node_of_rank_R, layout.num_nodes),
            routed_rows_B=routed_B,
            dropped_rows_B=np.zeros_like(routed_B),
            padded_rows_B=np.zeros_like(routed_B),
            layout=layout,
        )


BACKWARD = (Phase.INPUT_GRADIENT, Phase.WEIGHT_GRADIENT, Phase.RECOMPUTE)
LAYER_PARTS = {
    Part.ROUTER: "router",
    Part.PERMUTE: "permute",
    Part.ROW_COUNTS: "dispatch",
    Part.DISPATCH: "dispatch",
    Part.EXPERTS: "experts",
    Part.COMBINE: "combine",
    Part.SHARED_EXPERTS: "shared",
}


def predict(case: Case, rows_RBLE: ArrayLike) -> dict[str, Any]:
    """Step seconds, seconds of its parts (mean over ranks), of the parts of all MoE layers together, of waiting in
    transfers, and what meetings are later for jitter.

    `rows_RBLE`: the rows that each rank sent to each expert in the real run, by micro-batch and MoE layer.
    """
    scenario = case.scenario
    samples = [RecordedRows(scenario, np.asarray(rows_RBLE, dtype=np.int64))] if scenario.model.experts else []
    kernels = scenario_kernels(scenario)
    fabric = scenario_fabric(scenario, kernels)
    kernels = step_kernels(scenario, fabric=fabric, kernels=kernels, samples=samples)
    program = build_program(scenario, fabric=fabric, kernels=kernels, samples=samples)
    outcome = simulate_step(program)
    tables = [_cut(table) for table in outcome.tables]
    weights = [len(table.ranks_R) for table in outcome.tables]
    return {
        "step": float(outcome.step_S[0]),
        "parts": _mean([parts for parts, _ in tables], weights),
        "layer_parts": _mean([layers for _, layers in tables], weights),
        "waiting": float(np.average([_waiting(table) for table in outcome.tables], weights=weights)),
        "jitter": float(np.mean([late_SR.mean() for late_SR in outcome.late_gSR])) if outcome.late_gSR else 0.0,
    }


def _cut(table: SpanTable) -> tuple[dict[str, float], dict[str, float]]:
    """Every span with the idle time before it belongs to its part; of spans that overlap, by what each ends later."""
    parts = dict.fromkeys(("forward", "backward", "reduction", "optimizer"), 0.0)
    layers: dict[str, float] = {}
    finish_NR = table.finish_NSR[:, 0]
    elapsed_N = np.diff(np.maximum.accumulate(finish_NR, axis=0), axis=0, prepend=0.0).mean(axis=1)
    for row, seconds in _with_stalls(table, elapsed_N):
        label = table.labels[row]
        parts[_part_of_step(label)] += seconds
        part = LAYER_PARTS.get(label.part)
        if part is not None and label.layer >= 0:
            key = f"{'backward' if label.phase in BACKWARD else 'forward'}.{part}"
            layers[key] = layers.get(key, 0.0) + seconds
    return parts, layers


def _waiting(table: SpanTable) -> float:
    """Seconds that a rank stands in transfers before its own part begins, in the mean."""
    rows_N = table.rows(Stream.COMMUNICATION)
    wait_NR = (table.finish_NSR[rows_N] - table.start_NSR[rows_N] - table.own_NSR[rows_N])[:, 0]
    return float(wait_NR.sum(axis=0).mean())


def _with_stalls(table: SpanTable, elapsed_N: NDArray[np.float64]) -> list[tuple[int, float]]:
    """(label, seconds) of every operation, a stall for the host counted to the operation that waited."""
    found, stalled = [], 0.0
    for label, seconds in zip(table.label_N.tolist(), elapsed_N.tolist(), strict=True):
        if table.labels[label].part is Part.STALL:
            stalled += seconds
        else:
            found.append((label, seconds + stalled))
            stalled = 0.0
    return found


def _part_of_step(label: Label) -> str:
    if label.phase is Phase.OPTIMIZER:
        return "optimizer"
    if label.phase in BACKWARD:
        return "backward"
    return "reduction" if label.part is Part.GRADIENTS else "forward"


def _mean(rows: list[dict[str, float]], weights: list[int]) -> dict[str, float]:
    return {key: float(np.average([row[key] for row in rows], weights=weights)) for key in rows[0]}
