"""What people and programs see of a study of volume: a screen, a page with its plot, plain values."""

from typing import Any

import plotly.graph_objects as go

from moesim.report.facts import Fact
from moesim.report.figures import empty_figure
from moesim.report.page import Page
from moesim.report.terminal import Screen, fact_table, heading, indented, number_table, prints, section
from moesim.report.volume import VolumeStudy
from moesim.units import format_bytes

_COLOURS = ("#2474b5", "#e07b1a", "#0a7f86", "#b3256b", "#7a4fbf", "#d9b310")
_UNLIMITED = "#7a828e"
_BOUND = "rgba(128,128,128,0.7)"
_NONE = "-"  # a limit whose groups hold too few experts


def volume_json(study: VolumeStudy) -> dict[str, Any]:
    """Every point in plain values; bytes per token in one dispatch of one layer."""
    return {
        "scenario_name": study.scenario.name,
        "deduplicate": study.scenario.dispatch.deduplicate,
        "experts": study.scenario.model.experts,
        "top_k": study.scenario.model.top_k,
        "copy_bytes": study.copy_bytes,
        "routing": study.source,
        "points": [
            {
                "devices": point.devices,
                "nodes": point.nodes,
                "limit": point.limit,
                "copies_per_token": point.copies,
                "intra_node_bytes_per_token": point.intra_node_bytes,
                "inter_node_bytes_per_token": point.inter_node_bytes,
            }
            for point in study.points
        ],
    }


def limit_name(study: VolumeStudy, limit: int | None) -> str:
    """`M = 3`, or what stands in for no limit."""
    if limit is not None:
        return f"M = {limit}"
    return "as recorded" if study.recorded else "unlimited"


def _title(study: VolumeStudy) -> str:
    ways = "over the network" if study.per_node else "from its rank"
    return f"bytes that one token sends {ways} in one dispatch"


def _copies_title(study: VolumeStudy) -> str:
    to = {
        "per_node": "to each node it needs",
        "per_rank": "to each rank it needs",
        "per_expert": "to each expert it needs",
        "all_ranks": "to each rank of the group",
    }
    return f"copies of one token, one {to[study.scenario.dispatch.deduplicate]}, its own included"


def volume_facts(study: VolumeStudy) -> list[Fact]:
    """What was counted."""
    dispatch, model = study.scenario.dispatch, study.scenario.model
    groups = "nodes" if study.per_node else "ranks"
    return [
        Fact("one copy", format_bytes(study.copy_bytes), f"hidden {model.hidden} in {dispatch.dtype}"),
        Fact("experts", f"{model.top_k} of {model.experts}", "per token"),
        Fact("M", "", f"most {groups} per token; the router's groups are the {groups}"),
        Fact("counted on", "", study.source),
    ]


def _columns(study: VolumeStudy) -> tuple[str, ...]:
    sizes = ("nodes", "ranks") if study.per_node else ("ranks",)
    return (*sizes, *(limit_name(study, limit) for limit in study.limits))


def _rows(study: VolumeStudy, *, copies: bool) -> list[tuple[str, ...]]:
    rows = []
    for devices in study.devices:
        cells = []
        for limit in study.limits:
            point = study.find(devices, limit)
            if point is None:
                cells.append(_NONE)
            else:
                cells.append(f"{point.copies:.2f}" if copies else format_bytes(study.bytes_of(point), digits=3))
        nodes = -(-devices // study.scenario.cluster.main_pool.gpus_per_node)
        rows.append((*((str(nodes),) if study.per_node else ()), str(devices), *cells))
    return rows


@prints
def print_volume(study: VolumeStudy) -> Screen:
    """The study in one screen."""
    return [
        heading(study.scenario.name, study.scenario.dispatch.deduplicate),
        indented(fact_table(volume_facts(study))),
        section(_title(study), number_table(_columns(study), _rows(study, copies=False))),
        section(_copies_title(study), number_table(_columns(study), _rows(study, copies=True))),
    ]


def volume_figure(study: VolumeStudy) -> go.Figure:
    """Kilobytes per token against the size of the group, a line per limit; dotted lines are whole numbers of copies."""
    across = "nodes" if study.per_node else "ranks"
    where = "over the network " if study.per_node else ""
    figure = empty_figure(height=480, x=f"{across} of the expert group", y=f"kB per token {where}in one dispatch")
    for index, limit in enumerate(study.limits):
        points = [point for point in study.points if point.limit == limit]
        name = limit_name(study, limit)
        colour = _UNLIMITED if limit is None else _COLOURS[index % len(_COLOURS)]
        figure.add_scatter(
            x=[point.nodes if study.per_node else point.devices for point in points],
            y=[study.bytes_of(point) / 1e3 for point in points],
            customdata=[point.copies for point in points],
            name=name,
            mode="lines+markers",
            line={"color": colour, "width": 2},
            marker={"size": 8, "color": colour},
            hovertemplate=f"{name}, %{{x}} {across}: %{{y:.4g}} kB<br>"
            "%{customdata:.3f} copies, own included<extra></extra>",
        )
    for copies in sorted({*(limit for limit in study.limits if limit is not None), study.scenario.model.top_k}):
        figure.add_hline(
            y=copies * study.copy_bytes / 1e3,
            line={"dash": "dot", "width": 1, "color": _BOUND},
            annotation={"text": f"{copies} copies" if copies > 1 else "1 copy", "font": {"color": "#808080"}},
            annotation_position="top left",
        )
    sizes = sorted({point.nodes if study.per_node else point.devices for point in study.points})
    figure.update_xaxes(type="log", tickvals=sizes, ticktext=[str(size) for size in sizes])
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(showlegend=True)
    return figure


def volume_page(study: VolumeStudy) -> str:
    """The plot and the tables as one HTML document that needs no network."""
    top_k, groups = study.scenario.model.top_k, "nodes" if study.per_node else "ranks"
    page = Page(
        study.scenario.name,
        f"{_title(study).capitalize()}, against the size of its expert group. Dotted: M copies for each limit, and "
        f"K = {top_k} copies. A token's own copy, to the {groups[:-1]} that it comes from, is no traffic: its share "
        "shrinks as the group grows, which is why limited lines still rise towards their bound. They can end below "
        f"it, since K experts drawn from M {groups} need not touch all of them.",
        of="volume",
    )
    page.figure(volume_figure(study), name="volume")
    with page.inside("div", css="tables"):
        for title, copies in ((_title(study), False), (_copies_title(study), True)):
            with page.inside("div"):
                page.text("h3", title.capitalize())
                columns = _columns(study)
                page.table(columns, _rows(study, copies=copies), styles=("number",) * len(columns))
        page.facts("What was counted", volume_facts(study))
    return page.document()
