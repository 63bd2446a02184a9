"""The rows of a sweep's table: one per place on its axes, repetitions averaged, and the change against a reference."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.study import PointRecord
from moesim.sweep.metrics import Column
from moesim.sweep.study import Study

# Student's t: 95 % quantiles for 1, 2, ... degrees of freedom (two-sided 90 %).
_T95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833, 1.812, 1.796, 1.782, 1.771, 1.761, 1.753)
_T95_BEYOND = 1.75


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
    return json.dumps(values, sort_keys=True)


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
    return value if isinstance(value, str) else json.dumps(value, separators=(", ", ": "))
