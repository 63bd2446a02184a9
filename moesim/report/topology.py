"""A fabric for people and programs: one screen of numbers, and a page with its drawing."""

from collections.abc import Sequence
from typing import Any, TextIO

from plotly.offline import get_plotlyjs
from rich.console import RenderableType
from rich.text import Text

from moesim.network import FabricFacts, describe
from moesim.report.facts import Fact, seconds
from moesim.report.page import Page
from moesim.report.screen import fact_table, indented, number_table, section, show
from moesim.report.topology_drawing import MOST_BUNDLES, draw, fabric_picture
from moesim.report.topology_links import FabricLink, FabricParts
from moesim.units import format_bandwidth

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


def print_fabric(name: str, parts: FabricParts, *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print the fabric of the scenario `name` in one screen."""
    fabric = describe(parts.fabric)
    content: list[RenderableType] = [
        Text.assemble((name, "bold"), (f"  {fabric.preset}", "dim")),
        indented(fact_table(fabric_facts(fabric), strong=True)),
        section("directed links", number_table(_LINK_COLUMNS, link_rows(parts))),
    ]
    if damaged := damage(parts):
        content.append(section("degraded and failed", fact_table(damaged)))
    content.append(section("where the numbers come from", fact_table(sources(parts))))
    show(lambda _: content, file=file, width=width)


def fabric_page(name: str, parts: FabricParts) -> str:
    """The drawing and the tables as one HTML document that needs no network."""
    fabric = describe(parts.fabric)
    page = Page()
    page.text("h1", name)
    tiers = ", ".join(f"{tier}: {_TIERS[tier]}" for tier in dict.fromkeys(link.tier for link in fabric.links))
    page.text("p", f"Fabric {fabric.preset}. Bandwidths are per directed link ({tiers}).")
    picture = fabric_picture(parts)
    if len(picture.bundles) <= MOST_BUNDLES:
        page.text("p", picture.explanation)
        page.figure(draw(picture), name="fabric")
    else:
        page.text("p", f"{len(picture.bundles):,} links are too many to draw; set fewer nodes to see the pattern.")
    page.open("div", css="tables")
    page.facts("Size", fabric_facts(fabric))
    page.facts("Where the numbers come from", sources(parts))
    page.close("div")
    page.text("h3", "Directed links")
    page.table(_LINK_COLUMNS, link_rows(parts), styles=("", *["number"] * 4, "note"))
    if damaged := damage(parts):
        page.facts("Degraded and failed", damaged)
    return page.document(title=f"{name} - fabric", script=get_plotlyjs())
