"""What the verbs print: the facts of a run or of a trace, each in one screen.

`--parts` adds how long each kind of pass takes, what ends the step, and how long a rank idles. The facts of a trace on
a plan are how its router loads experts and ranks, what is dropped and how far tokens travel.
Legend: L layers of the trained model, E experts, B micro-batches, D ranks of an expert group, P slots of a rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesim.parallel import TrafficSampler
from moesim.report import facts
from moesim.report.categories import PASSES
from moesim.report.facts import Fact, Result
from moesim.report.passes import Bar, gantt
from moesim.report.terminal import (
    Screen,
    Sized,
    bar,
    fact_table,
    grid,
    heading,
    indented,
    number_table,
    prints,
    profile,
    section,
    side_by_side,
    warnings,
)
from moesim.results import RunRecord
from moesim.results.metrics import balance_warnings
from moesim.scenario import Scenario
from moesim.seeding import stream
from moesim.trace import RoutingTrace
from moesim.trace.metrics import imbalance, mean_distinct_groups_L, uniform_floor

_STYLES = {"compute": "blue", "communication": "yellow", "waiting": "magenta", "overhead": "bright_black"}
_TWO_COLUMNS = 100  # terminal width from which everything else stands beside the attribution
_BAR_WIDTH = 14
_SMALL = 0.01  # parts of the step below this share are summed up in one line
_FULL_LOAD = 2.0  # relative load at which a column of the load profile is full


@prints
def print_facts(result: Result) -> Screen:
    """One screen of facts of `result`, the content of result.json."""
    return [Sized(lambda options: _run_screen(result, options))]


def _run_screen(result: Result, options: ConsoleOptions) -> list[RenderableType]:
    head = heading(str(result["scenario_name"]), f"{result['gpus']} GPUs, {result['samples']} routing samples")
    time = section("where the time goes", _attribution(result, ascii_only=options.ascii_only))
    balance = section("imbalance (max / mean)", fact_table(facts.balance(result), notes=False))
    traffic = section("communication per step", fact_table(facts.communication(result), notes=False))
    placed = facts.placement(result)
    placement = [section("placement of experts", fact_table(placed, notes=False))] if placed else []
    router = section("router", fact_table(facts.training(result), notes=False))
    sources = section("estimates rest on", fact_table(facts.sources(result), notes=False))
    if options.max_width >= _TWO_COLUMNS:
        body: list[RenderableType] = [side_by_side(time, Group(balance, *placement, traffic, router, sources))]
    else:
        body = [time, side_by_side(Group(balance, *placement, sources), Group(traffic, router))]
    pipeline, runs = facts.stages(result)  # ranks with as many layers in one line
    stages = number_table(("pipeline rank", "layers", "ms per micro-batch"), runs)
    headline = indented(fact_table([*facts.headline(result), facts.memory(result), *pipeline], strong=True))
    rests = facts.routing(result)
    body += [section("estimates rest on the routing", fact_table(rests))] if rests else []
    known = facts.software(result)
    body += [section("estimates rest on the software", fact_table(known))] if known else []
    body += [section("pipeline", stages)] if runs else []
    return [head, headline, *body, *_what_if(result), *warnings(result.get("warnings", ()))]


def _what_if(result: Result) -> list[RenderableType]:
    rows = facts.what_if(result)
    if not rows:
        return []
    answered = [row[:4] for row in rows if not row[4]]
    reasons = [Text(f"  {row[0]}: {row[4]}", style="dim") for row in rows if row[4]]
    return [section("what if", number_table(("", "step time", "change", "USD / M tokens"), answered)), *reasons]


def _attribution(result: Result, *, ascii_only: bool) -> Table:
    parts = facts.attribution(result)
    shown = [part for part in parts if part[2] >= _SMALL]
    rest = sum(seconds for _, seconds, _ in parts[len(shown) :])
    scale = _BAR_WIDTH / max(share for _, _, share in parts)
    rows: list[tuple[RenderableType, ...]] = []
    for category, seconds, share in shown:
        length = Text(bar(share * scale, ascii_only=ascii_only), style=_STYLES[category.family])
        rows.append((category.label, facts.seconds(seconds), facts.percent(share), length))
        jitter_s = facts.jitter(result) if category.key == "imbalance_wait" else 0.0
        if jitter_s > 0:
            rows.append(("  of which jitter", facts.seconds(jitter_s), facts.percent(jitter_s / seconds * share), ""))
    if rest:
        rows.append(("smaller parts", facts.seconds(rest), facts.percent(rest / result["step_time_s"]), ""))
    rows.append((Text("step", style="bold"), facts.seconds(result["step_time_s"]), facts.percent(1.0), ""))
    return grid(rows, {"no_wrap": True}, *[{"no_wrap": True, "justify": "right"}] * 2, {})


@prints
def print_trace(
    name: str, summary: Mapping[str, Any], *, first_LE: NDArray[np.float64], last_LE: NDArray[np.float64]
) -> Screen:
    """A summary (see `summarise`) and the relative expert loads at the first and last recorded step."""
    experts, ranks, steps = summary["experts"], summary["ranks"], summary["recorded_steps"]
    about = f"router {summary['router']}, {summary['top_k']} of {summary['num_experts']} experts"
    lines = [Fact("recorded", f"{summary['recorded_tokens']:,} tokens", f"after {steps[-1]} training steps")]
    if summary["validation_loss"] is not None:
        lines.append(Fact("held-out loss", f"{summary['validation_loss']:.4f}", "nats per byte"))
        lines.append(Fact("training loss", f"{summary['train_loss']:.4f}", "nats per byte"))
    columns = ("layer", "experts at step 0", "experts", "ranks", "dropped", "groups per token")
    rows = [
        (
            str(layer),
            f"{experts['imbalance_first'][layer]:.3f}",
            f"{experts['imbalance_last'][layer]:.3f}",
            f"{ranks['imbalance'][layer]:.3f}",
            facts.percent(summary["dropped_share"][layer], digits=2),
            f"{summary['distinct_groups_per_token'][layer]:.3f}",
        )
        for layer in range(len(last_LE))
    ]
    floor = ("uniform router", "", f"{experts['uniform_floor']:.3f}", f"{ranks['uniform_floor']:.3f}", "", "")
    loads = {steps[0]: first_LE, steps[-1]: last_LE}
    return [
        heading(name, about),
        indented(fact_table(lines)),
        section(
            f"imbalance (max / mean); ranks on {ranks['window_tokens']:,} tokens", number_table(columns, [*rows, floor])
        ),
        *(
            section(
                f"expert load after {step} steps, a full column is {_FULL_LOAD:g} x the mean",
                Sized(partial(_profiles, load_LE)),
            )
            for step, load_LE in loads.items()
        ),
        *warnings(summary["warnings"]),
    ]


def _profiles(load_LE: NDArray[np.float64], options: ConsoleOptions) -> Screen:
    """One line per layer; experts are averaged in runs where they outnumber the columns."""
    run = -(-load_LE.shape[1] // (options.max_width - 6))
    rows = []
    for layer, load_E in enumerate(load_LE):
        means = [float(load_E[start : start + run].mean()) for start in range(0, len(load_E), run)]
        rows.append((str(layer), profile(means, full=_FULL_LOAD, ascii_only=options.ascii_only)))
    return [grid(rows, {}, {"style": "blue"})]


COLD = 0.5  # an expert with less than this share of the mean load is cold


def relative_load_LE(trace: RoutingTrace, *, first: bool) -> NDArray[np.float64]:
    """Rows of an expert / mean rows of its layer, at the first or the last recorded step; before dropping."""
    load_LE = trace.first_load_LE if first else trace.final_load_LE
    return np.asarray(load_LE / load_LE.mean(axis=1, keepdims=True))


def summarise(scenario: Scenario, trace: RoutingTrace) -> dict[str, Any]:
    """Plain values for people and programs; lists have one entry per layer of the trained model.

    Ranks and drops are those of one routing sample of expert group 0 of `scenario`'s plan: imbalance is max / mean rows
    per rank and micro-batch after dropping, averaged over micro-batches. Raises UserError when the trace does not fit.
    """
    router, final = trace.router, trace.final
    sampler = TrafficSampler(scenario, trace)
    sample = sampler.draw(stream(scenario.seed, "trace-view"))
    arrays_L = [sample.thin_arrays(0, sampler.counted_layer(layer)) for layer in range(trace.num_layers)]
    rank_rows_LBD = np.stack([arrays.slot_rows_BDP(sampler.placement).sum(axis=-1) for arrays in arrays_L])
    window = sampler.placement.num_ranks * scenario.workload.micro_batch * sampler.piece_length
    floor = {"num_groups": router.num_groups, "group_limit": router.group_limit, "top_k": router.top_k}
    curves = trace.curves
    return {
        "router": router.kind,
        "num_experts": router.num_experts,
        "top_k": router.top_k,
        "recorded_steps": [step.step for step in trace.steps],
        "recorded_tokens": final.num_tokens,
        "train_loss": float(curves.train_loss[-1]) if len(curves.train_loss) else None,
        "validation_loss": float(curves.validation_loss[-1]) if len(curves.validation_loss) else None,
        "experts": {
            "imbalance_first": imbalance(relative_load_LE(trace, first=True)).tolist(),
            "imbalance_last": imbalance(relative_load_LE(trace, first=False)).tolist(),
            "cold_share": (relative_load_LE(trace, first=False) < COLD).mean(axis=1).tolist(),
            "uniform_floor": uniform_floor(router.num_experts, tokens=final.num_tokens, **floor),
        },
        "ranks": {
            "imbalance": imbalance(rank_rows_LBD).mean(axis=1).tolist(),
            "uniform_floor": uniform_floor(
                router.num_experts, tokens=window, num_bins=sampler.placement.num_ranks, **floor
            ),
            "window_tokens": window,
        },
        "dropped_share": [
            float(arrays.dropped_rows_B.sum() / max(1, arrays.routed_rows_B.sum())) for arrays in arrays_L
        ],
        "distinct_groups_per_token": mean_distinct_groups_L(final, router).tolist(),
        "warnings": balance_warnings(scenario, trace),
    }


@dataclass(frozen=True, kw_only=True)
class StepPart:
    """One kind of pass, of all pipeline ranks (the first rank of expert group 0, sample 0).

    count: passes of a pipeline rank, mean of all. middle_s, least_s, most_s: median, smallest and largest seconds of
    one pass; total_s: seconds of a pipeline rank, mean of all.
    """

    name: str
    count: float
    middle_s: float
    least_s: float
    most_s: float
    total_s: float


def step_parts(record: RunRecord) -> list[StepPart]:
    """The parts of the step in the order of a schedule, and last what is idle: they add up to the step on average."""
    bars = gantt(record.pipeline_spans)
    num_ranks = len(record.pipeline_spans)
    parts = []
    for kind, (label, _) in PASSES.items():
        seconds = np.array([bar.finish - bar.start for bar in bars if bar.kind == kind])
        if len(seconds):
            parts.append(_part(label, seconds, num_ranks=num_ranks))
    end = max(bar.finish for bar in bars)
    idle_P = end - np.array([_covered(bars, rank) for rank in range(num_ranks)])
    return [*parts, _part("idle (bubble, waiting for other ranks)", idle_P, num_ranks=num_ranks)]


def _part(name: str, seconds: NDArray[np.float64], *, num_ranks: int) -> StepPart:
    return StepPart(
        name=name,
        count=len(seconds) / num_ranks,
        middle_s=float(np.median(seconds)),
        least_s=float(seconds.min()),
        most_s=float(seconds.max()),
        total_s=float(seconds.sum() / num_ranks),
    )


def _covered(bars: Sequence[Bar], rank: int) -> float:
    """Seconds in which a pipeline rank has a pass, a reduction or an update; those that overlap count once."""
    spans = sorted((bar.start, bar.finish) for bar in bars if bar.pipeline_rank == rank)
    covered, until = 0.0, 0.0
    for start, finish in spans:
        covered += max(0.0, finish - max(start, until))
        until = max(until, finish)
    return covered


@prints
def print_parts(record: RunRecord) -> Screen:
    """The parts as a table, in milliseconds."""
    seconds = attrgetter("middle_s", "least_s", "most_s", "total_s")
    rows = [
        (part.name, f"{part.count:g}", *(f"{1e3 * value:.4g}" for value in seconds(part)))
        for part in step_parts(record)
    ]
    head = ("", "times", "median", "from", "to", "together")
    return [section("parts of the step on a pipeline rank, ms", number_table(head, rows))]
