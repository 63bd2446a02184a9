"""How points look in every plot: colours, markers, axes with their units, and the text under the pointer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from moesim.report import facts
from moesim.report.plots.drawing import AxisKey, Variable
from moesim.report.plots.groups import Axis, Collection, Estimate, Group
from moesim.report.plots.metrics import (
    HEADLINE,
    MISSING,
    Metric,
    Unit,
    is_number,
    metric,
    plain,
    short_names,
    text,
    text_of,
    unit_for,
)

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
