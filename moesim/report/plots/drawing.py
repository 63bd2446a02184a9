"""What is drawn: from the flags, else from the `plot:` section of a study, else what suits the axes."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moesim.errors import UserError
from moesim.report.plots.groups import Axis, Collection
from moesim.report.plots.metrics import (
    MISSING,
    Metric,
    is_number,
    metric,
    paths_of,
)

CURVES, HEAT_MAP, COST_PERFORMANCE, COMPARISON = KINDS = ("curves", "heat_map", "cost_performance", "comparison")
SPEED, PRICE = "tokens_per_second", "cost.usd_per_million_tokens"
_DEFAULT_CURVES = (
    "step_time_s",
    "router.validation_loss",
    "imbalance.rank_rows",
    "derived.bytes_per_token",
    "dropped_share",
)
_MOST_PANELS = 4
_MOST_COLOURS = 8
_MANY = 2  # axes from which on curves no longer suit
_VARIES = 1e-9  # relative spread from which on a metric is worth a panel


@dataclass(frozen=True)
class PlotRequest:
    """What the flags ask for; None or empty where they leave it open."""

    kind: str | None = None
    x: str | None = None
    ys: tuple[str, ...] = ()
    colour: str | None = None


@dataclass(frozen=True)
class AxisKey:
    """One key of an axis: `position` among the keys that change together."""

    axis: Axis
    position: int = 0

    @property
    def key(self) -> str:
        """The dotted key."""
        return self.axis.keys[self.position]

    @property
    def is_numeric(self) -> bool:
        """Whether every value of the key is a number, all of them different."""
        values = [value[self.position] for value in self.axis.values]
        return all(is_number(value) for value in values) and len(set(values)) == len(values)


Variable = AxisKey | Metric


@dataclass(frozen=True)
class Drawing:
    """What to draw: `x` and `ys` as the kind takes them, `colour` the axis that colours tell apart."""

    kind: str
    x: Variable
    ys: tuple[Variable, ...]
    colour: Axis | None = None

    @property
    def metrics(self) -> list[Metric]:
        """The metrics that are drawn."""
        return [variable for variable in (self.x, *self.ys) if isinstance(variable, Metric)]


def choose(collection: Collection, asked: PlotRequest) -> Drawing:
    """The drawing of `collection`. Raises UserError for a name that is no axis or metric, with the nearest one."""
    section, kind = _section(collection), kind_of(collection, asked)
    follow = section if section.get("kind", kind) == kind else {}  # keys of another kind mean nothing here
    x = _resolve(asked.x or follow.get("x"), collection, flag="--x" if asked.x else "plot.x")
    names = asked.ys or _as_tuple(follow.get("y"))
    ys = tuple(_known(name, collection, flag="--y" if asked.ys else "plot.y") for name in names)
    colour = _resolve(
        asked.colour or follow.get("colour"), collection, flag="--colour" if asked.colour else "plot.colour"
    )
    draw = {CURVES: _curves, HEAT_MAP: _heat_map, COST_PERFORMANCE: _cost_performance}[kind]
    return draw(collection, x, ys, colour)


def kind_of(collection: Collection, asked: PlotRequest) -> str:
    """The kind of drawing. Raises UserError."""
    kind = asked.kind or _section(collection).get("kind") or _default_kind(collection)
    if kind not in KINDS:
        raise UserError(f"plot.kind: unknown kind {kind!r}; use one of {', '.join(KINDS)}")
    return str(kind)


def _section(collection: Collection) -> Mapping[str, Any]:
    """The first study's own `plot:`."""
    sections = [source.about["plot"] for source in collection.sources if source.about.get("plot")]
    return sections[0] if sections else {}


def _as_tuple(names: Any) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else tuple(names)


def _default_kind(collection: Collection) -> str:
    sweeps = all(source.kind == "sweep" for source in collection.sources)
    return CURVES if sweeps and 1 <= len(collection.axes) <= _MANY else COST_PERFORMANCE


def _resolve(name: str | None, collection: Collection, *, flag: str) -> Variable | None:
    return None if name is None else _known(name, collection, flag=flag)


def _known(name: str, collection: Collection, *, flag: str) -> Variable:
    """The axis or metric called `name`: its whole path, or an ending of it that fits only one."""
    keys = {key: AxisKey(axis, place) for axis in collection.axes for place, key in enumerate(axis.keys)}
    if name in keys:
        return keys[name]
    paths = paths_of(collection.results)
    if name in paths:
        return metric(name)
    ending = [path for path in (*keys, *paths) if path.endswith(f".{name}")]
    if len(ending) == 1:
        return keys[ending[0]] if ending[0] in keys else metric(ending[0])
    if any(name in axis.keys for axis in collection.repeats):
        raise UserError(f"{flag}: {name} is a repetition, over which plots take means; choose another key")
    raise UserError(
        f"{flag}: {name!r} is neither a metric of these results nor an axis{_nearest(name, [*keys, *paths])}"
    )


