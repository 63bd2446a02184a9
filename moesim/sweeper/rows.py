"""The rows of a sweep's table: one per place on its axes, repetitions averaged, and the change against a reference."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.strict_json import json_text
from moesim.study import PointRecord
from moesim.study.intervals import half_width_90
from moesim.sweeper.metrics import Column
from moesim.sweeper.study import Study


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
        means = {}
        for column in columns:
            numbers = [number for member in done if (number := _number(member, column)) is not None]
            if numbers and len(numbers) == len(done):
                means[column.path] = mean_interval(numbers)
        found.append(Row(labels, means, len(done), members[0].status))
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
    found = []
    for labels, pairs in groups.items():
        means = {}
        for column in columns:
            numbers = [change for pair in pairs if (change := _change(*pair, column)) is not None]
            if len(numbers) == len(pairs):
                means[column.path] = mean_interval(numbers)
        found.append(Row(labels, means, len(pairs), "done"))
    return found


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
            rows = [{setting.key: setting.value for setting in row} for row in axis.rows]
            own = {key: values[key] for key in axis.keys}
            labels.append(axis.labels[rows.index(own)])
    return tuple(labels)


def head(key: str) -> str:
    """The last part of a key says enough: `group_limit` of routing.router.group_limit."""
    return key.removeprefix("$").rpartition(".")[2]


def shown_value(value: Any) -> str:
    """A plain value in as few words as possible."""
    return value if isinstance(value, str) else json_text(value, separators=(", ", ": "))
