"""What is read off the spans of a run: one layer, the actions of every pipeline rank, memory over the step.

Legend: N spans, R ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.results import ActionRows, RunRecord, SpanTable, Stream
from moesim.results.spans import Collective
from moesim.scenario import Scenario
from moesim.scenario.stages import stages_of_ranks

FORWARD, BACKWARD, INPUT, WEIGHT = "forward", "backward", "backward.input", "backward.weight"
PAIR, REDUCE, UPDATE = "pair", "reduce", "update"
FREES = BACKWARD, WEIGHT  # the passes behind which a micro-batch keeps nothing


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Spans of one layer and micro-batch in sample 0; times are seconds from the start of the step.

    A transfer is two pieces, waiting for its peers and its own part, as the attribution counts it.
    """

    layer: int
    names_N: tuple[str, ...]
    categories_N: tuple[str, ...]
    on_network_N: NDArray[np.bool_]
    start_NR: NDArray[np.float64]
    finish_NR: NDArray[np.float64]


def forward_of_one_layer(table: SpanTable) -> Window | None:
    """The forward pass of the first micro-batch in the middle one of the layers with a dispatch.

    Any layer will do in a dense model. None when no span belongs to a layer.
    """
    labels_N = [table.labels[index] for index in table.label_N]
    routed = sorted({label.layer for label in labels_N if label.layer >= 0 and label.category == "dispatch_exposed"})
    layers = routed or sorted({label.layer for label in labels_N if label.layer >= 0})
    if not layers:
        return None
    layer = layers[len(layers) // 2]
    first_pass = table.micro_batch_N == min(table.micro_batch_N[[label.layer == layer for label in labels_N]])
    rows = [row for row, label in enumerate(labels_N) if label.layer == layer and first_pass[row]]
    forward = rows[: next((i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1), len(rows))]
    return _pieces(table, forward, layer)


def _pieces(table: SpanTable, rows: list[int], layer: int) -> Window:
    names, categories, on_network, starts, finishes = [], [], [], [], []
    for row in rows:
        label = table.labels[table.label_N[row]]
        start_R, finish_R = table.start_NSR[row, 0], table.finish_NSR[row, 0]
        pieces = [(label.category, start_R, finish_R)]
        if label.stream is Stream.COMMUNICATION:
            arrived_R = finish_R - np.minimum(table.own_NSR[row, 0], finish_R - start_R)
            pieces = [("imbalance_wait", start_R, arrived_R), (label.category, arrived_R, finish_R)]
        for category, begin_R, end_R in pieces:
            names.append(label.name)
            categories.append(category)
            on_network.append(label.stream is Stream.COMMUNICATION)
            starts.append(begin_R)
            finishes.append(end_R)
    return Window(
        layer=layer,
        names_N=tuple(names),
        categories_N=tuple(categories),
        on_network_N=np.array(on_network),
        start_NR=np.array(starts),
        finish_NR=np.array(finishes),
    )


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One action of one pipeline rank, seconds from the start of the step. `micro_batches` is empty behind the last."""

    pipeline_rank: int
    kind: str
    micro_batches: tuple[int, ...]
    start: float
    finish: float


def gantt(tables: Sequence[SpanTable]) -> tuple[Bar, ...]:
    """The bars of all pipeline ranks in order of time per rank: of the first rank of expert group 0, sample 0."""
    return tuple(bar for pipeline_rank, table in enumerate(tables) for bar in _bars(table, pipeline_rank))


def _bars(table: SpanTable, pipeline_rank: int) -> Iterator[Bar]:
    for action in table.actions:
        rows = slice(action.first, action.last)
        own_N = table.micro_batch_N[rows] >= 0  # waiting for p2p sends belongs to no micro-batch
        if own_N.any():
            start, finish = table.start_NSR[rows, 0, 0][own_N].min(), table.finish_NSR[rows, 0, 0][own_N].max()
            yield Bar(
                pipeline_rank=pipeline_rank,
                kind=_kind(action),
                micro_batches=action.micro_batches,
                start=float(start),
                finish=float(finish),
            )
    first = table.actions[-1].last if table.actions else 0
    for row in range(first, len(table.label_N)):
        label = table.labels[table.label_N[row]]
        start, finish = float(table.start_NSR[row, 0, 0]), float(table.finish_NSR[row, 0, 0])
        waits = label.stream is Stream.REDUCTION and label.collective is Collective.NONE
        if finish > start and label.stream in (Stream.REDUCTION, Stream.COMPUTE) and not waits:
            kind = REDUCE if label.stream is Stream.REDUCTION else UPDATE
            yield Bar(pipeline_rank=pipeline_rank, kind=kind, micro_batches=(), start=start, finish=finish)


def _kind(action: ActionRows) -> str:
    """A pair where passes overlap; what is neither forward nor backward (copies of gradients) belongs to the update."""
    if len(action.passes) > 1:
        return PAIR
    known = (FORWARD, BACKWARD, INPUT, WEIGHT)
    return action.passes[0] if action.passes[0] in known else UPDATE


def idle_share(bars: Sequence[Bar], *, pipeline_rank: int) -> float:
    """Share of the time of the schedule, first start of any rank to the last pass, in which a rank has no action."""
    passes = [bar for bar in bars if bar.kind not in (REDUCE, UPDATE)]
    begin, end = min(bar.start for bar in passes), max(bar.finish for bar in passes)
    busy = np.sum([bar.finish - bar.start for bar in passes if bar.pipeline_rank == pipeline_rank])
    return float(1.0 - busy / (end - begin))


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
