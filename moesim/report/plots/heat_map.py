"""A metric over two axes, as colours with the numbers in the cells. Every other axis shows one value at a time."""

from typing import Any

import plotly.graph_objects as go

from moesim.report.figures import blank
from moesim.report.plots.choice import AxisKey, Drawing
from moesim.report.plots.curves import NO_RESULT
from moesim.report.plots.groups import Collection, Group
from moesim.report.plots.metrics import LOWER, Metric
from moesim.report.plots.points import DONE, plain
from moesim.report.plots.styling import hover_text, name_of, units_for, with_pointer

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
        blank(
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
        colorbar={
            "title": {"text": plain(variable.label + unit.title), "side": "right", "font": {"size": 13}},
            "thickness": 14,
            "outlinewidth": 0,
            "exponentformat": "SI",
        },
        xgap=2,
        ygap=2,
        texttemplate="%{text}",
        hovertemplate="%{customdata}<extra></extra>",
        hoverongaps=False,
        meta={"cells": cells},
    )
    _mark_missing(figure, collection, drawing)
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
        key: [[blank] * len(x.axis.values) for _ in y.axis.values]
        for key, blank in (("z", None), ("text", ""), ("customdata", ""))
    }
    for place, index in enumerate(cells["groups"]):
        if is_first(collection.groups[index], collection, drawing):
            for key, matrix in matrices.items():
                matrix[cells["row"][place]][cells["column"][place]] = cells[key][place]
    return matrices


def _mark_missing(figure: go.Figure, collection: Collection, drawing: Drawing) -> None:
    """A cross in the cells of points without a result."""
    x, y = heat_axes(drawing)
    across, up = collection.axes.index(x.axis), collection.axes.index(y.axis)
    missing = [group for group in collection.groups if group.status != DONE]
    if missing:
        figure.add_scatter(
            x=[group.at[across] for group in missing],
            y=[group.at[up] for group in missing],
            mode="markers",
            name="no result",
            showlegend=True,
            marker={"symbol": "x-thin", "size": 14, "line": {"color": NO_RESULT, "width": 2.5}},
            customdata=[hover_text(group, collection) for group in missing],
            hovertemplate="%{customdata}<extra></extra>",
            meta={"groups": [group.index for group in missing], "role": "missing"},
        )
