"""The simulation of a case, cut into the parts that a real run measures.

Legend: N spans in issue order, R ranks, B micro-batches, L MoE layers, E experts.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.engine import simulate_step, step_kernels
from moesim.program import build_program
from moesim.program.scenario_fabric import scenario_fabric, scenario_kernels
from moesim.results.spans import Label, Part, Phase, SpanTable, Stream
from moesim.validation.cases import Case
from moesim.validation.routing import RecordedRows

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
