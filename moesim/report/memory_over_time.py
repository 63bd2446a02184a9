"""The memory of one rank over the step, read off its spans: what micro-batches keep, on top of what always stays."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from moesim.results import RunRecord
from moesim.scenario import Scenario
from moesim.scenario.stage_split import stages_of_ranks

FREES = ("backward", "backward.weight")  # the passes behind which a micro-batch keeps nothing


def memory_events(record: RunRecord, pipeline_rank: int, place: int) -> Iterator[dict[str, Any]]:
    """Counter events of GiB by kind for the rank at `place` of expert group 0 of a pipeline rank.

    Activations of a micro-batch begin with its forward pass and end with its backward pass (the one for weights, where
    that is put off). Buffers and what lives inside one layer are not shown: see the table of the report.
    """
    table = record.pipeline_spans[pipeline_rank]
    kept_VBW, held = record.arrays["kept_bytes_PVBW"][pipeline_rank], record.arrays["held_bytes_P"][pipeline_rank]
    stages = stages_of_ranks(record.scenario.parallelism)[pipeline_rank]
    chunk_of_stage = {stage: chunk for chunk, stage in enumerate(stages)}
    changes: list[tuple[float, float]] = [(0.0, 0.0)]
    for action in table.actions:
        for name, micro_batch in zip(action.passes, action.micro_batches, strict=True):
            if name != "forward" and name not in FREES:
                continue
            rows_N = action.first + np.flatnonzero(table.micro_batch_N[action.first : action.last] == micro_batch)
            stage = _stage(record.scenario, max(table.labels[index].layer for index in table.label_N[rows_N]))
            kept = float(kept_VBW[chunk_of_stage[stage], micro_batch % kept_VBW.shape[1], place])
            if name == "forward":
                changes.append((float(table.start_NSR[rows_N, 0, place].min()), kept))
            else:
                changes.append((float(table.finish_NSR[rows_N, 0, place].max()), -kept))
    live = 0.0
    for when, change in sorted(changes):
        live += change
        args = {"states and reserved": round(held / 2**30, 3), "activations": round(max(live, 0.0) / 2**30, 3)}
        yield {"ph": "C", "name": "memory (GiB)", "pid": int(table.ranks_R[place]), "tid": 0,
               "ts": round(1e6 * when, 3), "args": args}  # fmt: skip


def _stage(scenario: Scenario, last_layer: int) -> int:
    """The stage of a pass by its last layer; prediction layers, and the head without layers, are on the last stage."""
    for stage, layers in enumerate(scenario.stage_layers):
        if last_layer in layers:
            return stage
    return 0 if last_layer < 0 and not scenario.stage_layers[0] else scenario.parallelism.num_stages - 1
