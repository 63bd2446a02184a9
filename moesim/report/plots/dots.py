"""Metrics of settings that have no order and long names: a row for each setting, a panel for each metric."""

from functools import partial

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moesim.report.figures import dressed
from moesim.report.plots.choice import AxisKey, Drawing
from moesim.report.plots.curves import error_bars, lines_along
from moesim.report.plots.groups import Collection
from moesim.report.plots.metrics import Metric, Unit
from moesim.report.plots.points import plain
from moesim.report.plots.styling import hover_text, legend_title, set_metric_axis, title_of, units_for, with_pointer

_MOST_PLACES, _LONGEST_NAME, _LONGEST_TITLE = 10, 14, 18
_TOP, _TOP_WITHOUT_LEGEND, _BOTTOM, _ROW = 108, 56, 40, 26
_APART = 0.16  # rows between the lines of one setting
_LOG_FROM = 50.0


def suits_dots(drawing: Drawing) -> bool:
    """Whether the values on x are names too many or too long to stand side by side."""
    if not isinstance(drawing.x, AxisKey) or drawing.x.is_numeric:
        return False
    texts = drawing.x.axis.texts
    return len(texts) > _MOST_PLACES or max(map(len, texts)) > _LONGEST_NAME


def dots(collection: Collection, drawing: Drawing, *, numbered: bool = False) -> go.Figure:
    """`meta.groups` of a trace says which group each of its points is; `numbered` puts numbers before the names."""
    x = drawing.x
    assert isinstance(x, AxisKey), "rows are the values of an axis"
    metrics = [y for y in drawing.ys if isinstance(y, Metric)]
    units = units_for(collection, metrics)
    rows = len(x.axis.values)
    figure = make_subplots(
        rows=1, cols=len(metrics), shared_yaxes=True, horizontal_spacing=0.03,
        subplot_titles=[_in_two_lines(title_of(y, units[y.path])) for y in metrics],
    )  # fmt: skip
    figure = with_pointer(dressed(figure, height=_TOP + _BOTTOM + _ROW * rows))
    for number, y in enumerate(metrics, start=1):
        drawn = _add_panel(figure, collection, drawing, y, units[y.path], column=number)
        update = partial(figure.update_xaxes, row=1, col=number)
        set_metric_axis(update, y, drawn, units[y.path], titled=False, log_from=_LOG_FROM)
        left = figure.layout[f"xaxis{number if number > 1 else ''}"].domain[0]
        figure.layout.annotations[number - 1].update(x=left, xanchor="left", align="left", font={"size": 14})
    figure.update_yaxes(range=[rows - 0.5, -0.5], tickvals=list(range(rows)))
    numbers = [f"{place}  " if numbered else "" for place in range(1, rows + 1)]
    names = [number + plain(text) for number, text in zip(numbers, x.axis.texts, strict=True)]
    figure.update_yaxes(ticktext=names, col=1)
    shown = any(trace.showlegend for trace in figure.data)
    figure.update_layout(
        showlegend=shown,
        height=figure.layout.height - (0 if shown else _TOP - _TOP_WITHOUT_LEGEND),
        margin={"t": _TOP if shown else _TOP_WITHOUT_LEGEND, "b": _BOTTOM},
        legend={"y": 1 + 52 / (_ROW * rows), "title": legend_title(drawing.colour)},
    )
    return figure


def _in_two_lines(title: str) -> str:
    """Panels are narrow: what stands behind the last comma of a long title goes below."""
    head, comma, tail = title.rpartition(", ")
    return f"{head},<br>{tail}" if comma and len(title) > _LONGEST_TITLE else title


def _add_panel(
    figure: go.Figure, collection: Collection, drawing: Drawing, y: Metric, unit: Unit, *, column: int
) -> list[float]:
    """Draw one metric; returns what was drawn."""
    assert isinstance(drawing.x, AxisKey), "rows are the values of an axis"
    axis = drawing.x.axis
    lines = lines_along(collection, drawing, axis)
    drawn: list[float] = []
    for index, line in enumerate(lines):
        spots = [(group, found) for group in line.groups if (found := group.estimate(y)) is not None]
        shift = _APART * (index - (len(lines) - 1) / 2)
        figure.add_scatter(
            x=[found.mean * unit.factor for _, found in spots],
            y=[group.at[collection.axes.index(axis)] + shift for group, _ in spots],
            mode="markers",
            name=plain(line.name),
            legendgroup=line.name,
            showlegend=column == 1 and bool(line.name),
            marker={"color": line.colour, "size": 9, "symbol": line.symbol, "line": {"color": "#ffffff", "width": 1}},
            error_x=error_bars([found for _, found in spots], unit.factor, line.colour),
            customdata=[hover_text(group, collection, drawing.metrics) for group, _ in spots],
            hovertemplate="%{customdata}<extra></extra>",
            cliponaxis=False,
            meta={"groups": [group.index for group, _ in spots], "role": "points"},
            row=1,
            col=column,
        )
        drawn += [v * unit.factor for _, e in spots for v in (e.mean, e.low, e.high) if v is not None]
    return drawn
