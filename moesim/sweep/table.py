"""What `moesim sweep` prints: the points before it starts, and the table at the end, repeated points averaged."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moesim.study import PointRecord
from moesim.sweep.metrics import METRICS, Column, columns
from moesim.sweep.run import SweepOutcome
from moesim.sweep.study import Misfit, Study

# Student's t: 95 % quantiles for 1, 2, ... degrees of freedom (two-sided 90 %).
_T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)
_T95_BEYOND = 1.75
_WIDEST_REASON = 160
_WIDEST_TABLE = 1000
_NO_SPREAD = 1e-4  # of the mean: a narrower interval is not shown


@dataclass(frozen=True)
class Mean:
    """Mean of repeated values; `half_width` of its 90 % interval (Student's t), None for a single value."""

    value: float
    half_width: float | None


def mean_interval(values: Sequence[float]) -> Mean:
    """Mean and 90 % interval of independent repetitions."""
    if len(values) < 2:
        return Mean(values[0], None)
    degrees = len(values) - 1
    quantile = _T95[degrees - 1] if degrees <= len(_T95) else _T95_BEYOND
    return Mean(statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values)))


def print_sweep(study: Study, outcome: SweepOutcome, *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print the table: a row per point, repeated ones averaged; the best value of a column is marked with *."""
    console = Console(file=file, width=width, highlight=False)
    rows = _rows(study, outcome.records)
    shown = [column for column in _columns(study) if any(_says_something(column, row) for row in rows)]
    table = _table(f"{study.name}: {outcome.count('done')} of {study.num_points} points done", _heads(study))
    for column in shown:
        table.add_column(column.head, justify="right", no_wrap=True)
    best = {column.path: _best(column, rows) for column in shown}
    for row in rows:
        cells = [_cell(column, row, best=best[column.path]) for column in shown]
        if not row.means and shown:
            cells[0] = Text(row.status, style="dim")
        table.add_row(*row.labels, *cells)
    _print_table(console, table)
    repeats = max(row.repeats for row in rows)
    if repeats > 1:
        console.print(f"means of up to {repeats} repetitions, ± half of the 90 % interval (Student's t)")
    _print_reasons(console, outcome.records)


def print_points(study: Study, finished: Mapping[str, PointRecord], *, file: TextIO | None = None) -> None:
    """Print every point with its values, and what is known of it."""
    console = Console(file=file, highlight=False)
    heads = ["", "id", *(_head(key) for axis in study.axes for key in axis.keys), "status"]
    table = _table(f"{study.name}: {study.num_points} points", heads)
    for point in study.by_number:
        status = "infeasible" if isinstance(point, Misfit) else "to do"
        if point.id in finished:
            status = finished[point.id].status
        values = [_value(point.values.get(key, "")) for axis in study.axes for key in axis.keys]
        table.add_row(str(point.number), point.id, *values, status)
    _print_table(console, table)
    for misfit in study.misfits:
        console.print(f"{misfit.number}: {misfit.reason}", markup=False, soft_wrap=True)


def _table(title: str, heads: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(head, no_wrap=True)
    return table


def _print_table(console: Console, table: Table) -> None:
    """As wide as it must be: a wrapped number is worse than a long line."""
    needed = console.measure(table, options=console.options.update(max_width=_WIDEST_TABLE)).maximum
    console.width = max(console.width, needed)
    console.print(table)


@dataclass(frozen=True)
class _Row:
    """A line of the table: the labels of its axes, and the mean of every metric over its finished repetitions."""

    labels: tuple[str, ...]
    means: dict[str, Mean]
    repeats: int
    status: str


def _rows(study: Study, records: Sequence[PointRecord]) -> list[_Row]:
    groups: dict[tuple[str, ...], list[PointRecord]] = {}
    for record in records:
        groups.setdefault(_labels(study, record.values), []).append(record)
    rows = []
    for labels, members in groups.items():
        done = [member for member in members if member.status == "done"]
        means = {}
        for column in _columns(study):
            values = [member.metric(column.path) for member in done]
            numbers = [float(value) for value in values if isinstance(value, int | float)]
            if numbers and len(numbers) == len(done):
                means[column.path] = mean_interval(numbers)
        rows.append(_Row(labels, means, len(done), members[0].status))
    return rows


def _columns(study: Study) -> tuple[Column, ...]:
    plot = study.plot or {}
    return columns([path for path in (plot.get("x"), *plot.get("y", ())) if path in METRICS])


def _heads(study: Study) -> list[str]:
    """One head per axis with labels, else one per key."""
    heads: list[str] = []
    for axis in study.axes:
        if not axis.repeat:
            heads += [_head(axis.keys[0])] if axis.labels else [_head(key) for key in axis.keys]
    return heads


def _labels(study: Study, values: Mapping[str, Any]) -> tuple[str, ...]:
    labels: list[str] = []
    for axis in study.axes:
        if axis.repeat:
            continue
        if axis.labels is None:
            labels += [_value(values.get(key, "")) for key in axis.keys]
        else:
            rows = [{setting.key: setting.value for setting in row} for row in axis.rows]
            own = {key: values[key] for key in axis.keys}
            labels.append(axis.labels[rows.index(own)])
    return tuple(labels)


def _head(key: str) -> str:
    """The last part of a key says enough: `group_limit` of routing.router.group_limit."""
    return key.removeprefix("$").rpartition(".")[2]


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(", ", ": "))


def _says_something(column: Column, row: _Row) -> bool:
    """Whether a value is there; a share of 0 in every row is left out."""
    mean = row.means.get(column.path)
    return mean is not None and (mean.value != 0 or not column.path.endswith("_share"))


def _best(column: Column, rows: Sequence[_Row]) -> float | None:
    values = [row.means[column.path].value for row in rows if column.path in row.means]
    if column.best is None or len(set(values)) < 2:
        return None
    return min(values) if column.best == "least" else max(values)


def _cell(column: Column, row: _Row, *, best: float | None) -> Text:
    mean = row.means.get(column.path)
    if mean is None:
        return Text("-", style="dim")
    text = column.pattern.format(mean.value * column.scale)
    if mean.half_width is not None and mean.half_width > _NO_SPREAD * abs(mean.value):
        text += f" ± {mean.half_width * column.scale:.2g}"
    return Text(f"*{text}", style="bold green") if mean.value == best else Text(text)


def _print_reasons(console: Console, records: Sequence[PointRecord]) -> None:
    reasons: dict[tuple[str, str], list[int]] = {}
    for record in records:
        if record.status != "done":
            reasons.setdefault((record.status, record.reason or ""), []).append(record.number)
    for (status, reason), numbers in reasons.items():
        which = f"point {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} points, first {numbers[0]}"
        short = reason if len(reason) <= _WIDEST_REASON else reason[: _WIDEST_REASON - 3] + "..."
        console.print(f"{status} ({which}): {short}", markup=False, soft_wrap=True)
