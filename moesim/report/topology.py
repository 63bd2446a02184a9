"""A fabric for people and programs: one screen of numbers, and a page with its drawing.

It is drawn in layers from NVSwitches up to the core, as coarsely as it takes to stay legible.
"""

import html
import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from rich.console import RenderableType

from moesim.network import FabricFacts, describe
from moesim.report.facts import Fact, seconds
from moesim.report.figures import empty_figure
from moesim.report.page import Page
from moesim.report.terminal import Screen, fact_table, heading, indented, number_table, prints, section
from moesim.report.topology_layout import MOST_BUNDLES, Bundle, FabricLink, FabricParts, Picture, Vertex, fabric_picture
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
    figure = empty_figure(height=150 + _LAYER_HEIGHT * max(2, len(picture.layers)))
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
    text = html.escape(vertex.label).replace(", ", "<br>") if labelled else "&nbsp;"
    figure.add_annotation(
        x=vertex.x, y=vertex.y, text=text, hovertext=name,
        showarrow=False, bgcolor=colour, borderpad=3 if labelled else 0, bordercolor="#ffffff", borderwidth=1,
        font={"color": "#ffffff", "size": 11 if picture.layers[vertex.y].count <= 20 else 9},
        hoverlabel={"bgcolor": "#1d2229", "font": {"color": "#ffffff"}},
    )  # fmt: skip


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


_LINK_COLUMNS = ("tier", "links", "bandwidth", "long transfers reach", "latency", "first of them")
_MOST_NAMED = 2  # links named one by one in a line
_TIERS = {
    "nvlink": "GPU to NVSwitch",
    "nic": "GPU to NIC, NIC to leaf",
    "leaf": "leaf to spine",
    "spine": "spine to core",
    "custom": "as listed",
}


def fabric_json(parts: FabricParts) -> dict[str, Any]:
    """The numbers of a fabric in SI units, without the drawing."""
    fabric = describe(parts.fabric)
    return {
        "preset": fabric.preset,
        "gpus": fabric.num_gpus,
        "nodes": fabric.num_nodes,
        "switches": fabric.switches,
        "links": [
            {
                "tier": link.tier,
                "count": link.count,
                "bandwidth_bytes_per_s": link.bandwidth,
                "efficiency": link.efficiency,
                "latency_s": link.latency,
            }
            for link in fabric.links
        ],
        "bisection_bytes_per_s": fabric.bisection,
        "oversubscription": fabric.oversubscription,
        "degraded": [_link_json(link) for link in parts.degraded],
        "failed": [_link_json(link) for link in parts.failed],
        "gpus_cut_off": parts.num_cut_off,
    }


def _link_json(link: FabricLink) -> dict[str, Any]:
    return {
        "link": [link.source, link.target],
        "tier": link.tier,
        "nominal_bytes_per_s": link.nominal,
        "bandwidth_bytes_per_s": link.bandwidth,
    }


def fabric_facts(fabric: FabricFacts) -> list[Fact]:
    """Size, bisection and oversubscription."""
    switches = ", ".join(f"{count} {kind}" for kind, count in sorted(fabric.switches.items())) or "none"
    halves = "nodes" if fabric.num_nodes > 1 else "GPUs"
    ratios = [
        Fact(f"oversubscription, {tier}", f"{ratio:.3g} : 1", "below / above, the worst switch")
        for tier, ratio in fabric.oversubscription.items()
    ]
    return [
        Fact("GPUs", f"{fabric.num_gpus:,}", f"on {fabric.num_nodes:,} node{'s' * (fabric.num_nodes > 1)}"),
        Fact("switches", switches),
        Fact("bisection", format_bandwidth(fabric.bisection), f"from one half of the {halves} to the other"),
        *ratios,
    ]


def link_rows(parts: FabricParts) -> list[tuple[str, ...]]:
    """Directed links that are alike, a row per kind, in the columns of the table of links."""
    first: dict[tuple[object, ...], str] = {}
    for link in parts.links:
        first.setdefault((link.tier, link.bandwidth, link.latency, link.efficiency), link.name)
    return [
        (
            group.tier,
            f"{group.count:,}",
            format_bandwidth(group.bandwidth),
            f"{100 * group.efficiency:.1f} %",
            seconds(group.latency),
            first[group.tier, group.bandwidth, group.latency, group.efficiency],
        )
        for group in describe(parts.fabric).links
    ]


