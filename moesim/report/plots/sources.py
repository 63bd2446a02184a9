"""The folders of runs, sweeps and plans as one list of points, each with what was varied and what came out.

A point is one simulated scenario. Points that were not simulated to the end stay in the list with their reason.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.report.plots.metrics import MISSING, flatten, value_at
from moesim.scenario.document import parse_yaml
from moesim.strict_json import parse_json
from moesim.study import read_points
from moesim.study.points import POINTS_FILE

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
