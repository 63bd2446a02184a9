"""What every pipeline rank did when: the actions of its schedule, read off the spans of one rank each.

Legend: A actions and what follows them, N spans.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from moesim.results import ActionRows, SpanTable, Stream

FORWARD, BACKWARD, INPUT, WEIGHT = "forward", "backward", "backward.input", "backward.weight"
PAIR, REDUCE, UPDATE = "pair", "reduce", "update"


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
        own_N = table.micro_batch_N[rows] >= 0  # waiting for hand-offs belongs to no micro-batch
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
        if finish > start and label.stream in (Stream.REDUCTION, Stream.COMPUTE):
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
