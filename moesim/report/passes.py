"""The passes of a run, read off its spans: one layer rank by rank, and the actions of every pipeline rank.

Legend: N spans, R ranks of a group, A actions of the schedule.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.report.categories import BACKWARD, FORWARD, INPUT, PAIR, REDUCE, UPDATE, WEIGHT
from moesim.results import ActionRows, SpanTable, Stream
from moesim.results.spans import Collective


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
    return _waits_and_work(table, forward, layer)


def _waits_and_work(table: SpanTable, rows: list[int], layer: int) -> Window:
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
