"""Sections of report.html on the whole step: the pipeline, the memory of its ranks, and what-ifs."""

from collections.abc import Mapping

import numpy as np

from moesim.report import facts, figures_step
from moesim.report.categories import category
from moesim.report.figures_step import PARTS
from moesim.report.page import Page
from moesim.report.span_views import gantt, idle_share
from moesim.results import CATEGORIES, RunRecord
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
    page.figure(figures_step.gantt(bars), name="pipeline")
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
    page.figure(figures_step.memory(parts, capacities), name="memory")
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
