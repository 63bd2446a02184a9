"""How long each pipeline rank works on a micro-batch: the slowest one sets the pace, the others wait for it.

Legend: S routing samples, R ranks of a group, P pipeline ranks.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.results.spans import SpanTable
from moesim.scenario import Scenario
from moesim.scenario.stage_split import stages_of_ranks

FloatArray = NDArray[np.float64]

UNEVEN = 0.05  # above which a run warns: slowest over mean


def action_seconds(table: SpanTable) -> FloatArray:
    """Seconds [S, R] from the first to the last span of each action, summed: waiting for p2p sends is not in it."""
    total_SR = np.zeros(table.start_NSR.shape[1:])
    for action in table.actions:
        own_N = np.flatnonzero(table.micro_batch_N[action.first : action.last] >= 0)
        if len(own_N):
            rows = slice(action.first + own_N[0], action.last)
            total_SR += table.finish_NSR[rows].max(axis=0) - table.start_NSR[rows].min(axis=0)
    return total_SR


def stage_facts(scenario: Scenario, busy_P: FloatArray) -> dict[str, Any]:
    """The section `stages` of a result; `busy_P`: mean seconds of all passes of the step on each pipeline rank.

    By pipeline rank: its stages, their numbers of layers (without those of multi-token prediction) and seconds per
    micro-batch, forward and backward, through all of them (under dualpipe each rank sees half of the micro-batches in
    each of its two). slowest_over_mean: 1 is perfectly even.
    """
    lengths = [len(layers) for layers in scenario.stage_layers]
    work, mesh = scenario.workload, scenario.parallelism
    seconds_P = busy_P / (work.global_batch / (mesh.data * work.micro_batch))  # of the mean of all ranks
    return {
        "slowest_over_mean": float(seconds_P.max() / seconds_P.mean()),
        "pipeline_ranks": [
            {
                "stages": list(stages),
                "layers": [lengths[stage] for stage in stages],
                "seconds_per_micro_batch": float(seconds),
            }
            for stages, seconds in zip(stages_of_ranks(scenario.parallelism), seconds_P, strict=True)
        ],
    }


def stage_warnings(found: Mapping[str, Any], *, listed: bool) -> list[str]:
    """Whether a rank holds up the others; `listed`: the scenario says which stage has how many layers."""
    excess = found["slowest_over_mean"] - 1.0
    if excess <= UNEVEN:
        return []
    seconds = [rank["seconds_per_micro_batch"] for rank in found["pipeline_ranks"]]
    slowest = int(np.argmax(seconds))
    remedy = (
        "leave parallelism.stages out to have them split by estimated time"
        if listed
        else "whole layers were split by estimated time; parallelism.stages takes another split"
    )
    return [
        f"pipeline rank {slowest} takes {max(seconds) * 1e3:.4g} ms for a micro-batch, {excess:.1%} more than the "
        f"mean, and the others wait for it; {remedy}"
    ]
