"""Metrics along an axis (or another metric): a panel per metric, a line per combination of the other axes.

Bands and bars are 90 % intervals, over seeds or, for a single run, its own range over resampled routing. A metric over
two axes is a heat map, colours with the numbers in the cells, where every other axis shows one value at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moesim.report.figures import colour_bar, empty_figure, styled
from moesim.report.plots.drawing import AxisKey, Drawing
from moesim.report.plots.groups import Axis, Collection, Estimate, Group
from moesim.report.plots.looks import (
    DASHES,
    MARKERS,
    colours,
    hover_text,
    key_places,
    legend_title,
    name_of,
    set_key_axis,
    set_metric_axis,
    title_of,
    translucent,
    units_for,
    with_pointer,
)
from moesim.report.plots.metrics import LOWER, Metric, Unit, is_number, plain
from moesim.report.plots.sources import DONE


@dataclass(frozen=True)
class Line:
    """Groups that differ on one axis only, in its order."""

    name: str
    colour: str
    symbol: str
    dash: str
    groups: tuple[Group, ...]


def along_axis(collection: Collection, drawing: Drawing) -> Axis:
    """The axis that a line follows: that of x, and for a metric on x the one with most values."""
    if isinstance(drawing.x, AxisKey):
        return drawing.x.axis
    return max((axis for axis in collection.axes if axis is not drawing.colour), key=lambda axis: len(axis.values))


def lines_along(collection: Collection, drawing: Drawing, along: Axis) -> list[Line]:
    """A line for every combination of the other axes; lines of one colour differ in their dashes."""
    column = collection.axes.index(along)
    members: dict[tuple[int, ...], list[Group]] = {}
    for group in collection.done:
        members.setdefault((*group.at[:column], -1, *group.at[column + 1 :]), []).append(group)
    by_colour = colours(drawing.colour)
    colour_column = collection.axes.index(drawing.colour) if drawing.colour else None
    used: dict[int, int] = {}  # how many lines of a colour there are already: they differ in their dashes
    lines = []
    for at in sorted(members):
        index = 0 if colour_column is None else at[colour_column]
        used[index] = used.get(index, -1) + 1
        others = [
            (axis, place)
            for axis, place in zip(collection.axes, at, strict=True)
            if place >= 0 and len(axis.values) > 1
        ]
        own = [axis.texts[place] for axis, place in others if axis is drawing.colour]
        rest = [f"{axis.name} {axis.texts[place]}" for axis, place in others if axis is not drawing.colour]
        lines.append(
            Line(
                name=", ".join([*own, *rest]),
                colour=by_colour[index],
                symbol=MARKERS[index % len(MARKERS)],
                dash=DASHES[used[index] % len(DASHES)],
                groups=tuple(sorted(members[at], key=lambda group: group.at[column])),
            )
        )
    return lines


def error_bars(found: Sequence[Estimate], factor: float, colour: str) -> dict[str, Any] | None:
    """Bars of the 90 % intervals, None where there are none."""
    if all(estimate.low is None for estimate in found):
        return None
    return {
        "type": "data",
        "symmetric": False,
        "array": [0.0 if e.high is None else (e.high - e.mean) * factor for e in found],
        "arrayminus": [0.0 if e.low is None else (e.mean - e.low) * factor for e in found],
        "color": colour,
        "thickness": 1.2,
        "width": 4,
    }


_PANEL_HEIGHT, _SINGLE_HEIGHT = 330, 480
_TOP, _TOP_WITHOUT_LEGEND, _BOTTOM = 88, 36, 64
_LOG_FROM = 50.0  # curves show proportions better on a linear axis
_LOG_FROM_ACROSS = 4.0  # points with labels need room
_MOST_MARKS, _LONGEST_MARK = 8, 12
NO_RESULT = "#b5561d"


def curves(collection: Collection, drawing: Drawing) -> go.Figure:
    """`meta.groups` of a trace says which group each of its points is."""
    metrics = [y for y in drawing.ys if isinstance(y, Metric)]
    units = units_for(collection, drawing.metrics)
    figure, panels = _panels([title_of(y, units[y.path]) for y in metrics])
    along = along_axis(collection, drawing)
    lines = lines_along(collection, drawing, along)
    for y, panel in zip(metrics, panels, strict=True):
        drawn: list[float] = []
        for line in lines:
            drawn += _add_line(figure, collection, drawing, line, y, panel, units)
        set_metric_axis(
            partial(figure.update_yaxes, **panel), y, drawn, units[y.path], titled=False, log_from=_LOG_FROM
        )
        _set_x(partial(figure.update_xaxes, **panel), collection, drawing, units)
    if isinstance(drawing.x, AxisKey):
        _mark_missing(figure, collection, drawing.x, panels[0])
    shown = len(lines) > 1 or any(trace.showlegend for trace in figure.data)
    if not shown:
        figure.update_layout(
            margin={"t": _TOP_WITHOUT_LEGEND}, height=figure.layout.height - _TOP + _TOP_WITHOUT_LEGEND
        )
    figure.update_layout(showlegend=shown, legend={"title": legend_title(drawing.colour)})
    return figure


def _panels(titles: Sequence[str]) -> tuple[go.Figure, list[dict[str, int]]]:
    """A figure with a titled panel for each text, two in a row, and the places of the panels."""
    columns = min(len(titles), 2 if len(titles) in (2, 4) else 3)
    rows = -(-len(titles) // columns)
    height = _SINGLE_HEIGHT if len(titles) == 1 else _TOP + _BOTTOM + _PANEL_HEIGHT * rows
    inside = height - _TOP - _BOTTOM
    spacing = {"horizontal_spacing": 0.09 / (columns - 1)} if columns > 1 else {}
    spacing |= {"vertical_spacing": 96 / inside} if rows > 1 else {}
    figure = make_subplots(rows=rows, cols=columns, subplot_titles=list(titles), **spacing)
    figure = with_pointer(styled(figure, height=height))
    figure.update_layout(margin={"t": _TOP, "b": _BOTTOM}, legend={"y": 1 + 32 / inside})
    for index, annotation in enumerate(figure.layout.annotations):
        left = figure.layout[f"xaxis{index + 1 if index else ''}"].domain[0]
        annotation.update(x=left, xanchor="left", font={"size": 14})
    return figure, [{"row": 1 + index // columns, "col": 1 + index % columns} for index in range(len(titles))]


def _add_line(
    figure: go.Figure,
    collection: Collection,
    drawing: Drawing,
    line: Line,
    y: Metric,
    panel: dict[str, int],
    units: dict[str, Unit],
) -> list[float]:
    """Draw the groups of a line that have the metric; returns what was drawn on y."""
    spots = [
        (group, x, found)
        for group in line.groups
        if (x := _x_of(group, collection, drawing, units)) is not None and (found := group.estimate(y)) is not None
    ]
    factor = units[y.path].factor
    numbers = [group.index for group, _, _ in spots]
    banded = isinstance(drawing.x, AxisKey) and _add_band(figure, line, spots, factor, panel)
    figure.add_scatter(
        x=[x.mean for _, x, _ in spots],
        y=[found.mean * factor for _, _, found in spots],
        **_line_or_labels(collection, drawing, [group for group, _, _ in spots]),
        name=plain(line.name),
        legendgroup=line.name,
        showlegend=panel == {"row": 1, "col": 1} and bool(line.name),
        line={"color": line.colour, "width": 2, "dash": line.dash},
        marker={"color": line.colour, "size": 9, "symbol": line.symbol, "line": {"color": "#ffffff", "width": 1}},
        error_x=None if isinstance(drawing.x, AxisKey) else error_bars([x for _, x, _ in spots], 1.0, line.colour),
        error_y=None if banded else error_bars([found for _, _, found in spots], factor, line.colour),
        customdata=[hover_text(group, collection, drawing.metrics) for group, _, _ in spots],
        hovertemplate="%{customdata}<extra></extra>",
        cliponaxis=False,
        meta={"groups": numbers, "role": "points"},
        **panel,
    )
    return [value * factor for _, _, e in spots for value in (e.mean, e.low, e.high) if value is not None]


def _line_or_labels(collection: Collection, drawing: Drawing, groups: Sequence[Group]) -> dict[str, Any]:
    """Against a key a line; against a metric points with what they are, joined where that has an order."""
    if isinstance(drawing.x, AxisKey):
        return {"mode": "lines+markers"}
    along = along_axis(collection, drawing)
    column, marks = collection.axes.index(along), point_marks(along)
    ordered = sum(is_number(value[0]) for value in along.values) >= len(along.values) - 1  # all but "no limit"
    return {
        "mode": "lines+markers+text" if ordered else "markers+text",
        "text": [plain(marks[group.at[column]]) for group in groups],
        "textposition": "top right",
        "textfont": {"size": 12},
    }


def point_marks(along: Axis) -> tuple[str, ...]:
    """What stands beside points on a plot against a metric: their value, or its number where that is too long."""
    if len(along.texts) <= _MOST_MARKS and all(len(text) <= _LONGEST_MARK for text in along.texts):
        return along.texts
    return tuple(str(1 + place) for place in range(len(along.texts)))


def _x_of(group: Group, collection: Collection, drawing: Drawing, units: dict[str, Unit]) -> Estimate | None:
    if isinstance(drawing.x, Metric):
        found, factor = group.estimate(drawing.x), units[drawing.x.path].factor
        return found and Estimate(
            found.mean * factor,
            None if found.low is None else found.low * factor,
            None if found.high is None else found.high * factor,
            found.count,
        )
    place = group.at[collection.axes.index(drawing.x.axis)]
    return Estimate(key_places(drawing.x)[place], None, None, 1)


def _add_band(
    figure: go.Figure,
    line: Line,
    spots: Sequence[tuple[Group, Estimate, Estimate]],
    factor: float,
    panel: dict[str, int],
) -> bool:
    """The 90 % intervals as an area around the line; says whether there are enough of them for one."""
    bounded = [(g, x.mean, e.low, e.high) for g, x, e in spots if e.low is not None and e.high is not None]
    if len(bounded) < max(2, len(spots)):
        return False
    there_and_back = [*bounded, *reversed(bounded)]
    figure.add_scatter(
        x=[x for _, x, _, _ in there_and_back],
        y=[high * factor for *_, high in bounded] + [low * factor for _, _, low, _ in reversed(bounded)],
        mode="lines",
        fill="toself",
        fillcolor=translucent(line.colour, 0.18),
        line={"width": 0},
        hoverinfo="skip",
        showlegend=False,
        legendgroup=line.name,
        meta={"groups": [group.index for group, *_ in there_and_back], "role": "band"},
        **panel,
    )
    return True


def _set_x(update: Any, collection: Collection, drawing: Drawing, units: dict[str, Unit]) -> None:
    if isinstance(drawing.x, AxisKey):
        set_key_axis(update, drawing.x, collection)
        return
    values = [
        found.mean * units[drawing.x.path].factor
        for group in collection.done
        if (found := group.estimate(drawing.x)) is not None
    ]
    set_metric_axis(update, drawing.x, values, units[drawing.x.path], log_from=_LOG_FROM_ACROSS)


def _mark_missing(figure: go.Figure, collection: Collection, x: AxisKey, panel: dict[str, int]) -> None:
    """A cross at the foot of the first panel for every point without a result."""
    column, places = collection.axes.index(x.axis), key_places(x)
    if _add_missing(figure, collection, lambda group: (places[group.at[column]], 0.02), size=10, width=2, **panel):
        figure.data[-1].update(yaxis=_foot_axis(figure))


def _add_missing(
    figure: go.Figure,
    collection: Collection,
    place: Callable[[Group], tuple[float, float]],
    *,
    size: float,
    width: float,
    **panel: int,
) -> bool:
    """Crosses at the places of points without a result; whether there are any."""
    missing = [group for group in collection.groups if group.status != DONE]
    if missing:
        figure.add_scatter(
            x=[place(group)[0] for group in missing],
            y=[place(group)[1] for group in missing],
            mode="markers",
            name="no result",
            showlegend=True,
            marker={"symbol": "x-thin", "size": size, "line": {"color": NO_RESULT, "width": width}},
            customdata=[hover_text(group, collection) for group in missing],
            hovertemplate="%{customdata}<extra></extra>",
            meta={"groups": [group.index for group in missing], "role": "missing"},
            **panel,
        )
    return bool(missing)


def _foot_axis(figure: go.Figure) -> str:
    """A second y axis over the first panel, 0 at its foot and 1 at its top, without ticks."""
    figure.update_layout(
        {"yaxis99": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True, "anchor": "x"}}
    )
    return "y99"


_LARGEST_WITH_NUMBERS = 200


def heat_axes(drawing: Drawing) -> tuple[AxisKey, AxisKey]:
    """The axis to the right and the axis upwards."""
    x, y = drawing.x, drawing.ys[0]
    assert isinstance(x, AxisKey) and isinstance(y, AxisKey), "a heat map lies over two axes"
    return x, y


def heat_map(collection: Collection, drawing: Drawing, variable: Metric) -> go.Figure:
    """Cells hold the groups whose other axes have their first value; `meta.cells` holds those of all values."""
    x, y = heat_axes(drawing)
    columns, rows = len(x.axis.values), len(y.axis.values)
    unit = units_for(collection, [variable])[variable.path]
    figure = with_pointer(
        empty_figure(
            height=max(300, min(760, 140 + 46 * rows)), x=plain(name_of(x, collection)), y=plain(name_of(y, collection))
        )
    )
    cells = _cells(collection, x, y, variable, unit.factor)
    if columns * rows > _LARGEST_WITH_NUMBERS:
        cells["text"] = [""] * len(cells["text"])
    figure.add_heatmap(
        x=list(range(columns)),
        y=list(range(rows)),
        **first_cells(collection, drawing, cells),
        colorscale="Cividis",
        reversescale=variable.better == LOWER,  # the better, the lighter
        colorbar=colour_bar(title_of(variable, unit), exponentformat="SI"),
        xgap=2,
        ygap=2,
        texttemplate="%{text}",
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        meta={"cells": cells},
    )
    across, up = collection.axes.index(x.axis), collection.axes.index(y.axis)
    _add_missing(figure, collection, lambda group: (group.at[across], group.at[up]), size=14, width=2.5)
    figure.update_layout(showlegend=any(trace.showlegend for trace in figure.data))
    for update, key in ((figure.update_xaxes, x), (figure.update_yaxes, y)):
        count = len(key.axis.values)
        texts = [plain(text) for text in key.axis.texts]
        update(tickvals=list(range(count)), ticktext=texts, range=[-0.5, count - 0.5], showgrid=False)
    return figure


def _cells(collection: Collection, x: AxisKey, y: AxisKey, variable: Metric, factor: float) -> dict[str, Any]:
    """Column, row, value, number and hover text of every group that has the metric."""
    across, up = collection.axes.index(x.axis), collection.axes.index(y.axis)
    found = [(group, e.mean) for group in collection.done if (e := group.estimate(variable)) is not None]
    return {
        "groups": [group.index for group, _ in found],
        "column": [group.at[across] for group, _ in found],
        "row": [group.at[up] for group, _ in found],
        "z": [mean * factor for _, mean in found],
        "text": [f"{mean * factor:.3g}" for _, mean in found],
        "customdata": [hover_text(group, collection, [variable]) for group, _ in found],
    }


def is_first(group: Group, collection: Collection, drawing: Drawing) -> bool:
    """Whether the group has the first value of every axis that the heat map does not show."""
    shown = [key.axis for key in heat_axes(drawing)]
    return all(place == 0 or axis in shown for axis, place in zip(collection.axes, group.at, strict=True))


def first_cells(collection: Collection, drawing: Drawing, cells: dict[str, Any]) -> dict[str, Any]:
    """z, text and customdata as matrices [row][column], empty where there is no group."""
    x, y = heat_axes(drawing)
    matrices: dict[str, Any] = {
        key: [[empty_figure] * len(x.axis.values) for _ in y.axis.values]
        for key, empty_figure in (("z", None), ("text", ""), ("customdata", ""))
    }
    for place, index in enumerate(cells["groups"]):
        if is_first(collection.groups[index], collection, drawing):
            for key, matrix in matrices.items():
                matrix[cells["row"][place]][cells["column"][place]] = cells[key][place]
    return matrices
