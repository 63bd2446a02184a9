"""Sections of report.html on the whole step (pipeline, memory of its ranks, what-ifs) and on where experts sit.

The latter is the map of slots with copies marked, and the load of ranks with it.
Legend: L model layers with a router, D ranks of expert group 0, P slots of a rank, X slots of all ranks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from moesim.report import facts, figures
from moesim.report.categories import PARTS, category
from moesim.report.page import Page
from moesim.report.timeline import gantt, idle_share
from moesim.results import CATEGORIES
from moesim.results.store import RunRecord
from moesim.units import format_bytes

_KIND_OF_PART = {
    "weights": "weights",
    "cast_weights": "weights",
    "gathered": "weights",
    "gradients": "gradients",
    "master": "optimizer states",
    "optimizer": "optimizer states",
    "activations": "activations",
    "dispatch_buffers": "dispatch buffers",
    "repeated": "inside one layer",
    "temporaries": "inside one layer",
    "loss": "inside one layer",
    "reduction": "gradients",
    "allocator": "allocator",
    "workspace": "reserved",
    "reserved": "reserved",
}


def pipeline_section(page: Page, record: RunRecord) -> None:
    """The Gantt chart and where the time of each pipeline rank goes; nothing without a pipeline."""
    if record.scenario.parallelism.pipeline == 1:
        return
    bars = gantt(record.pipeline_spans)
    schedule = record.scenario.parallelism.schedule.kind
    page.text("h2", "The pipeline")
    page.text(
        "p",
        f"What each pipeline rank does under the {schedule} schedule, read from the executed spans of the first rank "
        "of expert group 0 in the first routing sample. The gaps are bubbles.",
    )
    page.figure(figures.gantt(bars), name="pipeline")
    ranks = record.scenario.parallelism.pipeline
    seconds_CPW = record.arrays["attribution_CW"].reshape(len(CATEGORIES), ranks, -1)
    families = np.array([category(key).family for key in CATEGORIES])
    bubble_P = seconds_CPW[CATEGORIES.index("bubble")].mean(axis=1)
    peers_P = seconds_CPW[CATEGORIES.index("imbalance_wait")].mean(axis=1)
    loads = record.result["stages"]["pipeline_ranks"]
    rows = [
        (
            str(rank),
            facts.layers_of_stages(loads[rank]["layers"]),
            facts.seconds(loads[rank]["seconds_per_micro_batch"]),
            *(facts.seconds(float(seconds_CPW[families == name, rank].sum(axis=0).mean())) for name in _FAMILIES),
            facts.seconds(float(peers_P[rank])),
            facts.seconds(float(bubble_P[rank])),
            facts.percent(float(bubble_P[rank]) / record.result["step_time_s"]),
            facts.percent(idle_share(bars, pipeline_rank=rank)),
        )
        for rank in range(ranks)
    ]
    head = (
        "pipeline rank", "layers", "a micro-batch", "computing", "communication", "overhead", "waiting for peers",
        "bubble", "of the step", "no action",
    )  # fmt: skip
    page.table(head, rows, styles=("number",) * len(head))
    page.text(
        "p",
        "Means over the ranks of a pipeline rank and all routing samples. Layers: those of each of its stages, without "
        "prediction layers. A micro-batch: forward and backward through all of them; the slowest rank sets the pace. "
        "The last column is the share of the chart in which its rank has no action.",
    )


_FAMILIES = ("compute", "communication", "overhead")


def by_kind(parts: Mapping[str, float]) -> dict[str, float]:
    """Bytes by the kinds that the figure and the table show."""
    kinds = dict.fromkeys(PARTS, 0.0)
    for name, size in parts.items():
        kinds[_KIND_OF_PART[name.partition(".")[0]]] += size
    return kinds


def memory_section(page: Page, record: RunRecord) -> None:
    """Peak memory by part and pipeline rank."""
    memory = record.result["memory"]
    parts = [by_kind(found) for found in memory["parts_bytes_by_pipeline_rank"]]
    peaks, capacities = memory["peak_bytes_by_pipeline_rank"], memory["capacity_bytes_by_pipeline_rank"]
    fullest = memory["fullest_pipeline_rank"]
    page.text("h2", "Memory")
    page.text(
        "p",
        "Peak on the fullest rank of each pipeline rank in its fullest routing sample, with rows and copies as routed. "
        f"{facts.percent(memory['fits_share'], digits=0)} of the routing samples fit.",
    )
    page.figure(figures.memory(parts, capacities), name="memory")
    shown = [kind for kind in PARTS if any(found[kind] for found in parts)]
    head = ("pipeline rank", *shown, "peak", "of the GPU")
    show = facts.bytes_column(peaks)
    rows = [
        (str(rank), *(show(parts[rank][kind]) for kind in shown), show(peaks[rank]),
         facts.percent(peaks[rank] / capacities[rank]))
        for rank in range(len(parts))
    ]  # fmt: skip
    page.table(head, rows, styles=("number",) * len(head))
    page.open("details")
    page.text("summary", f"All parts on pipeline rank {fullest}, the fullest")
    details = [
        (name.replace("_", " ").replace(".", ", "), format_bytes(size), facts.percent(size / peaks[fullest]))
        for name, size in memory["parts_bytes_by_pipeline_rank"][fullest].items()
    ]
    page.table(("part", "bytes", "of the peak"), details, styles=("", "number", "number"))
    page.close("details")


def what_if_section(page: Page, record: RunRecord) -> None:
    """What else the step could have taken; nothing when nobody asked."""
    rows = facts.what_if(record.result)
    if not rows:
        return
    page.text("h2", "What if")
    page.text("p", "The same step simulated again with the same seeds and one thing changed.")
    head = ("question", "step time", "change", "USD / M tokens", "")
    page.table(head, rows, styles=("", "number", "number", "number", "note"))


def pools_section(page: Page, record: RunRecord) -> None:
    """What each pool does and costs, where there are several, and which ranks waited for which."""
    pools, waiting = record.result.get("pools", ()), record.result.get("waiting")  # older runs have neither
    if len(pools) > 1:
        page.text("h2", "Pools")
        head = ("pool", "GPU", "ranks", "micro-batches", "computes", "memory", "of", "samples that fit", "USD / step")
        page.table(
            head,
            [
                (
                    pool["name"],
                    pool["gpu"],
                    f"{pool['ranks']} of {pool['gpus']}",
                    str(pool["micro_batches"]),
                    *(
                        (facts.seconds(pool["compute_s"]), format_bytes(pool["peak_bytes"]))
                        if pool["ranks"]
                        else ("-", "-")
                    ),
                    format_bytes(pool["capacity_bytes"]),
                    facts.percent(pool["fits_share"]) if pool["ranks"] else "-",
                    f"${pool['usd_per_step']:.4g} ({pool['price_source']})",
                )
                for pool in pools
            ],
            styles=("", "", *["number"] * 6, "note"),
        )
    if waiting and waiting["pairs"]:
        page.text("h2", "Who waited for whom")
        page.text(
            "p",
            "Of the first routing sample: the last rank to come to a transfer or a collective is waited for by all "
            "others in it, and at a p2p send the pipeline rank before. Waiting counts whether or not a rank computes "
            "meanwhile; of rank groups that do the same one stands for all. At most "
            f"{facts.seconds(facts.jitter(record.result))} of a rank's waiting are for chips and hosts of one kind "
            "that are slower than others by chance.",
        )
        page.open("div", css="figures")
        for_rank = [(str(one["rank"]), facts.seconds(one["seconds_of_others"])) for one in waiting["waited_for"]]
        page.table(("rank waited for", "seconds of others"), for_rank, styles=("number", "number"))
        pairs = [(str(p["rank"]), str(p["waits_for"]), facts.seconds(p["seconds"])) for p in waiting["pairs"]]
        page.table(("rank", "waits for", "seconds"), pairs, styles=("number",) * 3)
        page.close("div")


_LARGEST_LABELLED = 2_000  # slots of all layers up to which each shows its expert
_COPIES = ("#e8e8e6", "#c6dbef", "#6baed6", "#2171b5", "#08306b")  # of one slot, two, three, four, five or more
_EMPTY = -1
_LINE = "#2474b5"


def placement_section(page: Page, record: RunRecord) -> None:
    """The map, and the loads before and after; nothing where every rank has neighbouring experts."""
    slots = record.arrays.get("placement_LDP")
    if slots is None:
        return
    first = record.scenario.model.dense_layers
    page.text("h2", "Placement of experts")
    page.text(
        "p",
        "The slots of each rank of expert group 0 in every layer with experts, by rank. Colour tells how many slots "
        "hold the expert of this one: grey is one, blue are copies. Point at a slot to see its expert.",
    )
    page.figure(slot_map(slots.astype(np.int64), first_layer=first), name="placement")
    before = record.arrays.get("rank_load_contiguous_LR")
    after = record.arrays["rank_load_LR"]
    page.open("div", css="figures")
    for title, name, load_LR in (
        ("Load of ranks, neighbouring experts", "rank-load-before", before),
        ("Load of ranks, as placed", "rank-load-after", after),
    ):
        if load_LR is not None:
            relative_LR = load_LR / np.maximum(load_LR.mean(axis=1, keepdims=True), 1e-300)
            page.figure(figures.load_map(relative_LR, first_layer=first, of="rank"), name=name, title=title)
    page.close("div")
    page.facts("Placement", facts.placement(record.result))
    found = record.result["placement"].get("replacing")
    if found is not None:
        page.text("h3", "Placed anew as the router trains")
        page.text(
            "p",
            "Left: the step by how many training steps ago experts were placed, each point a simulated step. Right: "
            "the mean step by the interval between two placings, its share of moving experts included; short intervals "
            "pay for moving, long ones for old placements.",
        )
        page.open("div", css="figures")
        page.figure(by_age(found), name="placement-age", title="Step by age of the placement")
        page.figure(by_interval(found), name="placement-interval", title="Mean step by interval, moving included")
        page.close("div")


def _milliseconds(points: Sequence[Mapping[str, Any]], key: str = "step_time_s") -> list[float]:
    return [1e3 * point[key] for point in points]


def by_age(found: Mapping[str, Any]) -> go.Figure:
    """Simulated steps by the age of their placement, beside the step with neighbouring experts."""
    figure = figures.blank(height=340, x="training steps since experts were placed", y="ms of a step")
    points = found["ages"]
    figure.add_scatter(
        x=[point["age"] for point in points],
        y=_milliseconds(points),
        mode="markers",
        name="simulated",
        marker={"color": _LINE, "size": 8},
        hovertemplate="%{x:.4g} steps ago: %{y:.4g} ms<extra></extra>",
    )
    figure.add_scatter(
        x=[point["age"] for point in points],
        y=_milliseconds(points, "mean_step_time_s"),
        mode="lines",
        name="nearest curve that never falls",
        line={"color": _LINE, "width": 2},
        hoverinfo="skip",
    )
    if found["contiguous_step_time_s"] is not None:
        _level(figure, found["contiguous_step_time_s"], (0, points[-1]["age"]), name="experts in order", dash="dot")
    figure.update_layout(showlegend=True)
    return figure


def by_interval(found: Mapping[str, Any]) -> go.Figure:
    """Mean step by interval, with those of experts placed once and in order, the best and the chosen one marked."""
    figure = figures.blank(height=340, x="training steps between two placings", y="ms of a step, moving included")
    points = found["intervals"]
    figure.add_scatter(
        x=[point["every"] for point in points],
        y=_milliseconds(points),
        mode="lines+markers",
        name="placed anew",
        line={"color": _LINE, "width": 2},
        hovertemplate="every %{x} steps: %{y:.4g} ms<extra></extra>",
    )
    ends = (points[0]["every"], points[-1]["every"])
    _level(figure, found["never_step_time_s"], ends, name="placed once", dash="dash")
    if found["contiguous_step_time_s"] is not None:
        _level(figure, found["contiguous_step_time_s"], ends, name="experts in order", dash="dot")
    marks = [(found["every"], found["step_time_s"], "chosen", "#1d2229")]
    if found["best_every"] is not None:
        marks.append((found["best_every"], found["best_step_time_s"], "best", "#b3256b"))
    for every, step_s, name, colour in marks:
        figure.add_scatter(
            x=[every],
            y=[1e3 * step_s],
            mode="markers",
            name=f"{name}: every {every} steps",
            marker={"color": colour, "size": 11, "symbol": "diamond"},
        )
    figure.update_xaxes(type="log")
    figure.update_layout(showlegend=True)
    return figure


def _level(figure: go.Figure, step_s: float, ends: tuple[float, float], *, name: str, dash: str) -> None:
    figure.add_scatter(
        x=list(ends),
        y=[1e3 * step_s] * 2,
        mode="lines",
        name=name,
        line={"color": "#7a828e", "width": 1.5, "dash": dash},
        hovertemplate=f"{name}: %{{y:.4g}} ms<extra></extra>",
    )


def slot_map(slots_LDP: NDArray[np.int64], *, first_layer: int) -> go.Figure:
    """Heat map of layer x slot, ranks side by side with lines between them."""
    layers, ranks, per_rank = slots_LDP.shape
    slots_LX = slots_LDP.reshape(layers, -1)
    copies_LX = copies_of_slots(slots_LX)
    steps = len(_COPIES)
    scale = [(edge / steps, colour) for step, colour in enumerate(_COPIES) for edge in (step, step + 1)]
    figure = figures.layer_map(layers, x="rank")
    show = slots_LX.size <= _LARGEST_LABELLED
    rank_LX = np.broadcast_to(np.arange(ranks).repeat(per_rank), slots_LX.shape)
    figure.add_heatmap(
        y=np.arange(first_layer, first_layer + layers),
        z=np.where(copies_LX > 0, np.minimum(copies_LX, steps), np.nan),
        customdata=np.stack([slots_LX, rank_LX, copies_LX], 2),
        text=np.where(slots_LX == _EMPTY, "", slots_LX.astype(str)) if show else None,
        texttemplate="%{text}" if show else None,
        zmin=0.5,
        zmax=steps + 0.5,
        colorscale=scale,
        colorbar={
            "title": {"text": "slots of the expert", "side": "right", "font": {"size": 13}},
            "tickvals": list(range(1, steps + 1)),
            "ticktext": [*map(str, range(1, steps)), f"\u2265 {steps}"],
            "thickness": 14,
            "outlinewidth": 0,
        },
        hovertemplate="layer %{y}, rank %{customdata[1]}<br>expert %{customdata[0]}, in %{customdata[2]} slots"
        "<extra></extra>",
    )
    every = max(1, -(-ranks // 16))
    named = np.arange(0, ranks, every)
    figure.update_xaxes(tickvals=named * per_rank + (per_rank - 1) / 2, ticktext=[str(rank) for rank in named])
    for rank in range(1, ranks):
        figure.add_vline(x=rank * per_rank - 0.5, line={"width": 2, "color": "#ffffff" if ranks > 16 else "#1d2229"})
    return figure


def copies_of_slots(slots_LX: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many slots of its layer hold the expert of each slot, 0 for an empty one."""
    copies = [np.bincount(slots_X + 1)[slots_X + 1] * (slots_X != _EMPTY) for slots_X in slots_LX]
    return np.stack(copies)
