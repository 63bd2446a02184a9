"""What `moesim sweep` prints: the points before it starts, and the table at the end, repeated points averaged."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TextIO, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moesim.results.definitions import NUMBERS
from moesim.strict_json import json_text
from moesim.study import PointRecord
from moesim.study.points import half_width_90
from moesim.sweeper.folder import SweepOutcome
from moesim.sweeper.study import Study
from moesim.units import shortened


@dataclass(frozen=True, kw_only=True)
class Column:
    """A metric in the table: its head, its unit and which end is the better one (None: neither).

    `absolute`: a change is a difference and not a share. `beside`: another metric without which it says nothing new.
    """

    path: str
    head: str
    scale: float = 1.0
    pattern: str = "{:.4g}"
    best: Literal["least", "most"] | None = None
    absolute: bool = False
    beside: str | None = None


STANDARD = (
    Column(path="step_time_s", head="step time (s)", pattern="{:.5g}", best="least"),
    Column(path="tokens_per_second", head="tokens/s", pattern="{:,.0f}", best="most"),
    Column(path="cost.usd_per_million_tokens", head="USD/M tokens", pattern="{:.4g}", best="least"),
    Column(path="imbalance.expert", head="expert imb.", pattern="{:.3f}", best="least", absolute=True),
    Column(path="imbalance.rank_rows", head="rank imb.", pattern="{:.3f}", best="least", absolute=True),
    Column(path="dropped_share", head="dropped (%)", scale=100, pattern="{:.2f}", best="least", absolute=True),
    Column(path="effective.usd_per_million_tokens", head="USD/M kept", best="least", beside="dropped_share"),
    Column(path="router.validation_loss", head="held-out loss", pattern="{:.4f}", best="least", absolute=True),
)


def columns(extra: Sequence[str]) -> tuple[Column, ...]:
    """The columns of every sweep, and one for each other metric in `extra`."""
    known = {column.path for column in STANDARD}
    more = [path for path in dict.fromkeys(extra) if path not in known]
    return (*STANDARD, *(_plain_column(path) for path in more))


def _plain_column(path: str) -> Column:
    """Parts of the step may be next to nothing in the reference: their changes are seconds."""
    return Column(path=path, head=path.rpartition(".")[2], absolute=path.startswith("attribution"))


Item = TypeVar("Item")


@dataclass(frozen=True)
class Mean:
    """Mean of repeated values; `half_width` of its 90 % interval (Student's t), None for a single value."""

    value: float
    half_width: float | None


def mean_interval(values: Sequence[float]) -> Mean:
    """Mean and 90 % interval of independent repetitions."""
    if len(values) < 2:
        return Mean(values[0], None)
    return Mean(statistics.fmean(values), half_width_90(values))


@dataclass(frozen=True)
class Row:
    """A line of the table: the labels of its axes, and the mean of every metric over its finished repetitions."""

    labels: tuple[str, ...]
    means: dict[str, Mean]
    repeats: int
    status: str


def rows(study: Study, records: Sequence[PointRecord], columns: Sequence[Column]) -> list[Row]:
    """A row per place on the axes that are no repetitions, in the order of the points."""
    groups: dict[tuple[str, ...], list[PointRecord]] = {}
    for record in records:
        groups.setdefault(labels_of(study, record.values), []).append(record)
    found = []
    for labels, members in groups.items():
        done = [member for member in members if member.status == "done"]
        found.append(Row(labels, _means(columns, done, _number), len(done), members[0].status))
    return found


def _means(
    columns: Sequence[Column], members: Sequence[Item], number: Callable[[Item, Column], float | None]
) -> dict[str, Mean]:
    """The mean of every column of which all members have a number."""
    found = {}
    for column in columns:
        numbers = [value for member in members if (value := number(member, column)) is not None]
        if numbers and len(numbers) == len(members):
            found[column.path] = mean_interval(numbers)
    return found


def changes(study: Study, records: Sequence[PointRecord], columns: Sequence[Column]) -> list[Row]:
    """The change of every point against the one that differs from it in the study's `reference` alone, averaged.

    Repetitions are compared pair by pair, so that what they share cancels. Changes are shares of the reference's value,
    or differences where the column says so.
    """
    assert study.reference is not None
    by_values = {_key(record.values): record for record in records if record.status == "done"}
    groups: dict[tuple[str, ...], list[tuple[PointRecord, PointRecord]]] = {}
    for record in records:
        partner = by_values.get(_key({**record.values, **study.reference}))
        if record.status == "done" and partner is not None and partner is not record:
            groups.setdefault(labels_of(study, record.values), []).append((record, partner))
    return [
        Row(labels, _means(columns, pairs, lambda pair, column: _change(*pair, column)), len(pairs), "done")
        for labels, pairs in groups.items()
    ]


def _key(values: Mapping[str, Any]) -> str:
    return json_text(values, sort_keys=True)


def _number(record: PointRecord, column: Column) -> float | None:
    value = record.metric(column.path)
    return float(value) if isinstance(value, int | float) else None


def _change(record: PointRecord, partner: PointRecord, column: Column) -> float | None:
    own, other = _number(record, column), _number(partner, column)
    if own is None or other is None:
        return None
    if column.absolute:
        return own - other
    return own / other - 1 if other else None


def heads(study: Study) -> list[str]:
    """One head per axis with labels, else one per key."""
    found: list[str] = []
    for axis in study.axes:
        if not axis.repeat:
            found += [head(axis.keys[0])] if axis.labels else [head(key) for key in axis.keys]
    return found


def labels_of(study: Study, values: Mapping[str, Any]) -> tuple[str, ...]:
    """What the columns of `heads` say for a point of these values."""
    labels: list[str] = []
    for axis in study.axes:
        if axis.repeat:
            continue
        if axis.labels is None:
            labels += [shown_value(values.get(key, "")) for key in axis.keys]
        else:
            labels.append(axis.label(values))
    return tuple(labels)


def head(key: str) -> str:
    """The last part of a key says enough: `group_limit` of routing.router.group_limit."""
    return key.removeprefix("$").rpartition(".")[2]


def shown_value(value: Any) -> str:
    """A plain value in as few words as possible."""
    return value if isinstance(value, str) else json_text(value, separators=(", ", ": "))


_WIDEST_REASON = 160
_WIDEST_TABLE = 1000
_NO_SPREAD = 1e-4  # of the mean: a narrower interval is not shown
_WIDEST_VALUE = 48  # characters of one value in the list of points: counts would make it as wide as they are


def print_sweep(study: Study, outcome: SweepOutcome, *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print the table: a row per point, repeated ones averaged; the best value of a column is marked with *."""
    console = Console(file=file, width=width, highlight=False)
    plot = study.plot or {}
    all_columns = columns([path for path in (plot.get("x"), *plot.get("y", ())) if path in NUMBERS])
    found = rows(study, outcome.records, all_columns)
    shown = [column for column in all_columns if any(_says_something(column, row) for row in found)]
    told = {column.path for column in shown}
    shown = [column for column in shown if column.beside is None or column.beside in told]
    table = _table(f"{study.name}: {outcome.count('done')} of {study.num_points} points done", heads(study))
    best = {column.path: _best(column, found) for column in shown}
    _fill(table, found, shown, lambda column, row: _cell(column, row, best=best[column.path]))
    _print_table(console, table)
    compared = changes(study, outcome.records, shown) if study.reference is not None else []
    if compared:
        table = _table(f"change against {_reference(study)}", heads(study))
        _fill(table, compared, shown, _change_cell)
        _print_table(console, table)
    repeats = max(row.repeats for row in found)
    if repeats > 1:
        pairs = ", changes pair by pair" if compared else ""
        console.print(f"means of up to {repeats} repetitions{pairs}, ± half of the 90 % interval (Student's t)")
    _print_reasons(console, outcome.records)
    for text in dict.fromkeys(text for point in study.points for text in point.scenario.model.left_out):
        console.print(Text(f"warning: {text}", style="bold yellow"), soft_wrap=True)


def print_points(study: Study, finished: Mapping[str, PointRecord], *, file: TextIO | None = None) -> None:
    """Print every point with its values, and what is known of it."""
    console = Console(file=file, highlight=False)
    names = ["", "id", *(head(key) for axis in study.axes for key in axis.keys), "status"]
    table = _table(f"{study.name}: {study.num_points} points", names)
    for point in study.by_number:
        status = "infeasible" if isinstance(point, PointRecord) else "to do"
        if point.id in finished:
            status = finished[point.id].status
        values = [
            shortened(shown_value(point.values.get(key, "")), _WIDEST_VALUE) for axis in study.axes for key in axis.keys
        ]
        table.add_row(*map(Text, (str(point.number), point.id, *values, status)))
    _print_table(console, table)
    for invalid_point in study.invalid_points:
        console.print(f"{invalid_point.number}: {invalid_point.reason}", markup=False, soft_wrap=True)


def _table(title: str, first: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in first:
        table.add_column(name, no_wrap=True)
    return table


def _reference(study: Study) -> str:
    """The reference's label where its axis has labels, else its values."""
    assert study.reference is not None
    axis = next(axis for axis in study.axes if set(study.reference) == set(axis.keys))
    if axis.labels is not None:
        return axis.label(study.reference)
    return ", ".join(f"{head(key)} = {shown_value(value)}" for key, value in study.reference.items())


def _fill(table: Table, found: Sequence[Row], shown: Sequence[Column], cell: Callable[[Column, Row], Text]) -> None:
    for column in shown:
        table.add_column(column.head, justify="right", no_wrap=True)
    for row in found:
        cells = [cell(column, row) for column in shown]
        if not row.means and shown:
            cells[0] = Text(row.status, style="dim")
        table.add_row(*map(Text, row.labels), *cells)  # as Text: brackets in a value are no markup


def _print_table(console: Console, table: Table) -> None:
    """As wide as it must be: a wrapped number is worse than a long line."""
    needed = console.measure(table, options=console.options.update(max_width=_WIDEST_TABLE)).maximum
    console.width = max(console.width, needed)
    console.print(table)


def _says_something(column: Column, row: Row) -> bool:
    """Whether a value is there; a share of 0 in every row is left out."""
    mean = row.means.get(column.path)
    return mean is not None and (mean.value != 0 or not column.path.endswith("_share"))


def _best(column: Column, rows: Sequence[Row]) -> float | None:
    values = [row.means[column.path].value for row in rows if column.path in row.means]
    if column.best is None or len(set(values)) < 2:
        return None
    return min(values) if column.best == "least" else max(values)


def _cell(column: Column, row: Row, *, best: float | None) -> Text:
    mean = row.means.get(column.path)
    if mean is None:
        return Text("-", style="dim")
    text = column.pattern.format(mean.value * column.scale)
    if mean.half_width is not None and mean.half_width > _NO_SPREAD * abs(mean.value):
        text += f" ± {mean.half_width * column.scale:.2g}"
    return Text(f"*{text}", style="bold green") if mean.value == best else Text(text)


def _change_cell(column: Column, row: Row) -> Text:
    """A difference in the column's own unit, or a change in per cent."""
    mean = row.means.get(column.path)
    if mean is None:
        return Text("-", style="dim")
    scale, unit = (column.scale, "") if column.absolute else (100.0, " %")
    text = f"{mean.value * scale:+.4f}" if column.absolute else f"{mean.value * scale:+.2f}"
    if mean.half_width is not None:
        text += f" ± {mean.half_width * scale:.2g}"
    return Text(text + unit)


def _print_reasons(console: Console, records: Sequence[PointRecord]) -> None:
    reasons: dict[tuple[str, str], list[int]] = {}
    for record in records:
        if record.status != "done":
            reasons.setdefault((record.status, record.reason or ""), []).append(record.number)
    for (status, reason), numbers in reasons.items():
        which = f"point {numbers[0]}" if len(numbers) == 1 else f"{len(numbers)} points, first {numbers[0]}"
        console.print(f"{status} ({which}): {shortened(reason, _WIDEST_REASON)}", markup=False, soft_wrap=True)
