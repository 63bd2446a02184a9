"""The drawing of a fabric: layers from NVSwitches up to the core, drawn as coarsely as it takes to stay legible."""

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from moesim.report.figures import blank
from moesim.report.topology_layout import MOST_BUNDLES, Bundle, Picture, Vertex, fabric_picture
from moesim.units import format_bandwidth, format_seconds

__all__ = ["MOST_BUNDLES", "draw", "fabric_picture"]

_COLOURS = {
    "nvlink": "#2f7d4f",
    "nic": "#2474b5",
    "leaf": "#0a7f86",
    "spine": "#7a4fbf",
    "custom": "#2474b5",
}
_VERTEX_COLOURS = {
    "gpu": "#3d4a5c",
    "node": "#3d4a5c",
    "nvswitch": "#2f7d4f",
    "leaf": "#2474b5",
    "spine": "#0a7f86",
    "core": "#7a4fbf",
    "switch": "#2474b5",
}
_DEGRADED, _FAILED = "#e07b1a", "#c1121f"
_LAYER_HEIGHT = 130
_MOST_LABELLED = 40  # vertices of a layer that carry their name
_HOVER_POINTS = (0.2, 0.4, 0.6, 0.8)  # where along a link the mouse finds it
_ARC_POINTS = 13
_MANY = 150  # lines that cross so often that they must be lighter


def draw(picture: Picture) -> go.Figure:
    """Vertices as labels, bundles of links as lines as wide as their bandwidth; the mouse shows what each is."""
    figure = blank(height=150 + _LAYER_HEIGHT * max(2, len(picture.layers)))
    opacity = 0.75 if len(picture.bundles) <= _MANY else 0.45
    for label, colour, dash, bundles in _traces(picture.bundles):
        for width, alike in _by_width(bundles, picture).items():
            xs, ys = _polylines(picture, alike)
            figure.add_scatter(
                x=xs, y=ys, mode="lines", name=label, legendgroup=label, hoverinfo="skip",
                line={"width": width, "color": colour, "dash": dash}, opacity=opacity,
                showlegend=width == max(_by_width(bundles, picture)),
            )  # fmt: skip
    _add_hover(figure, picture)
    for vertex in picture.vertices.values():
        _add_vertex(figure, picture, vertex)
    _label_axes(figure, picture)
    return figure


def _traces(bundles: Sequence[Bundle]) -> list[tuple[str, str, str, list[Bundle]]]:
    """(name, colour, dash, bundles) per tier of whole links, then the degraded and the failed."""
    traces = []
    for tier in dict.fromkeys(bundle.tier for bundle in bundles):
        whole = [bundle for bundle in bundles if bundle.tier == tier and not bundle.degraded and not bundle.failed]
        if whole:
            traces.append((f"{tier}, {_each(whole)}", _COLOURS[tier], "solid", whole))
    degraded = [bundle for bundle in bundles if bundle.degraded and not bundle.failed]
    failed = [bundle for bundle in bundles if bundle.failed]
    traces += [("degraded", _DEGRADED, "dash", degraded)] if degraded else []
    return traces + ([("failed", _FAILED, "dot", failed)] if failed else [])


def _each(bundles: Sequence[Bundle]) -> str:
    """The bandwidth of one link, or the range over links."""
    each = [way / bundle.count for bundle in bundles for way in (bundle.up, bundle.down) if way]
    if math.isclose(min(each), max(each)):
        return f"{format_bandwidth(max(each))} each way"
    return f"{format_bandwidth(min(each))} to {format_bandwidth(max(each))}"


def _by_width(bundles: Sequence[Bundle], picture: Picture) -> dict[float, list[Bundle]]:
    """Lines of one width share a trace: 1 to 6 pixels, by the logarithm of bandwidth, thinner where there are many."""
    bandwidths = [bundle.nominal for bundle in picture.bundles]
    low, high = math.log(min(bandwidths)), math.log(max(bandwidths))
    most = min(6.0, max(2.0, 360 / len(picture.bundles)))
    result: dict[float, list[Bundle]] = {}
    for bundle in bundles:
        share = (math.log(bundle.nominal) - low) / (high - low) if high > low else 0.3
        result.setdefault(round(1 + share * (most - 1), 1), []).append(bundle)
    return result


def _polylines(picture: Picture, bundles: Sequence[Bundle]) -> tuple[list[float | None], list[float | None]]:
    xs: list[float | None] = []
    ys: list[float | None] = []
    for bundle in bundles:
        for x, y in _path(picture, bundle):
            xs.append(x)
            ys.append(y)
        xs.append(None)
        ys.append(None)
    return xs, ys


