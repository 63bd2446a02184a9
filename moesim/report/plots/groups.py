"""Points that differ only in their seed, taken together, and the axes along which the groups lie.

Of a group there is one mean and one 90 % interval for every metric: over n >= 2 seeds Student's t on their mean. A
single run brings its own 90 % range of the step time (over resampled routing traces), from which those of throughput
and cost follow exactly; other metrics have none.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.report.plots.metrics import MISSING, Metric, is_number, short_names, text_of
from moesim.report.plots.sources import DONE, Point, Source
from moesim.strict_json import json_text
from moesim.study.points import half_width_90

AS_STEP_TIME = ("step_time_s", "cost.usd_per_step", "cost.usd_per_million_tokens", "cost.usd_total", "cost.days")
AS_RATE = (
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "mfu.causal",
    "mfu.non_causal",
    "mfu.causal_of_bf16_peak",
    "mfu.non_causal_of_bf16_peak",
)


@dataclass(frozen=True)
class Axis:
    """What was varied: one key, or several that change together. Values come in the order of the study."""

    keys: tuple[str, ...]
    name: str
    values: tuple[tuple[Any, ...], ...]
    texts: tuple[str, ...]
    repeat: bool = False
    labelled: bool = False

    def index(self, values: Mapping[str, Any]) -> int:
        """Which of the axis' values a point has."""
        wanted = identity([values.get(key, MISSING) for key in self.keys])
        return next(index for index, found in enumerate(self.values) if identity(found) == wanted)


@dataclass(frozen=True)
class Estimate:
    """A mean over `count` runs, and the 90 % interval where there is one."""

    mean: float
    low: float | None
    high: float | None
    count: int


@dataclass(frozen=True)
class Group:
    """The points of one combination of values, apart from seeds. `at` holds the index of its value on every axis.

    `alike`: whether the kernels of all groups rest on the same, so that ranges are of the routing alone.
    """

    index: int
    at: tuple[int, ...]
    points: tuple[Point, ...]
    alike: bool = True

    @property
    def results(self) -> list[Mapping[str, Any]]:
        """The results of the points that have one."""
        return [point.result for point in self.points if point.result is not None]

    @property
    def status(self) -> str:
        """`done` where at least one run has a result, else what the first point says."""
        return DONE if self.results else self.points[0].status

    @property
    def rank(self) -> int | None:
        """Its place in the ranking of a plan."""
        return self.points[0].rank

    def estimate(self, metric: Metric) -> Estimate | None:
        """Mean and interval; None where no run has the metric."""
        values = [value for result in self.results if (value := metric.of(result)) is not None]
        if not values:
            return None
        if len(values) > 1:
            return mean_and_interval(values)
        low, high = own_range(metric, self.results[0], alone=self.alike)
        return Estimate(values[0], low, high, 1)


@dataclass(frozen=True)
class Collection:
    """Everything that a page shows: the axes that were varied (seeds apart) and the groups on them."""

    sources: tuple[Source, ...]
    points: tuple[Point, ...]
    axes: tuple[Axis, ...]
    repeats: tuple[Axis, ...]
    groups: tuple[Group, ...]

    @property
    def done(self) -> list[Group]:
        """Groups with a result."""
        return [group for group in self.groups if group.status == DONE]

    @property
    def eligible(self) -> list[int]:
        """Groups that may lie on a front: in a plan those that meet its goal, else all."""
        ranked = [group.index for group in self.groups if group.rank is not None]
        return ranked or [group.index for group in self.groups]

    @property
    def results(self) -> list[Mapping[str, Any]]:
        """All results."""
        return [point.result for point in self.points if point.result is not None]


def mean_and_interval(values: Sequence[float]) -> Estimate:
    """The mean of at least two values and its 90 % interval, mean +- t s / sqrt(n)."""
    mean, half = statistics.fmean(values), half_width_90(values)
    return Estimate(mean, mean - half, mean + half, len(values))


def same_kernels(*results: Mapping[str, Any]) -> bool:
    """Whether kernels of all runs rest on the same, so that their errors are common to them and tell none apart.

    Results of earlier versions do not say, and have a range of the routing alone.
    """
    return len({result.get("kernels") for result in results}) <= 1


def range_of(result: Mapping[str, Any], *, alone: bool) -> list[float] | None:
    """The 90 % range of the step time: of the routing alone, or whole."""
    key = "step_time_routing_range_s" if alone and "step_time_routing_range_s" in result else "step_time_range_s"
    bounds: list[float] | None = result.get(key)
    return bounds


