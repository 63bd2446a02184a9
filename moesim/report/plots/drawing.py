"""What is drawn, and how points look in every plot.

What: from the flags, else from the `plot:` section of a study, else what suits the axes. How: colours, markers, axes
with their units, and the text under the pointer.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from moesim.errors import UserError
from moesim.report import facts
from moesim.report.plots.groups import Axis, Collection, Estimate, Group
from moesim.report.plots.metrics import (
    HEADLINE,
    MISSING,
    Metric,
    Unit,
    is_number,
    metric,
    paths_of,
    plain,
    short_names,
    text,
    text_of,
    unit_for,
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


# blue, orange, green-blue, magenta, purple, yellow, grey, brown: distinct under every common colour blindness
CATEGORICAL = ("#2474b5", "#e07b1a", "#0a7f86", "#b3256b", "#7a4fbf", "#d9b310", "#7a828e", "#9c5f2e")
SEQUENTIAL = ("#fde0a1", "#f6b26b", "#ea7f52", "#cf4f5c", "#a0316a", "#6b2170", "#3a1660")  # light to dark
MARKERS = ("circle", "diamond", "square", "triangle-up", "triangle-down", "cross", "star", "hexagon")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
FRONT = "#6b7480"
_ORDERED_FROM = 4  # numeric values from which on colours run from light to dark
_NEAR_ZERO = 0.4
_LOG_FROM = 6.0  # largest / smallest value from which on an axis is logarithmic
_MOST_TICKS = 14
_LONGEST_HOVER = 90
_ROUND_OFF = 1e-6
_MANTISSAS = ((1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0))
_FEWEST_TICKS = 4


def colours(axis: Axis | None) -> list[str]:
    """A colour for every value of the axis."""
    if axis is None:
        return [CATEGORICAL[0]]
    count = len(axis.values)
    if count >= _ORDERED_FROM and len(axis.keys) == 1 and all(is_number(value[0]) for value in axis.values):
        places = np.linspace(0.15, 1.0, count) * (len(SEQUENTIAL) - 1)
        return [_between(place) for place in places]
    return [CATEGORICAL[index % len(CATEGORICAL)] for index in range(count)]


def _between(place: float) -> str:
    low = min(int(place), len(SEQUENTIAL) - 2)
    ends = [[int(SEQUENTIAL[low + side][start : start + 2], 16) for start in (1, 3, 5)] for side in (0, 1)]
    mixed = [round(a + (place - low) * (b - a)) for a, b in zip(*ends, strict=True)]
    return "#" + "".join(f"{part:02x}" for part in mixed)


def translucent(colour: str, share: float) -> str:
    """`#rrggbb` as an rgba() of that opacity."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share})"


def name_of(variable: Variable, collection: Collection) -> str:
    """What a variable is called on the page."""
    if isinstance(variable, Metric):
        return variable.label
    if variable.axis.labelled or variable.key == variable.axis.keys[0]:
        return variable.axis.name
    return short_names([key for axis in collection.axes for key in axis.keys])[variable.key]


def title_of(variable: Metric, unit: Unit) -> str:
    """The title of an axis: label and unit."""
    return plain(variable.label + unit.title)


def is_log(values: Sequence[float], *, ratio: float = _LOG_FROM) -> bool:
    """Whether an axis over these values is better logarithmic: all positive and spread wide."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= ratio


def set_metric_axis(
    update: Any,
    variable: Metric,
    values: Sequence[float],
    unit: Unit,
    *,
    titled: bool = True,
    log_from: float = _LOG_FROM,
) -> None:
    """Scale, ticks and title of an axis over the drawn (already scaled) `values` of a metric.

    Linear axes begin at zero where the values come near it anyway.
    """
    if titled:
        update(title={"text": title_of(variable, unit)})
    prefix = "$" if variable.quantity == "dollars" else ""
    if is_log(values, ratio=log_from):
        ticks = log_ticks(min(values), max(values))
        update(type="log", tickvals=ticks, ticktext=[prefix + tick_text(tick) for tick in ticks], minor={"ticks": ""})
    else:
        update(tickprefix=prefix, tickformat="~s" if variable.quantity == "rate" else "", exponentformat="SI")
        if values and 0 <= min(values) < _NEAR_ZERO * max(values):
            update(rangemode="tozero")
        middle = max(map(abs, values), default=0.0)
        if values and max(values) - min(values) < _ROUND_OFF * middle:  # or the ticks would show rounding
            update(range=[0.9 * values[0], 1.1 * values[0]] if values[0] > 0 else [1.1 * values[0], 0.9 * values[0]])


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from a little below `low` to a little above `high`."""
    exponents = range(int(np.floor(np.log10(low))) - 1, int(np.ceil(np.log10(high))) + 1)
    for mantissas in _MANTISSAS:
        ticks = [m * 10.0**e for e in exponents for m in mantissas if low / 1.6 <= m * 10.0**e <= high * 1.6]
        if len(ticks) >= _FEWEST_TICKS:
            break
    return ticks


