"""report.html: one self-contained file per run, the figures and the same numbers as tables. It opens without a network.

Legend: C attribution categories, E experts, L model layers with a router, R ranks of expert group 0, W all ranks.
"""

from pathlib import Path

import numpy as np
import yaml
from plotly.offline import get_plotlyjs

from moesim import __version__
from moesim.report import facts, figures
from moesim.report.categories import category
from moesim.report.page import Page
from moesim.report.sections import memory_section, pipeline_section, placement_section, pools_section, what_if_section
from moesim.report.timeline import forward_of_one_layer
from moesim.results.attribution import waited_for
from moesim.results.spans import CATEGORIES
from moesim.results.store import RunRecord

_LARGEST_TABLE = 16  # ranks up to which a matrix is also printed as a table


def write_report(record: RunRecord, path: Path) -> None:
    """Write the report of `record` to the file `path`, replacing it."""
    path.write_text(render(record), encoding="utf-8")


def render(record: RunRecord) -> str:
    """The whole HTML document of one run."""
    page = Page()
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
    return page.document(title=f"{record.scenario.name} - moesim", script=get_plotlyjs())


def _head(page: Page, record: RunRecord) -> None:
    result = record.result
    page.text("h1", record.scenario.name)
    page.text("p", describe(record))
    for warning in result.get("warnings", ()):
        page.text("p", warning, css="warning")
    page.open("div", css="tiles")
    for fact in facts.headline(result):
        page.open("div", css="tile")
        page.text("div", fact.label, css="label")
        page.text("div", fact.value, css="value")
        page.text("div", fact.note, css="note")
        page.close("div")
    page.close("div")


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
    page.text("h2", "Where the time goes")
    page.text(
        "p",
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
    page.text("h2", "One layer, rank by rank")
    page.text(
        "p",
        f"Forward pass of layer {window.layer} for the first micro-batch in expert group 0: computation above, "
        "transfers below. Magenta is time in which a transfer waits for a slower rank.",
    )
    page.figure(figures.timeline(window), name="timeline")


def _experts(page: Page, record: RunRecord) -> None:
    page.text("h2", "Expert load")
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
    page.open("div", css="tables")
    page.facts("Imbalance", facts.balance(record.result))
    page.facts("Rows of one expert / mean, all layers", facts.spread(load_LE))
    page.close("div")


def _traffic(page: Page, record: RunRecord) -> None:
    page.text("h2", "Traffic between ranks")
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
    page.open("div", css="figures")
    page.figure(figures.traffic(bytes_RR), name="traffic")
    page.open("div")
    page.facts("Communication of one step", [*facts.communication(record.result), facts.hidden(record.spans)])
    sent_R, received_R = bytes_RR.sum(axis=1), bytes_RR.sum(axis=0)
    if 1 < len(bytes_RR) <= _LARGEST_TABLE:
        show = facts.bytes_column([sent_R.max(), received_R.max()])
        rows = [(str(r), show(sent_R[r]), show(received_R[r])) for r in range(len(bytes_RR))]
        page.text("h3", "Dispatched per rank")
        page.table(("rank", "sends", "receives"), rows, styles=("number",) * 3)
    page.close("div")
    page.close("div")


def _ranks(page: Page, record: RunRecord) -> None:
    seconds_CW = record.arrays["attribution_CW"]
    page.text("h2", "Time per rank")
    page.text("p", "Each bar is one rank's step. A rank that waits has less to compute than the one it waits for.")
    page.figure(figures.rank_time(seconds_CW, CATEGORIES), name="rank-time")
    compute_W = record.arrays["compute_time_W"]
    waiting_W = seconds_CW[[category(key).family == "waiting" for key in CATEGORIES]].sum(axis=0)
    exposed_W = seconds_CW[[category(key).family == "communication" for key in CATEGORIES]].sum(axis=0)
    rows = [
        (name, *(facts.seconds(value) for value in (v_W.min(), np.median(v_W), v_W.mean(), v_W.max())))
        for name, v_W in (("computing", compute_W), ("exposed communication", exposed_W), ("waiting", waiting_W))
    ]
    page.table(("over all ranks", "least", "median", "mean", "most"), rows, styles=("", *["number"] * 4))
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
    page.text("h2", "The router")
    trace = record.trace
    if trace is None:
        page.text("p", "The model is dense: nothing is routed.")
        return
    curves = trace.curves
    if not len(curves.steps):
        page.text("p", "This router was not trained here, so there are no training curves.")
    page.open("div", css="figures")
    if len(curves.steps):
        page.figure(figures.losses(curves), name="loss", title="Loss in training")
        page.figure(figures.training_imbalance(curves), name="imbalance", title="Imbalance of experts in training")
    page.figure(
        figures.layer_imbalance(facts.trace_imbalance(trace)),
        name="imbalance-layers",
        title="Imbalance of experts" + (" on held-out text" if len(curves.steps) else ""),
    )
    page.facts("Router", [*facts.training(record.result), *facts.trace_facts(trace)])
    page.close("div")


def _background(page: Page, record: RunRecord) -> None:
    page.text("h2", "What this rests on")
    page.open("div", css="tables")
    page.facts("Sources of kernel and transfer times", facts.sources(record.result))
    if moved := facts.transfer_sources(record.result):
        page.facts("What transfers rest on", moved)
    if rests := facts.routing(record.result):
        page.facts("What the routing rests on", rests)
    if known := facts.software(record.result):
        page.facts("Software", known)
    page.facts("Samples of routing", facts.samples(record.result))
    page.close("div")
    if errors := facts.errors(record.result):
        page.text("h3", "How wrong it may be")
        page.table(facts.ERRORS_HEAD, errors, styles=("", "number", "number"), name="errors")
        page.text(
            "p",
            "Nine of ten kernels of a row are within its error, as measured (docs/accuracy.md); in the range it is one "
            "factor, common to all of them. The share is that of the critical path. Two runs on one GPU share these "
            "errors: only the range of the routing tells them apart.",
        )
    page.open("details")
    page.text("summary", "The resolved scenario")
    page.text("pre", yaml.safe_dump(record.scenario.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
    page.close("details")
    if record.trace is not None:
        page.open("details")
        page.text("summary", "Where the trace comes from")
        page.text("pre", yaml.safe_dump(dict(record.trace.provenance), sort_keys=False, allow_unicode=True))
        page.close("details")
    page.text("footer", f"Written by moesim {__version__}.")
