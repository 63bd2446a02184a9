"""One metric against another, by default USD per million tokens against tokens per second, with the Pareto front."""

from collections.abc import Sequence

import plotly.graph_objects as go

from moesim.report.figures import blank
from moesim.report.plots.choice import Drawing
from moesim.report.plots.groups import Collection, Group
from moesim.report.plots.metrics import HIGHER, NEITHER, Metric
from moesim.report.plots.points import plain, text_of
from moesim.report.plots.styling import (
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

_LONGEST_LABEL = 16
_HEIGHT = 560


def pareto_front(points: Sequence[tuple[float, float]], *, better: tuple[int, int]) -> list[int]:
    """Indices of the points that no other one beats: at least as good in both and better in one, ascending in x.

    `better` is +1 where more is better and -1 where less is. Of equal points the first one is kept.
    """
    order = sorted(range(len(points)), key=lambda i: (-better[0] * points[i][0], -better[1] * points[i][1], i))
    front: list[int] = []
    for index in order:
        if not front or better[1] * points[index][1] > better[1] * points[front[-1]][1]:
            front.append(index)
    return sorted(front, key=lambda i: points[i][0])


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
    figure = with_pointer(blank(height=_HEIGHT))
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