def damage(parts: FabricParts) -> list[Fact]:
    """Degraded and failed links, a line for all that are alike; nothing for a whole fabric."""
    alike: dict[tuple[float, str], list[FabricLink]] = {}
    for link in (*parts.failed, *parts.degraded):
        alike.setdefault((link.factor, link.tier), []).append(link)
    lines = []
    for (factor, tier), links in sorted(alike.items()):
        state = f"at {100 * factor:.3g} % of {format_bandwidth(links[0].nominal)}" if factor else "failed"
        count = f"{len(links):,} {tier} link{'s' * (len(links) > 1)}"
        lines.append(Fact(count, state, _names([link.name for link in links])))
    if parts.failed:
        cut = parts.num_cut_off
        effect = "every GPU still reaches every other" if not cut else f"{cut:,} GPUs are cut off"
        lines.append(Fact("routes", "around the failed links" if not cut else "broken", effect))
    return lines


def _names(names: Sequence[str]) -> str:
    if len(names) <= _MOST_NAMED:
        return ", ".join(names)
    return f"{names[0]} and {len(names) - 1:,} more"


def sources(parts: FabricParts) -> list[Fact]:
    """Where the latencies and achieved shares come from that the scenario does not set; a custom fabric sets all."""
    if parts.fabric.kind.listed:
        return [Fact("links", "as listed", "the scenario's bandwidths and latencies; long transfers reach all of it")]
    known = parts.fabric.parameters
    tiers = {link.tier: link for link in parts.links}
    facts = []
    for tier, usual, source in (
        ("nvlink", known.nvlink_efficiency, known.nvlink_source),
        ("nic", known.nic_efficiency, known.nic_source),
    ):
        if tier in tiers:
            ours = tiers[tier].efficiency == usual
            facts.append(Fact(f"{tier} share", "calibrated" if ours else "scenario", source if ours else ""))
    usual_latency = {"nvlink": known.nvlink_latency, "nic": known.nic_latency, "leaf": known.leaf_latency}
    ours = all(tiers[tier].latency == value for tier, value in usual_latency.items() if tier in tiers)
    return [*facts, Fact("latencies", "published" if ours else "scenario", known.latency_source if ours else "")]


@prints
def print_fabric(name: str, parts: FabricParts) -> Screen:
    """The fabric of the scenario `name` in one screen."""
    fabric = describe(parts.fabric)
    content: list[RenderableType] = [
        heading(name, fabric.preset),
        indented(fact_table(fabric_facts(fabric), strong=True)),
        section("directed links", number_table(_LINK_COLUMNS, link_rows(parts))),
    ]
    if damaged := damage(parts):
        content.append(section("degraded and failed", fact_table(damaged)))
    return [*content, section("where the numbers come from", fact_table(sources(parts)))]


def fabric_page(name: str, parts: FabricParts) -> str:
    """The drawing and the tables as one HTML document that needs no network."""
    fabric = describe(parts.fabric)
    tiers = ", ".join(f"{tier}: {_TIERS[tier]}" for tier in dict.fromkeys(link.tier for link in fabric.links))
    page = Page(name, f"Fabric {fabric.preset}. Bandwidths are per directed link ({tiers}).", of="fabric")
    picture = fabric_picture(parts)
    if len(picture.bundles) <= MOST_BUNDLES:
        page.text("p", picture.explanation)
        page.figure(draw(picture), name="fabric")
    else:
        page.text("p", f"{len(picture.bundles):,} links are too many to draw; set fewer nodes to see the pattern.")
    with page.inside("div", css="tables"):
        page.facts("Size", fabric_facts(fabric))
        page.facts("Where the numbers come from", sources(parts))
    page.table(_LINK_COLUMNS, link_rows(parts), styles=("", *["number"] * 4, "note"), title="Directed links")
    if damaged := damage(parts):
        page.facts("Degraded and failed", damaged)
    return page.document()