def tick_text(value: float) -> str:
    """`50k`, `2M`, `0.05`."""
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g}{letter}"
    return f"{value:g}"


def set_key_axis(update: Any, variable: AxisKey, collection: Collection) -> None:
    """Ticks and title of an axis over the values of a key: at their numbers, or side by side in their order."""
    update(title={"text": plain(name_of(variable, collection))})
    places = key_places(variable)
    texts = [plain(value) for value in variable.axis.texts]
    if not variable.is_numeric:
        update(tickvals=places, ticktext=texts, range=[-0.5, len(places) - 0.5])
        return
    update(type="log" if len(places) > 2 and is_log(places) else "linear")
    if len(places) <= _MOST_TICKS:
        update(tickvals=places, ticktext=texts if variable.axis.labelled else list(map(tick_text, places)))


def key_places(variable: AxisKey) -> list[float]:
    """Where each value of the axis is drawn."""
    values = [value[variable.position] for value in variable.axis.values]
    return [float(value) for value in values] if variable.is_numeric else list(map(float, range(len(values))))


def interval_text(variable: Metric, found: Estimate | None) -> str:
    """A mean with its 90 % interval and the number of runs behind it."""
    if found is None:
        return facts.NOT_KNOWN
    shown = text(variable, found.mean)
    if found.low is not None and found.high is not None:
        shown += f" ({text(variable, found.low)} to {text(variable, found.high)})"
    return shown + (f", {found.count} runs" if found.count > 1 else "")


def hover_text(group: Group, collection: Collection, metrics: Sequence[Metric] = ()) -> str:
    """The whole layout of a group: every key that differs, its numbers, and what they rest on."""
    rank = f", rank {group.rank}" if group.rank is not None else ""
    lines = [f"<b>{plain(label_of(group))}{rank}</b>"]
    for axis, place in zip(collection.axes, group.at, strict=True):
        if axis.texts[place] == MISSING:
            continue
        lines.append(f"{plain(axis.name)}: {plain(axis.texts[place])}")
        if len(axis.keys) > 1:
            values = zip(axis.keys, axis.values[place], strict=True)
            lines += [f"    {plain(key)}: {plain(text_of(value, longest=_LONGEST_HOVER))}" for key, value in values]
    shown = dict.fromkeys([*(m.path for m in metrics), *HEADLINE])
    lines += [
        f"{plain(metric(path).label)}: {interval_text(metric(path), group.estimate(metric(path)))}" for path in shown
    ]
    if group.results:
        lines.append("rests on: " + plain(sources_text(group.results[0])))
    else:
        lines.append(plain(f"{group.status}: {group.points[0].reason}"))
    return "<br>".join(lines)


def label_of(group: Group) -> str:
    """`point 7`, `points 7, 8, 9`, or the folder of a run."""
    if group.points[0].scenario is not None:
        return ", ".join(point.folder for point in group.points)
    numbers = [point.number for point in group.points]
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"points {numbers[0]} to {numbers[-1]}"
    return f"point{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def sources_text(result: Any) -> str:
    """Shares of the estimated time by source, largest first: `77 % interpolated, 12 % network`."""
    shares = sorted(result.get("estimate_sources", {}).items(), key=lambda item: -item[1])
    return ", ".join(f"{100 * share:.0f} % {name}" for name, share in shares if share >= 0.005) or facts.NOT_KNOWN


def units_for(collection: Collection, metrics: Sequence[Metric]) -> dict[str, Unit]:
    """One unit for each metric, over all groups."""
    return {
        found.path: unit_for(found, [e.mean for group in collection.done if (e := group.estimate(found)) is not None])
        for found in metrics
    }


def with_pointer(figure: go.Figure) -> go.Figure:
    """Hover labels that hold several lines, aligned to the left."""
    figure.update_layout(hoverlabel={"align": "left", "namelength": -1}, hovermode="closest")
    return figure


def legend_title(axis: Axis | None) -> dict[str, Any]:
    """What the colours of a legend tell apart."""
    return {"text": plain(axis.name) if axis else "", "font": {"size": 13}, "side": "top"}
