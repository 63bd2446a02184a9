"""From a study file to points: every scenario is loaded before the first one runs.

name: group-limit
base: ../quickstart.yaml                       # relative to the study file
set: {uncertainty.samples: 2}                  # overrides for all points
axes:
  - {key: routing.router.device_limit, values: [1, 2, 4]}
  - {keys: [cluster.nodes, parallelism.data], values: [[1, 8], [2, 16]], labels: [one node, two nodes]}
  - {key: seed, values: [0, 1, 2]}             # repeat: true by default for seed alone
points: [{...}, {...}]                         # instead of axes, or crossed with them
plot: {kind: curves, x: routing.router.device_limit, y: [step_time_s], colour: cluster.nodes}
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import ConflictError, InfeasibleError, UserError, closest
from moesim.results.definitions import NUMBERS
from moesim.scenario import Scenario, TraceRouting, load_scenario
from moesim.scenario.catalogue import suggest
from moesim.scenario.document import Node, find, read_yaml
from moesim.scenario.short_forms import override_label
from moesim.shipped import folder, names
from moesim.strict_json import json_text
from moesim.study import Point, PointRecord
from moesim.study.points import content_hash
from moesim.sweeper import reader
from moesim.sweeper.reader import AXIS_KEYS, Axis, Setting, grid, read_axes, read_point_list, read_settings, substituted
from moesim.trace.library import find_entry, is_library_name

# What each key of a study says; the reference of the documentation prints these, too.
STUDY_KEYS: Mapping[str, str] = {
    "name": "Name of the study and of its folder; letters, digits and . _ - alone. Required.",
    "base": "The scenario that every point starts from: a file relative to the study, or the name of one that ships. "
    "Required.",
    "set": "Overrides for all points: dotted keys of a scenario and their values.",
    "axes": "Axes, whose values span a grid, the last axis fastest.",
    "points": "Single points, each a mapping of dotted keys to values, instead of axes or crossed with them.",
    "reference": "Values of one place on an axis, against which the others are compared.",
    "plot": "What `moesim plot` draws of it.",
}
PLOT_KEYS: Mapping[str, str] = {
    "kind": "Kind of picture: curves, heat_map or cost_performance. Required.",
    "x": "A key of an axis or a number of the result along x; not for cost_performance.",
    "y": "A list of numbers of the result, such as step_time_s or imbalance.expert; for a heat_map, of a key as well.",
    "colour": "A key of an axis that tells the curves apart.",
}
PLOT_KINDS = ("curves", "heat_map", "cost_performance")
MOST_POINTS = 10_000
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_PATH_KEYS = ("routing.file", "routing.corpus", "cluster.fabric.file", "model.hf_config", "compute.profile")


@dataclass(frozen=True, kw_only=True)
class Study:
    """All points of a study in the order of its axes (the last fastest); `plot` as the file has it.

    `invalid_points`: those whose values do not fit each other, which have no scenario, as the records that say why.
    `reference`: values of keys against which the other places are compared.
    """

    name: str
    base: str
    axes: tuple[Axis, ...]
    points: tuple[Point, ...]
    invalid_points: tuple[PointRecord, ...]
    reference: dict[str, Any] | None
    plot: dict[str, Any] | None

    @property
    def num_points(self) -> int:
        """Points with and without a scenario."""
        return len(self.points) + len(self.invalid_points)

    @property
    def by_number(self) -> list[Point | PointRecord]:
        """All points in their order."""
        return sorted([*self.points, *self.invalid_points], key=lambda point: point.number)

    def content_hash(self) -> str:
        """SHA-256 (hex) of the axes and of every resolved scenario; the plot may change."""
        ids = [point.id for point in self.by_number]
        return content_hash({"axes": [axis.as_json() for axis in self.axes], "points": ids})

    def as_json(self) -> dict[str, Any]:
        """The content of study.json."""
        return {
            "schema_version": 1,
            "kind": "sweep",
            "name": self.name,
            "base": self.base,
            "axes": [axis.as_json() for axis in self.axes],
            "num_points": self.num_points,
            "hash": self.content_hash(),
            "plot": self.plot,
        }


def load_study(path: Path, overrides: Sequence[str] = ()) -> Study:
    """The study in the file `path`; `overrides` (`a.b=c`) apply to every point, below its own values.

    Raises UserError with `file:line:column` for a file, key or value that no scenario can have, for two points that are
    the same, and when no point at all fits together.
    """
    root = reader.read_file(path)
    parts = reader.mapping(root, "a study", known=STUDY_KEYS)
    for key in ("name", "base"):
        if key not in parts:
            raise UserError(f"{root.where}: a study needs {key}")
    name = reader.text(parts["name"], "name")
    if not _NAME.fullmatch(name):
        raise UserError(f"{parts['name'].where}: name {name!r} may hold only letters, digits and . _ -")
    axes = _axes(parts, root)
    _check_overrides(overrides, axes)
    base = reader.text(parts["base"], "base")
    base_file = _base_file(path, base, where=parts["base"].where)
    _refuse_serving(base_file, where=parts["base"].where)
    common = read_settings(parts["set"], "set") if "set" in parts else []
    points, invalid_points = _points(path, base_file, axes, common, overrides)
    plot = _checked_plot(parts["plot"], axes) if "plot" in parts else None
    if not points:
        raise UserError(f"{path}: no point of the study can be simulated; the first one: {invalid_points[0].reason}")
    _refuse_duplicates(path, points)
    return Study(
        name=name,
        base=base,
        axes=axes,
        points=tuple(points),
        invalid_points=tuple(invalid_points),
        reference=_reference(parts["reference"], axes) if "reference" in parts else None,
        plot=plot,
    )


def _base_file(study: Path, base: str, *, where: str) -> Path:
    """The scenario of a study: a file relative to it, or one that ships. Raises UserError where it is neither."""
    beside = study.parent / base
    if beside.is_file():
        return beside
    known = names("scenario")
    if base in known:
        return folder() / f"{base}.yaml"
    remedy = (
        closest(base, known) or "; name a file, by a path from the folder of this one, or one of `moesim scenarios`"
    )
    what = f"base: {base} does not exist (looked for {beside}), and no scenario of this name ships"
    raise UserError(f"{where}: {what}{remedy}")


def _refuse_serving(base: Path, *, where: str) -> None:
    """Raises UserError for a base whose points are loads of requests: they have other results than a step."""
    kind, reached = find(read_yaml(base, what="scenario"), ("workload", "kind"))
    if reached == ("workload", "kind") and kind.value == "serving":
        serve = "moesim serve FILE --out runs/VALUE/serve.html"
        what = f"base: {base.name} is of serving, and a sweep is of training"
        raise UserError(f"{where}: {what}; set each value in `{serve}`, then `moesim plot runs/*`")


def _axes(parts: Mapping[str, Node], root: Node) -> tuple[Axis, ...]:
    axes = [read_point_list(parts["points"])] if "points" in parts else []
    axes += read_axes(parts["axes"]) if "axes" in parts else []
    if not axes:
        raise UserError(f"{root.where}: a study needs axes or points")
    seen: dict[str, str] = {}
    for axis in axes:
        where = next((setting.where for row in axis.rows for setting in row), root.where)
        for key in axis.keys:
            if key in seen:
                raise UserError(f"{where}: the key {key!r} is already on another axis ({seen[key]})")
            seen[key] = where
    total = 1
    for axis in axes:
        total *= len(axis.rows)
    if total > MOST_POINTS:
        raise UserError(f"{root.where}: the axes span {total:,} points; at most {MOST_POINTS:,} are allowed")
    return tuple(axes)


def _check_overrides(overrides: Sequence[str], axes: Sequence[Axis]) -> None:
    keys = {key for axis in axes for key in axis.keys}
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in keys:
            raise UserError(f"{override_label(override)}: {key} is an axis of the study; change the study instead")


def _points(
    path: Path, base: Path, axes: Sequence[Axis], common: Sequence[Setting], overrides: Sequence[str]
) -> tuple[list[Point], list[PointRecord]]:
    points: list[Point] = []
    invalid_points: list[PointRecord] = []
    for number, settings in enumerate(grid(axes), start=1):
        values = {setting.key: setting.value for setting in settings}
        variables = {key: value for key, value in values.items() if key.startswith("$")}
        try:
            scenario = _scenario(
                path, base, substituted(common, variables), overrides, substituted(settings, variables)
            )
        except (ConflictError, InfeasibleError) as error:
            chosen = [[setting.key, setting.value] for setting in (*common, *settings)]
            identity = content_hash({"settings": chosen, "overrides": list(overrides)})[:16]
            found = PointRecord(
                id=identity, number=number, values=values, status="infeasible", reason=str(error), pid=os.getpid(),
                seconds=0.0, result=None,
            )  # fmt: skip
            invalid_points.append(found)
        else:
            points.append(Point.of(scenario, number=number, values=values))
    return points, invalid_points


def _scenario(
    path: Path, base: Path, common: Sequence[Setting], overrides: Sequence[str], own: Sequence[Setting]
) -> Scenario:
    """The base with the study's settings, those of the command line, and the point's own, the last one winning."""
    every = (*common, *own)
    values = {id(each): json_text(_anchored(each.value, each.key, path.parent), ensure_ascii=False) for each in every}
    texts = {id(each): f"{each.key}={values[id(each)]}" for each in every}
    ordered = [*(texts[id(s)] for s in common), *overrides, *(texts[id(s)] for s in own)]
    try:
        return _with_known_routing(load_scenario(base, ordered), path)
    except UserError as error:
        message = str(error)
        for setting in sorted(every, key=lambda s: -len(texts[id(s)])):
            message = message.replace(override_label(texts[id(setting)]), setting.where)
        raise type(error)(message) from None


def _with_known_routing(scenario: Scenario, path: Path) -> Scenario:
    """The scenario, once its trace is in the library: a wrong name must not wait for the points before it."""
    if isinstance(scenario.routing, TraceRouting) and is_library_name(scenario.routing.file):
        try:
            find_entry(scenario.routing.file)
        except UserError as error:
            raise UserError(f"{path}: routing.file: {error}") from None
    return scenario


def _anchored(value: Any, key: str, folder: Path) -> Any:
    """The value with paths made absolute where they exist beside the study file."""
    if isinstance(value, dict):
        return {name: _anchored(child, f"{key}.{name}", folder) for name, child in value.items()}
    if isinstance(value, str) and key in _PATH_KEYS and (folder / value).exists():
        return str((folder / value).absolute())
    return value


def _refuse_duplicates(path: Path, points: Sequence[Point]) -> None:
    seen: dict[str, Point] = {}
    for point in points:
        duplicate = seen.setdefault(point.id, point)
        if duplicate is not point:
            both = f"{_shown(duplicate.values)} and {_shown(point.values)}"
            raise UserError(
                f"{path}: points {duplicate.number} and {point.number} are the same scenario ({both}); remove one"
            )


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {json_text(value)}" for key, value in values.items()) or "as the base"


def _reference(node: Node, axes: Sequence[Axis]) -> dict[str, Any]:
    """All values of the one place on an axis that `reference` names. Raises UserError."""
    named = read_settings(node, "reference")
    keys = [key for axis in axes if not axis.repeat for key in axis.keys]
    for setting in named:
        if setting.key not in keys:
            raise UserError(f"{node.where}: reference: {setting.key!r} is on no axis; {suggest(setting.key, keys)}")
    wanted = {setting.key: setting.value for setting in named}
    for axis in axes:
        fitting = [row for row in axis.places if wanted and all(row.get(key) == value for key, value in wanted.items())]
        if len(fitting) == 1:
            return fitting[0]
    raise UserError(f"{node.where}: reference: {_shown(wanted)} is not one place on one axis")


def _checked_plot(node: Node, axes: Sequence[Axis]) -> dict[str, Any]:
    """`plot` as it stands, once every name in it exists. Raises UserError."""
    parts = reader.mapping(node, "plot", known=PLOT_KEYS)
    keys = [key for axis in axes for key in axis.keys]
    if "kind" not in parts:
        raise UserError(f"{node.where}: plot needs a kind, one of {', '.join(PLOT_KINDS)}")
    kind = reader.chosen(parts["kind"], "kind", known=PLOT_KINDS)
    if kind != "cost_performance" and not {"x", "y"} <= set(parts):
        raise UserError(f"{node.where}: plot: kind {kind} needs x and y")
    if "x" in parts:
        reader.chosen(parts["x"], "x", known=[*keys, *NUMBERS])
    if "colour" in parts:
        reader.chosen(parts["colour"], "colour", known=keys)
    if "y" in parts:
        known = [*NUMBERS, *keys] if kind == "heat_map" else NUMBERS
        reader.distinct(reader.items(parts["y"], "y"), lambda item: reader.chosen(item, "y", known=known), "the metric")
    plain: dict[str, Any] = node.plain
    return plain


_TEXT = {"type": "string", "minLength": 1}
_LIST = {"type": "array", "minItems": 1}
_SETTINGS = {"type": "object"}  # dotted keys of a scenario and their values


def study_json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a study; the values of a scenario's keys are not looked into."""
    axis = _mapping(
        AXIS_KEYS,
        required=("values",),
        key=_TEXT,
        keys=_LIST | {"items": _TEXT},
        values=_LIST,
        labels=_LIST,
        repeat={"type": "boolean"},
    )
    plot = _mapping(
        PLOT_KEYS,
        required=("kind",),
        kind={"enum": list(PLOT_KINDS)},
        x=_TEXT,
        y=_LIST | {"items": _TEXT},
        colour=_TEXT,
    )
    study = _mapping(
        STUDY_KEYS,
        required=("name", "base"),
        name=_TEXT | {"pattern": "^[A-Za-z0-9._-]+$"},
        base=_TEXT,
        set=_SETTINGS,
        axes=_LIST | {"items": axis},
        points=_LIST | {"items": _SETTINGS},
        reference=_SETTINGS,
        plot=plot,
    )
    study["anyOf"] = [{"required": ["axes"]}, {"required": ["points"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **study, "title": "moesim study"}


def _mapping(texts: Mapping[str, str], *, required: tuple[str, ...], **types: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping that has the keys of `texts` alone, each with its type."""
    properties = {key: {**types[key], "description": text} for key, text in texts.items()}
    return {"type": "object", "additionalProperties": False, "properties": properties, "required": list(required)}