def _path(picture: Picture, bundle: Bundle) -> list[tuple[float, float]]:
    """A straight line between layers, an arc above its layer between two vertices of one."""
    a, b = picture.vertices[bundle.below], picture.vertices[bundle.above]
    if a.y != b.y:
        return [(a.x, a.y), (b.x, b.y)]
    height = 0.12 + 0.3 * abs(a.x - b.x) / picture.width
    steps = [index / (_ARC_POINTS - 1) for index in range(_ARC_POINTS)]
    return [(a.x + step * (b.x - a.x), a.y + 4 * height * step * (1 - step)) for step in steps]


def _add_hover(figure: go.Figure, picture: Picture) -> None:
    xs, ys, texts = [], [], []
    for bundle in picture.bundles:
        points = _path(picture, bundle)
        for share in _HOVER_POINTS:
            if len(points) == 2:
                (x0, y0), (x1, y1) = points
                x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
            else:
                x, y = points[round(share * (len(points) - 1))]
            xs.append(x)
            ys.append(y)
            texts.append(_link_text(picture, bundle))
    figure.add_scatter(
        x=xs, y=ys, mode="markers", text=texts, showlegend=False, hovertemplate="%{text}<extra></extra>",
        marker={"size": 12, "opacity": 0},
    )  # fmt: skip


def _link_text(picture: Picture, bundle: Bundle) -> str:
    """Two or three lines: which link, how much it carries, how long it takes, what is wrong with it."""
    ends = f"{picture.vertices[bundle.below].name} - {picture.vertices[bundle.above].name}"
    if math.isclose(bundle.up, bundle.down):
        several = f"{bundle.count:,} x " if bundle.count > 1 else ""
        carries = f"{several}{format_bandwidth(bundle.up / bundle.count)} each way"
    else:
        low, high = picture.vertices[bundle.below].label, picture.vertices[bundle.above].label
        carries = f"{format_bandwidth(bundle.up)} {low} to {high}, {format_bandwidth(bundle.down)} back"
    lines = [
        html.escape(ends),
        html.escape(f"{bundle.tier}: {carries}, {100 * bundle.efficiency:.1f} % reached by long transfers"),
        f"latency {format_seconds(bundle.latency)}",
    ]
    if bundle.degraded:
        lines.append(f"{bundle.degraded} of {2 * bundle.count} directed links degraded")
    if bundle.failed:
        lines.append(f"{bundle.failed} of {2 * bundle.count} directed links failed")
    return "<br>".join(lines)


def _add_vertex(figure: go.Figure, picture: Picture, vertex: Vertex) -> None:
    """A label in a box where there is room for it, else a small square; both name the vertex under the mouse."""
    colour = _VERTEX_COLOURS[vertex.kind]
    name = html.escape(vertex.name)
    labelled = picture.layers[vertex.y].count <= _MOST_LABELLED
    figure.add_annotation(
        x=vertex.x, y=vertex.y, text=_lines(vertex.label) if labelled else "&nbsp;", hovertext=name,
        showarrow=False, bgcolor=colour, borderpad=3 if labelled else 0, bordercolor="#ffffff", borderwidth=1,
        font={"color": "#ffffff", "size": 11 if picture.layers[vertex.y].count <= 20 else 9},
        hoverlabel={"bgcolor": "#1d2229", "font": {"color": "#ffffff"}},
    )  # fmt: skip


def _lines(label: str) -> str:
    return "<br>".join(html.escape(line) for line in label.split(", "))


def _label_axes(figure: go.Figure, picture: Picture) -> None:
    lowest, highest = min(picture.layers), max(picture.layers)
    ticks: dict[str, Any] = {
        "tickvals": list(picture.layers),
        "ticktext": [row.name for row in picture.layers.values()],
    }
    figure.update_yaxes(range=[lowest - 0.35, highest + 0.45], showgrid=False, tickfont={"size": 13}, **ticks)
    figure.update_xaxes(range=[-0.02 * picture.width, 1.02 * picture.width], showgrid=False, tickangle=0)
    figure.update_xaxes(tickvals=list(picture.marks), ticktext=list(picture.marks.values()))
    figure.update_xaxes(title={"text": "node" if picture.marks else ""})
    figure.update_layout(hovermode="closest", dragmode="pan")
