"""The folders of runs, sweeps and plans as one list of points; those that differ only in their seed are taken together.

A point is one simulated scenario: what was varied, and what came out. Points that were not simulated to the end stay in
the list with their reason. Of a group there is one mean and one 90 % interval for every metric: over n >= 2 seeds
Student's t on their mean. A single run brings its own 90 % range of the step time (over resampled routing traces), from
which those of throughput and cost follow exactly; other metrics have none.
"""

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.report.plots.metrics import MISSING, Metric, flatten, is_number, short_names, text_of, value_at
from moesim.scenario.document import parse_yaml
from moesim.strict_json import json_text, parse_json
from moesim.study import read_points
from moesim.study.points import POINTS_FILE, half_width_90

RUN_FILE, SWEEP_FILE, PLAN_FILE = "result.json", "study.json", "plan.json"
MARKERS = {RUN_FILE: "run", SWEEP_FILE: "sweep", PLAN_FILE: "plan"}
SCHEMA_VERSION = 1
DONE = "done"
FOLDER = "folder"  # stands among the values where several sweeps or plans meet
_NOT_SETTINGS = ("schema_version", "name", "model.source")
PRESET = "model.preset"


@dataclass(frozen=True)
class Point:
    """One scenario. `values` holds what was varied; `scenario` all keys of a run's resolved scenario, dotted."""

    identity: str
    number: int
    folder: str
    values: dict[str, Any]
    status: str
    reason: str = ""
    result: Mapping[str, Any] | None = None
    scenario: Mapping[str, Any] | None = None
    rank: int | None = None  # among the layouts of a plan that meet its goal


@dataclass(frozen=True)
class Source:
    """One folder: `about` is its study.json or plan.json, empty for a run."""

    kind: str
    name: str
    folder: str
    points: tuple[Point, ...]
    about: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()


def read_sources(paths: Sequence[Path]) -> tuple[Source, ...]:
    """Read every folder once. Raises UserError for what is no such folder, holds no result, or cannot be compared."""
    folders = [_folder(path) for path in paths]
    names = _short_paths(folders)
    sources = tuple(_read(folder, names[folder]) for folder in dict.fromkeys(folders))
    kinds = {str(point.result.get("kind")) for source in sources for point in source.points if point.result}
    if len(kinds) > 1:
        raise UserError(f"results of different kinds cannot be compared: {', '.join(sorted(kinds))}; plot them apart")
    if not kinds:
        raise UserError(_why_nothing(sources))
    return sources


def _folder(path: Path) -> Path:
    """The folder that is meant: also one of its own files names it."""
    if path.is_file() and path.name in (*MARKERS, POINTS_FILE):
        path = path.parent
    if not path.exists():
        raise UserError(f"{path}: no such folder; name folders that moesim run, sweep or plan wrote")
    if not path.is_dir():
        raise UserError(f"{path}: not a folder that moesim run, sweep or plan wrote")
    if any((path / marker).is_file() for marker in MARKERS):
        return path.resolve()
    inside = sorted({found.parent.name for marker in MARKERS for found in path.glob(f"*/{marker}")})
    if inside:
        raise UserError(f"{path}: holds {len(inside)} folders of runs; name them, e.g. {path / inside[0]}")
    raise UserError(f"{path}: no finished run, sweep or plan (no {', '.join(MARKERS)} in it)")


def _short_paths(folders: Sequence[Path]) -> dict[Path, str]:
    """The last part of each path, or as many parts as tell the folders apart."""
    unique = list(dict.fromkeys(folders))
    names = {}
    for folder in unique:
        length = 1
        while sum(other.parts[-length:] == folder.parts[-length:] for other in unique) > 1:
            length += 1
        names[folder] = "/".join(folder.parts[-length:])
    return names


def _read(folder: Path, name: str) -> Source:
    marker = next(marker for marker in reversed(MARKERS) if (folder / marker).is_file())
    about = _json(folder / marker)
    if about.get("schema_version") != SCHEMA_VERSION:
        found = about.get("schema_version")
        raise UserError(f"{folder / marker}: schema_version {found!r}; this moesim reads {SCHEMA_VERSION}")
    if marker == RUN_FILE:
        return _read_run(folder, name, about)
    points, notices = _read_points(folder / POINTS_FILE, folder=name)
    ranks = {identity: rank for rank, identity in enumerate(about.get("ranking") or (), start=1)}
    points = tuple(replace(point, rank=ranks.get(point.identity)) for point in points)
    planned = about.get("num_points")
    if isinstance(planned, int) and planned > len(points):
        notices = (*notices, f"{name}: {planned - len(points)} of {planned} points have not been run yet.")
    return Source(
        kind=MARKERS[marker],
        name=str(about.get("name", name)),
        folder=name,
        points=points,
        about=about,
        notices=notices,
    )


