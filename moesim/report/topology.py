"""A fabric for people and programs: counts on the terminal, a drawing as HTML."""

import html
from collections import defaultdict
from pathlib import Path
from typing import Any, TextIO

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from rich.console import RenderableType
from rich.text import Text

from moesim.network import FabricFacts
from moesim.report.facts import Fact, seconds
from moesim.report.figures import blank
from moesim.report.page import Page
from moesim.report.screen import fact_table, indented, number_table, section, show
from moesim.units import format_bandwidth

_LINK_COLUMNS = ("tier", "links", "bandwidth", "reached by long transfers", "latency")
_COLOURS = ("#2474b5", "#e07b1a", "#b3256b", "#0a7f86", "#7a828e", "#d9b310")
_MOST_DRAWN = 20_000  # links beyond which a drawing says nothing and a browser crawls


def fabric_json(fabric: FabricFacts) -> dict[str, Any]:
    """The numbers of a fabric in SI units, without the drawing."""
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
    }


def fabric_facts(fabric: FabricFacts) -> list[Fact]:
    """Size, bisection and oversubscription."""
    switches = ", ".join(f"{count} {kind}" for kind, count in sorted(fabric.switches.items())) or "none"
    ratios = [
        Fact(f"oversubscription, {tier}", f"{ratio:.3g} : 1", "bandwidth below / above")
        for tier, ratio in fabric.oversubscription.items()
    ]
    return [
        Fact("GPUs", f"{fabric.num_gpus:,}", f"on {fabric.num_nodes:,} nodes"),
        Fact("switches", switches),
        Fact("bisection", format_bandwidth(fabric.bisection), "from one half of the nodes to the other"),
        *ratios,
    ]


def link_rows(fabric: FabricFacts) -> list[tuple[str, ...]]:
    """Directed links that are alike, a row per kind, in the columns of the table of links."""
    return [
        (
            link.tier,
            f"{link.count:,}",
            format_bandwidth(link.bandwidth),
            f"{100 * link.efficiency:.1f} %",
            seconds(link.latency),
        )
        for link in fabric.links
    ]


def print_fabric(name: str, fabric: FabricFacts, *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print the fabric of the scenario `name`."""
    parts: list[RenderableType] = [
        Text.assemble((name, "bold"), (f"  {fabric.preset}", "dim")),
        indented(fact_table(fabric_facts(fabric))),
        section("directed links", number_table(_LINK_COLUMNS, link_rows(fabric))),
    ]
    show(lambda _: parts, file=file, width=width)


def drawing(fabric: FabricFacts) -> go.Figure:
    """Nodes at the positions of `fabric`, links coloured by bandwidth."""
    figure = blank(height=620)
    lines: dict[float, tuple[list[float | None], list[float | None]]] = defaultdict(lambda: ([], []))
    for source, target, bandwidth in fabric.edges:
        xs, ys = lines[bandwidth]
        for line, axis in ((xs, 0), (ys, 1)):
            line += [fabric.positions[source][axis], fabric.positions[target][axis], None]
    for (bandwidth, (xs, ys)), colour in zip(sorted(lines.items()), _cycle(len(lines)), strict=True):
        label = format_bandwidth(bandwidth)
        figure.add_scatter(x=xs, y=ys, mode="lines", name=label, line={"width": 1, "color": colour}, hoverinfo="skip")
    names = list(fabric.positions)
    figure.add_scatter(
        x=[fabric.positions[name][0] for name in names],
        y=[fabric.positions[name][1] for name in names],
        mode="markers",
        showlegend=False,
        marker={"size": 9, "color": "#7a828e", "line": {"width": 1, "color": "#ffffff"}},
        customdata=[html.escape(name) for name in names],  # custom links bring names of their own
        hovertemplate="%{customdata}<extra></extra>",
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure


def _cycle(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]


def write_fabric(name: str, fabric: FabricFacts, path: Path) -> None:
    """Write the drawing and the tables to the HTML file `path`, replacing it."""
    page = Page()
    page.text("h1", name)
    page.text("p", f"Fabric: {fabric.preset}. Bandwidths are per directed link.")
    if len(fabric.edges) <= _MOST_DRAWN:
        page.figure(drawing(fabric), name="fabric")
    else:
        page.text("p", f"{len(fabric.edges):,} links are too many to draw; set fewer nodes to see the pattern.")
    page.open("div", css="tables")
    page.facts("Size", fabric_facts(fabric))
    page.open("div")
    page.text("h3", "Directed links")
    page.table(_LINK_COLUMNS, link_rows(fabric), styles=("", *["number"] * (len(_LINK_COLUMNS) - 1)))
    page.close("div")
    page.close("div")
    path.write_text(page.document(title=f"{name} - fabric", script=get_plotlyjs()), encoding="utf-8")