def _nearest(name: str, known: Sequence[str]) -> str:
    short = {path.rpartition(".")[2]: path for path in reversed(known)}
    near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name, list(short), n=1)
    if near:
        return f"; did you mean {short.get(near[0], near[0])!r}?"
    return f"; there are {', '.join(known[:8])}, ..."


def _varied(collection: Collection) -> tuple[Axis, ...]:
    """Axes with several values; of a study whose first point alone is done, all. Raises UserError without any."""
    axes = tuple(axis for axis in collection.axes if len(axis.values) > 1) or collection.axes
    if not axes:
        raise UserError("curves: nothing was varied between the points; use --kind cost_performance")
    return axes


def _axis_of(variable: Variable | None, *, flag: str) -> Axis | None:
    if isinstance(variable, Metric):
        raise UserError(f"{flag}: {variable.path} is a metric; colours need an axis")
    return variable.axis if variable else None


def _check_everywhere(collection: Collection, variables: Sequence[Variable]) -> None:
    """Raises UserError where one of the folders knows nothing of a key that is drawn."""
    for key in (variable.key for variable in variables if isinstance(variable, AxisKey)):
        for point in collection.points:
            if point.values.get(key, MISSING) == MISSING:
                raise UserError(f"{point.folder}: has no {key}, so it cannot be drawn with the others; plot it apart")


def _curves(collection: Collection, x: Variable | None, ys: tuple[Variable, ...], colour: Variable | None) -> Drawing:
    axes = _varied(collection)
    chosen = _axis_of(colour, flag="--colour")
    if x is None:
        numeric = [axis for axis in axes if AxisKey(axis).is_numeric and axis is not chosen]
        free = numeric or [axis for axis in axes if axis is not chosen] or list(axes)
        x = AxisKey(max(free, key=lambda axis: len(axis.values)))
    _check_everywhere(collection, [x])
    if any(isinstance(y, AxisKey) for y in ys):
        raise UserError("--y: a curve needs a metric, e.g. step_time_s")
    along = x.axis if isinstance(x, AxisKey) else None
    rest = [axis for axis in axes if axis is not along]
    if chosen is None and rest and (along or len(rest) > 1):
        chosen = min(rest, key=lambda axis: len(axis.values))
    return Drawing(CURVES, x, ys or _telling_metrics(collection), chosen)


def _telling_metrics(collection: Collection) -> tuple[Metric, ...]:
    """Step time, and what else differs between the points."""
    chosen = []
    for path in _DEFAULT_CURVES:
        values = [found for result in collection.results if (found := metric(path).of(result)) is not None]
        spread = max(values, default=0.0) - min(values, default=0.0)
        if path == "step_time_s" or spread > _VARIES * max(map(abs, values), default=0.0):
            chosen.append(metric(path))
    return tuple(chosen[:_MOST_PANELS])


def _heat_map(collection: Collection, x: Variable | None, ys: tuple[Variable, ...], colour: Variable | None) -> Drawing:
    """Two axes and at least one metric, wherever they are named."""
    named = [variable for variable in (x, *ys, colour) if variable is not None]
    axes = list(dict.fromkeys(variable for variable in named if isinstance(variable, AxisKey)))
    metrics = [variable for variable in named if isinstance(variable, Metric)]
    taken = [variable.axis for variable in axes]
    free = sorted((axis for axis in collection.axes if axis not in taken), key=lambda axis: -len(axis.values))
    axes += [AxisKey(axis) for axis in free][: max(0, 2 - len(axes))]
    if len(axes) != 2 or axes[0].axis is axes[1].axis:
        raise UserError(f"heat_map: needs two axes that were varied; there are {len(collection.axes)}")
    _check_everywhere(collection, axes)
    return Drawing(HEAT_MAP, axes[0], (axes[1], *(metrics or [metric("step_time_s")])))


def _cost_performance(
    collection: Collection, x: Variable | None, ys: tuple[Variable, ...], colour: Variable | None
) -> Drawing:
    paths = paths_of(collection.results)
    if not ys and PRICE not in paths:
        raise UserError("no result holds a price: give cluster.price_per_gpu_hour, or choose another --y")
    ys = ys or (metric(PRICE),)
    x = x or metric(SPEED)
    if len(ys) != 1 or not isinstance(x, Metric) or not isinstance(ys[0], Metric):
        raise UserError("cost_performance: needs one metric for --x and one for --y; use --kind curves for axes")
    chosen = _axis_of(colour, flag="--colour")
    if chosen is None:
        fitting = [axis for axis in collection.axes if 1 < len(axis.values) <= _MOST_COLOURS]
        named = [axis for axis in fitting if axis.keys[0].endswith(("gpu", "kind", "folder"))]
        chosen = min(named or fitting, key=lambda axis: len(axis.values), default=None)
    return Drawing(COST_PERFORMANCE, x, ys, chosen)
