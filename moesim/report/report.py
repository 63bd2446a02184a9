"""report.html: one self-contained file per run, the figures and the same numbers as tables. It opens without a network.

First the sections on the whole step (pipeline, memory of its ranks, what-ifs) and on where experts sit: the map of
slots with copies marked, and the load of ranks with it. Then the page.
Legend: C attribution categories, E experts, L model layers with a router, R ranks of expert group 0, W all ranks; of a
placement D ranks of the group, P slots of a rank, Z slots of all ranks.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

from moesim.report import facts, figures, placement_view
from moesim.report.categories import PARTS, category
from moesim.report.page import Page
from moesim.report.passes import forward_of_one_layer, gantt, idle_share
from moesim.results.attribution import waited_for
from moesim.results.spans import CATEGORIES
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
    "dispatch_library": "reserved",
    "communicators": "reserved",
    "reserved": "reserved",
}


def pipeline_section(page: Page, record: RunRecord) -> None:
    """The Gantt chart and where the time of each pipeline rank goes; nothing without a pipeline."""
    if record.scenario.parallelism.pipeline == 1:
        return
    bars = gantt(record.pipeline_spans)
    schedule = record.scenario.parallelism.schedule.kind
    page.heading(
        "The pipeline",
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
    page.heading(
        "Memory",
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
    with page.details(f"All parts on pipeline rank {fullest}, the fullest"):
        details = [
            (name.replace("_", " ").replace(".", ", "), format_bytes(size), facts.percent(size / peaks[fullest]))
            for name, size in memory["parts_bytes_by_pipeline_rank"][fullest].items()
        ]
        page.table(("part", "bytes", "of the peak"), details)


def what_if_section(page: Page, record: RunRecord) -> None:
    """What else the step could have taken; nothing when nobody asked."""
    rows = facts.what_if(record.result)
    if not rows:
        return
    page.heading("What if", "The same step simulated again with the same seeds and one thing changed.")
    head = ("question", "step time", "change", "USD / M tokens", "")
    page.table(head, rows, styles=("", "number", "number", "number", "note"))


def pools_section(page: Page, record: RunRecord) -> None:
    """What each pool does and costs, where there are several, and which ranks waited for which."""
    pools, waiting = record.result.get("pools", ()), record.result.get("waiting")  # older runs have neither
    if len(pools) > 1:
        page.heading("Pools")
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
        page.heading(
            "Who waited for whom",
            "Of the first routing sample: the last rank to come to a transfer or a collective is waited for by all "
            "others in it, and at a p2p send the pipeline rank before. Waiting counts whether or not a rank computes "
            "meanwhile; of rank groups that do the same one stands for all. At most "
            f"{facts.seconds(facts.jitter(record.result))} of a rank's waiting are for chips and hosts of one kind "
            "that are slower than others by chance.",
        )
        with page.inside("div", css="figures"):
            for_rank = [(str(one["rank"]), facts.seconds(one["seconds_of_others"])) for one in waiting["waited_for"]]
            page.table(("rank waited for", "seconds of others"), for_rank, styles=("number", "number"))
            pairs = [(str(p["rank"]), str(p["waits_for"]), facts.seconds(p["seconds"])) for p in waiting["pairs"]]
            page.table(("rank", "waits for", "seconds"), pairs, styles=("number",) * 3)


def placement_section(page: Page, record: RunRecord) -> None:
    """The map, and the loads before and after; nothing where every rank has neighbouring experts."""
    slots = record.arrays.get("placement_LDP")
    if slots is None:
        return
    first = record.scenario.model.dense_layers
    page.heading(
        "Placement of experts",
        "The slots of each rank of expert group 0 in every layer with experts, by rank. Colour tells how many slots "
        "hold the expert of this one: grey is one, blue are copies. Point at a slot to see its expert.",
    )
    page.figure(placement_view.slot_map(slots.astype(np.int64), first_layer=first), name="placement")
    before = record.arrays.get("rank_load_contiguous_LR")
    after = record.arrays["rank_load_LR"]
    with page.inside("div", css="figures"):
        for title, name, load_LR in (
            ("Load of ranks, neighbouring experts", "rank-load-before", before),
            ("Load of ranks, as placed", "rank-load-after", after),
        ):
            if load_LR is not None:
                relative_LR = load_LR / np.maximum(load_LR.mean(axis=1, keepdims=True), 1e-300)
                page.figure(figures.load_map(relative_LR, first_layer=first, of="rank"), name=name, title=title)
    page.facts("Placement", facts.placement(record.result))
    found = record.result["placement"].get("replacing")
    if found is not None:
        page.heading(
            "Placed anew as the router trains",
            "Left: the step by how many training steps ago experts were placed, each point a simulated step. Right: "
            "the mean step by the interval between two placings, its share of moving experts included; short intervals "
            "pay for moving, long ones for old placements.",
            level=3,
        )
        with page.inside("div", css="figures"):
            page.figure(placement_view.by_age(found), name="placement-age", title="Step by age of the placement")
            figure = placement_view.by_interval(found)
            page.figure(figure, name="placement-interval", title="Mean step by interval, moving included")


_LARGEST_TABLE = 16  # ranks up to which a matrix is also printed as a table


def write_report(record: RunRecord, path: Path) -> None:
    """Write the report of `record` to the file `path`, replacing it."""
    path.write_text(render(record), encoding="utf-8")


def render(record: RunRecord) -> str:
    """The whole HTML document of one run."""
    page = Page(record.scenario.name, describe(record), warnings=record.result.get("warnings", ()))
    sections = (
        _head,
        _time,
        what_if_section,
        pipeline_section,
        memory_section,
        pools_section,
        _experts,
        placement_section,
        _traffic,
        _ranks,
        _timeline,
        _training,
        _background,
    )
    for section in sections:
        section(page, record)
    return page.document()


def _head(page: Page, record: RunRecord) -> None:
    page.tiles([(fact.label, fact.value, fact.note) for fact in facts.headline(record.result)])


def describe(record: RunRecord) -> str:
    """One sentence: which model, on what, how it is laid out and who routes."""
    scenario, model, work = record.scenario, record.scenario.model, record.scenario.workload
    experts = f", {model.experts} experts, top {model.top_k}" if model.experts else ", dense"
    pools = " and ".join(
        f"{pool.nodes} x {pool.gpus_per_node} {pool.gpu_name.upper()}" for pool in scenario.cluster.pools
    )
    axes = ("data", "context", "tensor", "pipeline", "expert", "expert_tensor")
    sizes = [(name.replace("_", "-"), getattr(scenario.parallelism, name)) for name in axes]
    plan = ", ".join(f"{name} {size}" for name, size in sizes if size > 1) or "nothing"
    batch = f"{work.global_batch} sequences of {work.sequence_length} tokens per step"
    return (
        f"{model.preset or 'Custom model'} ({model.layers} layers{experts}) on {pools} GPUs ({plan} parallel), "
        f"{batch}. "
        f"Router: {record.result['router']['kind']}. Mean over {record.result['samples']} routing samples."
    )


def _time(page: Page, record: RunRecord) -> None:
    result = record.result
    balanced_s = dict(zip(CATEGORIES, record.arrays["attribution_balanced_C"].tolist(), strict=True))
    page.heading(
        "Where the time goes",
        "Mean over ranks of one optimizer step. Communication counts only where no computation hides it. "
        "The second bar is the same step with the same rows and copies spread evenly over ranks. The third is the "
        "critical path of the first routing sample: what the end of the step waited for, walked back from rank "
        f"{result['critical_path']['last_rank']}, which finished last. It holds no waiting, because it is always "
        "where the work was, and transfers count whole.",
    )
    critical_s = result["critical_path"]["seconds"]
    page.figure(figures.attribution(result["attribution_s"], balanced_s, critical_s), name="attribution")
    parts = facts.attribution(result)
    longest = max(share for _, _, share in parts)
    rows = [
        (
            part.colour,
            part.label,
            (
                facts.seconds(s),
                facts.percent(share),
                facts.seconds(_rounded(balanced_s.get(part.key, 0.0), result["step_time_s"])),
                facts.seconds(critical_s.get(part.key, 0.0)),
            ),
            share / longest,
        )
        for part, s, share in parts
    ]
    page.bars(rows, head=("part", "time", "share", "spread evenly", "critical path", ""))


def _rounded(seconds: float, step_s: float) -> float:
    return seconds if seconds > facts.ROUND_OFF * step_s else 0.0


def _timeline(page: Page, record: RunRecord) -> None:
    window = forward_of_one_layer(record.spans)
    if window is None:
        return
    page.heading(
        "One layer, rank by rank",
        f"Forward pass of layer {window.layer} for the first micro-batch in expert group 0: computation above, "
        "transfers below. Magenta is time in which a transfer waits for a slower rank.",
    )
    page.figure(figures.timeline(window), name="timeline")


def _experts(page: Page, record: RunRecord) -> None:
    page.heading("Expert load")
    if "expert_load_LE" not in record.arrays:
        page.text("p", "The model is dense: it has no experts.")
        return
    load_LE = record.arrays["expert_load_LE"]
    page.text(
        "p",
        "Rows that each expert receives over the whole step, divided by the mean of its layer. "
        "Colour follows the logarithm: blue is cold, orange is hot, grey is even.",
    )
    page.figure(figures.load_map(load_LE, first_layer=record.scenario.model.dense_layers), name="expert-load")
    with page.inside("div", css="tables"):
        page.facts("Imbalance", facts.balance(record.result))
        page.facts("Rows of one expert / mean, all layers", facts.spread(load_LE))


def _traffic(page: Page, record: RunRecord) -> None:
    page.heading("Traffic between ranks")
    if "traffic_RR" not in record.arrays:
        page.text("p", "A dense model dispatches nothing.")
        return
    bytes_RR = record.arrays["traffic_RR"]
    page.text(
        "p",
        "Dispatched bytes of one step inside expert group 0, forward and backward. "
        "A rank's copies to itself are no traffic. The colours run from the least to the most, at "
        "least 10 % to both sides of the mean.",
    )
    with page.inside("div", css="figures"):
        page.figure(figures.traffic(bytes_RR), name="traffic")
        with page.inside("div"):
            page.facts("Communication of one step", [*facts.communication(record.result), facts.hidden(record.spans)])
            sent_R, received_R = bytes_RR.sum(axis=1), bytes_RR.sum(axis=0)
            if 1 < len(bytes_RR) <= _LARGEST_TABLE:
                show = facts.bytes_column([sent_R.max(), received_R.max()])
                rows = [(str(r), show(sent_R[r]), show(received_R[r])) for r in range(len(bytes_RR))]
                page.table(("rank", "sends", "receives"), rows, styles=("number",) * 3, title="Dispatched per rank")


def _ranks(page: Page, record: RunRecord) -> None:
    seconds_CW = record.arrays["attribution_CW"]
    page.heading(
        "Time per rank", "Each bar is one rank's step. A rank that waits has less to compute than the one it waits for."
    )
    page.figure(figures.rank_time(seconds_CW, CATEGORIES), name="rank-time")
    compute_W = record.arrays["compute_time_W"]
    waiting_W = seconds_CW[[category(key).family == "waiting" for key in CATEGORIES]].sum(axis=0)
    exposed_W = seconds_CW[[category(key).family == "communication" for key in CATEGORIES]].sum(axis=0)
    least = 1e-9 * seconds_CW.sum(axis=0).max()  # below it lies what sums of spans round off
    rows = []
    for name, v_W in (("computing", compute_W), ("exposed communication", exposed_W), ("waiting", waiting_W)):
        v_W = np.where(v_W > least, v_W, 0.0)
        rows.append((name, *map(facts.seconds, (v_W.min(), np.median(v_W), v_W.mean(), v_W.max()))))
    page.table(("over all ranks", "least", "median", "mean", "most"), rows)
    _waits(page, record)


def _waits(page: Page, record: RunRecord) -> None:
    """Who waited for whom, in the first group of the pipeline rank that waits most; nothing where nobody does."""
    if not record.pipeline_spans:
        return
    waiting_W = record.arrays["attribution_CW"][CATEGORIES.index("imbalance_wait")]
    place = int(waiting_W.reshape(len(record.pipeline_spans), -1).mean(axis=1).argmax())
    waits_RR, ranks_R = waited_for(record.pipeline_spans[place]), record.pipeline_spans[place].ranks_R
    if waits_RR.sum() == 0:
        return
    page.text("h3", "Exposed waiting, by who came last")
    where = f"expert group 0 of pipeline rank {place}" if place else "expert group 0"
    page.text(
        "p",
        f"Time of one step in {where} that ranks stood still in a transfer until the last of the group came to it, by "
        "who that was; the last column is for ranks outside of it. First routing sample.",
    )
    page.figure(figures.waits(waits_RR, ranks_R), name="waits")


def _training(page: Page, record: RunRecord) -> None:
    page.heading("The router")
    trace = record.trace
    if trace is None:
        page.text("p", "The model is dense: nothing is routed.")
        return
    curves = trace.curves
    if not len(curves.steps):
        page.text("p", "This router was not trained here, so there are no training curves.")
    with page.inside("div", css="figures"):
        if len(curves.steps):
            page.figure(figures.losses(curves), name="loss", title="Loss in training")
            page.figure(figures.training_imbalance(curves), name="imbalance", title="Imbalance of experts in training")
        page.figure(
            figures.layer_imbalance(facts.trace_imbalance(trace)),
            name="imbalance-layers",
            title="Imbalance of experts" + (" on held-out text" if len(curves.steps) else ""),
        )
        page.facts("Router", [*facts.training(record.result), *facts.trace_facts(trace)])


def _background(page: Page, record: RunRecord) -> None:
    page.heading("What this rests on")
    with page.inside("div", css="tables"):
        page.facts("Sources of kernel and transfer times", facts.sources(record.result))
        if moved := facts.transfer_sources(record.result):
            page.facts("What transfers rest on", moved)
        if rests := facts.routing(record.result):
            page.facts("What the routing rests on", rests)
        if known := facts.software(record.result):
            page.facts("Software", known)
        page.facts("Samples of routing", facts.samples(record.result))
    if errors := facts.errors(record.result):
        page.table(facts.ERRORS_HEAD, errors, name="errors", title="How wrong it may be")
        page.text(
            "p",
            "Nine of ten kernels of a row are within its error, as measured (docs/accuracy.md); in the range it is one "
            "factor, common to all of them. The share is that of the critical path. Two runs on one GPU share these "
            "errors: only the range of the routing tells them apart.",
        )
    with page.details("The resolved scenario"):
        page.text("pre", yaml.safe_dump(record.scenario.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    if record.trace is not None:
        with page.details("Where the trace comes from"):
            page.text("pre", yaml.safe_dump(dict(record.trace.provenance), sort_keys=False, allow_unicode=True))
