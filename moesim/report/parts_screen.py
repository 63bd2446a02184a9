"""`moesim run --parts`: how long each kind of pass takes, what ends the step, and how long a rank idles."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from moesim.report.figures import PASSES
from moesim.report.screen import number_table, section, show
from moesim.report.span_views import Bar, gantt
from moesim.results import RunRecord


@dataclass(frozen=True, kw_only=True)
class StepPart:
    """One kind of pass, of all pipeline ranks (the first rank of expert group 0, sample 0).

    count: passes of a pipeline rank, mean of all. middle_s, least_s, most_s: median, smallest and largest seconds of
    one pass; total_s: seconds of a pipeline rank, mean of all.
    """

    name: str
    count: float
    middle_s: float
    least_s: float
    most_s: float
    total_s: float


def step_parts(record: RunRecord) -> list[StepPart]:
    """The parts of the step in the order of a schedule, and last what is idle: they add up to the step on average."""
    bars = gantt(record.pipeline_spans)
    num_ranks = len(record.pipeline_spans)
    parts = []
    for kind, (label, _) in PASSES.items():
        seconds = np.array([bar.finish - bar.start for bar in bars if bar.kind == kind])
        if len(seconds):
            parts.append(_part(label, seconds, num_ranks=num_ranks))
    end = max(bar.finish for bar in bars)
    idle_P = end - np.array([_covered(bars, rank) for rank in range(num_ranks)])
    return [*parts, _part("idle (bubble, waiting for other ranks)", idle_P, num_ranks=num_ranks)]


def _part(name: str, seconds: NDArray[np.float64], *, num_ranks: int) -> StepPart:
    return StepPart(
        name=name,
        count=len(seconds) / num_ranks,
        middle_s=float(np.median(seconds)),
        least_s=float(seconds.min()),
        most_s=float(seconds.max()),
        total_s=float(seconds.sum() / num_ranks),
    )


def _covered(bars: Sequence[Bar], rank: int) -> float:
    """Seconds in which a pipeline rank has a pass, a reduction or an update; those that overlap count once."""
    spans = sorted((bar.start, bar.finish) for bar in bars if bar.pipeline_rank == rank)
    covered, until = 0.0, 0.0
    for start, finish in spans:
        covered += max(0.0, finish - max(start, until))
        until = max(until, finish)
    return covered


def print_parts(record: RunRecord, *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print the parts as a table, in milliseconds."""
    rows = [
        (part.name, f"{part.count:g}", *(f"{1e3 * value:.4g}" for value in _shown(part))) for part in step_parts(record)
    ]
    head = ("", "times", "median", "from", "to", "together")
    title = "parts of the step on a pipeline rank, ms"
    show(lambda options: [section(title, number_table(head, rows))], file=file, width=width)


def _shown(part: StepPart) -> tuple[float, ...]:
    return part.middle_s, part.least_s, part.most_s, part.total_s