def own_range(metric: Metric, result: Mapping[str, Any], *, alone: bool = False) -> tuple[float | None, float | None]:
    """The 90 % range of one run for metrics that follow from its step time; (None, None) for others.

    alone: of the routing alone, for runs that share the errors of their kernels. The range of a single routing sample
    has no width and says nothing.
    """
    bounds, step_s, value = range_of(result, alone=alone), result["step_time_s"], metric.of(result)
    if not bounds or bounds[0] == bounds[1] or value is None or metric.path not in (*AS_STEP_TIME, *AS_RATE):
        return None, None
    factors = sorted(bound / step_s if metric.path in AS_STEP_TIME else step_s / bound for bound in bounds)
    return value * factors[0], value * factors[1]


def collect(sources: Sequence[Source], points: Sequence[Point], *, split: bool = False) -> Collection:
    """Order the points on axes and put those together that differ only in their seed.

    With `split`, keys that change together without labels become axes of their own, as for a list of points.
    """
    axes = _study_axes(sources[0], points, split=split) if len(sources) == 1 else None
    axes = axes if axes is not None else _found_axes(sources, points)
    shown = tuple(axis for axis in axes if not axis.repeat)
    runs_alone = all(source.kind == "run" for source in sources)
    members: dict[tuple[Any, ...], list[Point]] = {}
    for point in points:
        own = (point.folder,) if runs_alone and not any(axis.repeat for axis in axes) else ()
        members.setdefault((*own, *(axis.index(point.values) for axis in shown)), []).append(point)
    alike = same_kernels(*(point.result for point in points if point.result is not None))
    groups = tuple(
        Group(index, tuple(axis.index(found[0].values) for axis in shown), tuple(found), alike)
        for index, found in enumerate(members.values())
    )
    repeats = tuple(axis for axis in axes if axis.repeat)
    return Collection(tuple(sources), tuple(points), shown, repeats, groups)


def identity(value: Any) -> str:
    """A text that is the same for equal values, and tells `1` from `"1"`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{identity(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(identity(child) for child in value) + "]"
    return json_text(value)


def _distinct(items: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for item in items:
        found.setdefault(identity(item), item)
    return list(found.values())


def _study_axes(source: Source, points: Sequence[Point], *, split: bool) -> tuple[Axis, ...] | None:
    """The axes that study.json names, with the values that occur; None where it names none."""
    declared = source.about.get("axes")
    if not declared:
        return None
    names = short_names([key for axis in declared for key in axis["keys"]])
    axes = []
    for axis in declared:
        keys, labels = tuple(axis["keys"]), axis.get("labels")
        listed = [tuple(values) if isinstance(values, list) else (values,) for values in axis["values"]]
        texts = {identity(values): label for values, label in zip(listed, labels or (), strict=bool(labels))}
        found = _distinct(tuple(point.values.get(key, MISSING) for key in keys) for point in points)
        occurring = {identity(values) for values in found}
        order = [values for values in _distinct([*listed, *found]) if identity(values) in occurring]
        firsts = _distinct((values[0],) for values in order)
        telling = len(firsts) == len(order) and (None,) not in firsts  # the first key says it all
        if split and not telling and not labels and not axis.get("repeat"):
            axes += [_axis(key, names[key], _values(key, points), repeat=False) for key in keys]
            continue
        axes.append(
            Axis(
                keys,
                name=names[keys[0]] if telling and not labels else _zipped_name(keys, names),
                values=tuple(order),
                texts=tuple(
                    str(texts.get(identity(values), text_of(values[0] if telling else values))) for values in order
                ),
                repeat=bool(axis.get("repeat")),
                labelled=bool(labels),
            )
        )
    return tuple(axes)


def _zipped_name(keys: Sequence[str], names: Mapping[str, str]) -> str:
    """What keys that change together are called: by the variables among them, which a study names for this, or all."""
    variables = [key for key in keys if key.startswith("$")]
    return " and ".join(names[key] for key in (variables or keys)[:2])


def _found_axes(sources: Sequence[Source], points: Sequence[Point]) -> tuple[Axis, ...]:
    """An axis for every key that has more than one value."""
    repeated = {
        key
        for source in sources
        for axis in source.about.get("axes") or ()
        if axis.get("repeat")
        for key in axis["keys"]
    }
    if all(source.kind == "run" for source in sources):
        repeated = {"seed"}
    keys = dict.fromkeys(key for point in points for key in point.values)
    values = {key: _values(key, points) for key in keys}
    varied = [key for key in keys if len(values[key]) > 1]
    names = short_names(varied)
    return tuple(_axis(key, names[key], values[key], repeat=key in repeated) for key in varied)


def _values(key: str, points: Sequence[Point]) -> list[tuple[Any, ...]]:
    return _distinct((point.values.get(key, MISSING),) for point in points)


def _axis(key: str, name: str, values: Sequence[tuple[Any, ...]], *, repeat: bool) -> Axis:
    """Numbers in ascending order, then everything else as it came."""
    numbers = sorted(value for value in values if is_number(value[0]))
    order = (*numbers, *(value for value in values if not is_number(value[0])))
    return Axis((key,), name, order, tuple(text_of(value[0]) for value in order), repeat)