def _read_run(folder: Path, name: str, result: Mapping[str, Any]) -> Source:
    scenario: dict[str, Any] = {}
    path = folder / "scenario.yaml"
    if path.is_file():
        scenario = flatten(parse_yaml(path.read_text(encoding="utf-8"), source=str(path)).plain)
    point = Point(
        identity=name, number=0, folder=name, values={}, status=DONE, result=_checked(result, folder / RUN_FILE),
        scenario={key: value for key, value in scenario.items() if key not in _NOT_SETTINGS},
    )  # fmt: skip
    return Source(kind="run", name=str(result.get("scenario_name", name)), folder=name, points=(point,))


def _checked(result: Any, path: Path | str) -> Mapping[str, Any]:
    if not isinstance(result, dict) or not isinstance(result.get("step_time_s"), int | float):
        raise UserError(f"{path}: not the result of a run (no step_time_s)")
    return result


def _json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a record of moesim (no JSON object)")
    return found


def _read_points(path: Path, *, folder: str) -> tuple[tuple[Point, ...], tuple[str, ...]]:
    """The last record of every point, in the order of their numbers; a torn last line is left out and said."""
    if not path.is_file():
        raise UserError(f"{path}: missing, so there is no finished point to plot; run it first")
    stored = read_points(path)
    points = [
        Point(
            identity=record.id,
            number=record.number,
            folder=folder,
            values=record.values,
            status=record.status,
            reason=record.reason or "",
            result=None if record.result is None else _checked(record.result, f"{path}: point {record.number}"),
        )
        for record in sorted(stored.records, key=lambda record: record.number)
    ]
    notices = (f"{folder}: the last line of {path.name} is cut off; that point is left out.",) if stored.torn else ()
    return tuple(points), notices


def _why_nothing(sources: Sequence[Source]) -> str:
    points = [point for source in sources for point in source.points]
    names = ", ".join(source.folder for source in sources)
    if not points:
        return f"{names}: no finished point yet; let the sweep or plan run first"
    counts = Counter(point.status for point in points)
    numbers = " and ".join(f"{count} {status}" for status, count in counts.items())
    return f"{names}: none of the points has a result ({numbers}), e.g. {points[0].reason or 'no reason was given'}"


def with_values(sources: Sequence[Source]) -> tuple[Point, ...]:
    """All points with comparable `values`: runs get those keys of their scenario that differ or that others vary.

    Beside a sweep or plan, every folder is a value too.
    """
    points = [replace(point, values=_declared(source) | point.values) for source in sources for point in source.points]
    scenarios = [point.scenario for point in points if point.scenario is not None]
    differing = _telling_keys(scenarios)
    varied = dict.fromkeys(key for point in points for key in point.values)
    mixed = len(sources) > 1 and any(source.kind != "run" for source in sources)
    filled = []
    for point in points:
        values = dict(point.values)
        if point.scenario is not None:
            values = {key: value_at(point.scenario, key) for key in dict.fromkeys([*varied, *differing])}
        filled.append(replace(point, values={FOLDER: point.folder, **values} if mixed else values))
    return tuple(filled)


def _declared(source: Source) -> dict[str, Any]:
    """The keys of a study's axes: null where a place on an axis leaves one as it is in the base."""
    return {key: None for axis in source.about.get("axes") or () for key in axis["keys"]}


def _telling_keys(scenarios: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that tell runs apart: those that all have, so not the keys of one `kind`, and of other models the preset."""
    differing = [key for key in differing_keys(scenarios) if all(key in scenario for scenario in scenarios)]
    if PRESET in differing:
        return [key for key in differing if key == PRESET or not key.startswith("model.")]
    return differing


def differing_keys(scenarios: Sequence[Mapping[str, Any]]) -> list[str]:
    """Dotted keys that are not the same in all of the flattened scenarios."""
    every = dict.fromkeys(key for scenario in scenarios for key in scenario)
    return [key for key in every if any(s.get(key, MISSING) != scenarios[0].get(key, MISSING) for s in scenarios)]


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
