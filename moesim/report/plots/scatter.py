"""Points without an order: one metric against another, or a row for each setting.

The first is by default USD per million tokens against tokens per second, with the Pareto front; the second is for
settings with long names, a panel for each metric.
"""

from collections.abc import Sequence
from functools import partial

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from moesim.report.figures import empty_figure, styled
from moesim.report.plots.curves import error_bars, lines_along
from moesim.report.plots.drawing import AxisKey, Drawing
from moesim.report.plots.groups import Collection, Group
from moesim.report.plots.looks import (
    FRONT,
    MARKERS,
    colours,
    hover_text,
    legend_title,
    set_metric_axis,
    title_of,
    units_for,
    with_pointer,
)
from moesim.report.plots.metrics import HIGHER, NEITHER, Metric, Unit, plain, text_of
from moesim.study.points import pareto_front

_LONGEST_LABEL = 16
_HEIGHT = 560


def has_front(drawing: Drawing) -> bool:
    """Whether both metrics have a better side."""
    return all(found.better != NEITHER for found in drawing.metrics)


def drawn_groups(collection: Collection, metrics: Sequence[Metric]) -> list[Group]:
    """Groups that have all of the metrics."""
    return [group for group in collection.done if all(group.estimate(found) is not None for found in metrics)]


def cost_performance(collection: Collection, drawing: Drawing) -> go.Figure:
    """Points coloured by an axis; `meta.groups` of a trace says which group each of its points is."""
    x, y = drawing.metrics
    units = units_for(collection, [x, y])
    groups = drawn_groups(collection, [x, y])
    place = {g.index: _place(g, x, units[x.path].factor, y, units[y.path].factor) for g in groups}
    figure = with_pointer(empty_figure(height=_HEIGHT))
    if has_front(drawing):
        _add_front(figure, drawing, groups, place, collection)
    axis = drawing.colour
    column = collection.axes.index(axis) if axis else None
    for index, colour in enumerate(colours(axis)):
        members = [group for group in groups if column is None or group.at[column] == index]
        figure.add_scatter(
            x=[place[group.index][0] for group in members],
            y=[place[group.index][1] for group in members],
            mode="markers",
            name=plain(axis.texts[index]) if axis else "points",
            showlegend=axis is not None,
            marker={
                "color": colour,
                "size": 12,
                "symbol": MARKERS[index % len(MARKERS)],
                "opacity": 0.9,
                "line": {"color": "#ffffff", "width": 1},
            },
            customdata=[hover_text(group, collection, drawing.metrics) for group in members],
            hovertemplate="%{customdata}<extra></extra>",
            meta={"groups": [group.index for group in members], "role": "points"},
        )
    for update, found, column_of in ((figure.update_xaxes, x, 0), (figure.update_yaxes, y, 1)):
        set_metric_axis(update, found, [spot[column_of] for spot in place.values()], units[found.path])
    figure.update_layout(legend={"title": legend_title(axis)})
    figure.update_xaxes(title={"text": title_of(x, units[x.path])})
    return figure


def _place(group: Group, x: Metric, x_factor: float, y: Metric, y_factor: float) -> tuple[float, float]:
    across, up = group.estimate(x), group.estimate(y)
    assert across is not None and up is not None, "only groups that have both are drawn"
    return across.mean * x_factor, up.mean * y_factor


def _add_front(
    figure: go.Figure,
    drawing: Drawing,
    groups: Sequence[Group],
    place: dict[int, tuple[float, float]],
    collection: Collection,
) -> None:
    """A staircase through the front: what the best layout costs from each throughput on."""
    x, y = drawing.metrics
    eligible = set(collection.eligible)
    able = [group for group in groups if group.index in eligible]
    chosen = pareto_front([place[group.index] for group in able], better=(x.better, y.better))
    members = [able[index] for index in chosen]
    what, labels = front_labels(groups, collection, drawing)
    # on the side where no point can be
    below = "top" if y.better == HIGHER else "bottom"
    side = "right" if x.better == HIGHER else "left"
    figure.add_scatter(
        x=[place[group.index][0] for group in members],
        y=[place[group.index][1] for group in members],
        text=[labels[group.index] for group in members],
        mode="lines+markers+text",
        name="Pareto front" + (f" ({plain(what)})" if what else ""),
        line={"color": FRONT, "width": 1.5, "shape": "vh" if x.better == HIGHER else "hv"},
        marker={"symbol": "circle-open", "size": 19, "color": FRONT, "line": {"width": 1.5}},
        textposition=f"{below} {side}",
        textfont={"size": 12, "color": FRONT},
        cliponaxis=False,
        hoverinfo="skip",
        meta={"role": "front", "better": [x.better, y.better], "labels": labels, "among": sorted(eligible)},
    )


def front_labels(groups: Sequence[Group], collection: Collection, drawing: Drawing) -> tuple[str, dict[int, str]]:
    """What stands beside the points of the front: their values where all are short, else their ranks or numbers.

    The text says of what the values are, empty for ranks and numbers.
    """
    columns = [
        column for column, axis in enumerate(collection.axes) if axis is not drawing.colour and len(axis.values) > 1
    ]
    texts = {g.index: ", ".join(collection.axes[column].texts[g.at[column]] for column in columns) for g in groups}
    ranked = any(group.rank is not None for group in groups)
    if columns and not ranked and all(len(text) <= _LONGEST_LABEL for text in texts.values()):
        names = ", ".join(collection.axes[column].name for column in columns)
        return names, {index: plain(text) for index, text in texts.items()}
    return "", {group.index: plain(_short_label(group)) for group in groups}


def _short_label(group: Group) -> str:
    point = group.points[0]
    if point.rank is not None:
        return f"rank {point.rank}"
    return text_of(point.folder, longest=_LONGEST_LABEL) if point.scenario is not None else f"#{point.number}"


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
    figure = with_pointer(styled(figure, height=_TOP + _BOTTOM + _ROW * rows))
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
