"""What people see of a deployment under load: a screen, and a page with what happened over time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from plotly.graph_objects import Figure
from plotly.subplots import make_subplots

from moesim.report.facts import Fact
from moesim.report.figures import empty_figure, styled
from moesim.report.page import Page
from moesim.report.terminal import Screen, fact_table, heading, indented, number_table, prints, section, warnings
from moesim.units import format_bytes, format_seconds

Result = Mapping[str, Any]

_PARTS = {
    "projections": "projections, norms, dense networks",
    "attention": "attention over keys and values",
    "experts": "router and routed experts",
    "exchange": "dispatch, combine, all-reduces",
    "head": "output head",
    "draft": "drafted tokens",
    "swap": "keys and values to and from host memory",
    "host": "host",
}
_LATENCIES = {"ttft_s": "time to first token", "tpot_s": "time per token after it", "latency_s": "whole answer"}
_SHARES = ("mean", "p50", "p90", "p99")
_COLOUR = "#2474b5"
_PAGES = {"tickformat": ".3~p", "title": {"text": "of its pages"}}
_ROWS = {"ticksuffix": "x", "title": {"text": "of the mean"}}
_ROWS_NOTE = (
    "Each column is one draw of routing in one layer, for a step of the size that there was then; steps last as the "
    "means over several draws and layers say. What is above the scale is as dark as its end."
)


def rate(value: float) -> str:
    """Something per second: four digits, all of those before the point with thousands separated."""
    return f"{value:.4g}" if value < 1_000 else f"{value:,.0f}"


def _used(share: float) -> str:
    """A share of what there is, which is never nothing for a little."""
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"


def _gpus(result: Result) -> str:
    used, rented = result["gpus"], result["cluster_gpus"]
    return _gpus_of(used) if used == rented else f"{used} of {_gpus_of(rented)}"


def _gpus_of(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def serving_facts(result: Result) -> list[Fact]:
    """The headline."""
    memory = result["memory"]
    facts = []
    if "largest_requests_per_second" in result:
        largest = result["largest_requests_per_second"]
        facts.append(Fact("largest load", f"{rate(largest)} /s", "requests that come while the limits are met"))
    facts += [
        Fact("requests", f"{result['requests']:,}", f"in {format_seconds(result['seconds'])} on {_gpus(result)}"),
        Fact("good", f"{rate(result['good_requests_per_second'])} /s", f"{result['good_share']:.1%} meet the limits"),
        Fact(
            "output tokens",
            f"{result['output_tokens_per_second']:,.0f} /s",
            f"{result['output_tokens_per_second_per_gpu']:,.0f} /s per GPU, "
            f"{result['tokens_per_second_per_gpu']:,.0f} with prompts{_of_a_user(result)}",
        ),
        Fact(
            "price",
            f"${result['usd_per_million_output_tokens']:.4g} / M output tokens",
            f"{_rent(result)} over them; ${result['usd_per_million_tokens']:.4g} / M tokens with prompts",
        ),
        *_price_facts(result),
        Fact(
            "memory",
            format_bytes(memory["weights"]),
            f"weights of a GPU; {format_bytes(memory['kv'])} for keys and values of {memory['kv_tokens']:,} tokens, "
            f"at most {_used(result['kv_peak_share'])} used; {result['preempted']} preemptions",
        ),
        Fact(
            "steps",
            f"{result['steps']:,}",
            f"{format_seconds(result['step_s']['mean'])} each, {result['tokens_per_step']:,.0f} tokens in the mean",
        ),
    ]
    if (moved := result["transfer"]) is not None:
        facts.append(
            Fact(
                "transfer",
                format_bytes(moved["bytes"]),
                f"keys and values between instances; {format_seconds(moved['shown_s']['mean'])} shown of "
                f"{format_seconds(moved['seconds']['mean'])} in the mean",
            )
        )
    facts += _engine_facts(result)
    if result["rank_rows_imbalance"] is not None:
        facts.append(Fact("rank rows", f"{result['rank_rows_imbalance']:.3f}x", "max / mean at the mean batch"))
    rests = f"kernels: {', '.join(result['kernels_rest_on'])}; routing: {result['routing_rests_on']}"
    facts.append(Fact("rests on", "no measured run", rests))
    return facts


def _rent(result: Result) -> str:
    """Idle GPUs of the cluster are paid for, too."""
    rented = result["cluster_gpus"]
    return "all rent" if result["gpus"] == rented else f"the rent of all {_gpus_of(rented)}"


def _of_a_user(result: Result) -> str:
    of_a_user = result["tokens_per_second_per_user"]
    return "" if of_a_user is None else f"; {rate(of_a_user)} /s for a user"


def _price_facts(result: Result) -> list[Fact]:
    """The rent split between prompts and answers; of prompts also without what the prefix cache held."""
    new = ""
    if result["cached_input_tokens"]:
        new = (
            f", cached prefixes counted; ${result['usd_per_million_new_input_tokens']:.4g} / M without the "
            f"{result['prefix_hit_share']:.0%} that were cached"
        )
    share = result["usd_per_million_input_tokens"] * result["input_tokens"]
    rent = result["usd_per_million_tokens"] * (result["input_tokens"] + result["output_tokens"])
    by = (
        "of the rent, that of their own GPUs" if len(result["pools"]) > 1 else "of the rent, by their rows in the steps"
    )
    prompts, answers = (f"{abs(part):.0%} {by}" for part in (share / rent, 1.0 - share / rent))
    return [
        Fact("- prompts", f"${result['usd_per_million_input_tokens']:.4g} / M prompt tokens", prompts + new),
        Fact("- answers", f"${result['usd_per_million_generated_tokens']:.4g} / M output tokens", answers),
    ]


def _engine_facts(result: Result) -> list[Fact]:
    """What caches, drafts, dropping, padding and host memory did, where they did anything."""
    facts = []
    if result["prefix_hit_share"]:
        facts.append(Fact("prefix cache", f"{result['prefix_hit_share']:.1%}", "of the prompts' tokens were found"))
    if result["tokens_per_request_step"] > 1:
        facts.append(Fact("drafts", f"{result['tokens_per_request_step']:.3f}", "tokens of a request in a step"))
    if result["dropped_share"]:
        facts.append(Fact("dropped rows", f"{result['dropped_share']:.2%}", "of all rows that experts were sent"))
    if result["padding_share"]:
        facts.append(Fact("padding", f"{result['padding_share']:.1%}", "of all rows that were computed"))
    if result["swapped"]:
        facts.append(Fact("swapped", f"{result['swapped']:,}", "preempted requests that went to host memory"))
    return facts


def _latency_rows(result: Result) -> list[tuple[str, ...]]:
    of = [("", result), *((f", class {each['class']}", each) for each in result["classes"])]
    return [
        (name + whose, *(format_seconds(values[key][share]) for share in _SHARES))
        for key, name in _LATENCIES.items()
        if key != "tpot_s" or result["tokens_per_second_per_user"] is not None
        for whose, values in of
    ]


def _part_rows(result: Result) -> list[tuple[str, ...]]:
    total = sum(result["time_s"].values()) or 1.0
    parts = sorted(result["time_s"].items(), key=lambda item: -item[1])
    return [(_PARTS[name], format_seconds(seconds), f"{seconds / total:.1%}") for name, seconds in parts if seconds > 0]


_RANGED: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "good_share": ("requests within the limits", lambda value: f"{value:.1%}"),
    "good_requests_per_second": ("good requests /s", rate),
    "requests_per_second": ("requests /s", rate),
    "output_tokens_per_second": ("output tokens /s", lambda value: f"{value:,.0f}"),
    "tokens_per_second_per_gpu": ("tokens /s per GPU with prompts", lambda value: f"{value:,.0f}"),
    "tokens_per_second_per_user": ("tokens /s for a user", rate),
    "usd_per_million_output_tokens": ("USD / M output tokens, all rent", lambda value: f"{value:.4g}"),
    "usd_per_million_tokens": ("USD / M tokens with prompts", lambda value: f"{value:.4g}"),
    "usd_per_million_input_tokens": ("USD / M prompt tokens, their rent", lambda value: f"{value:.4g}"),
    "usd_per_million_new_input_tokens": ("USD / M prompt tokens not cached", lambda value: f"{value:.4g}"),
    "usd_per_million_generated_tokens": ("USD / M output tokens, their rent", lambda value: f"{value:.4g}"),
    **{
        f"{key}.{share}": (f"{name}, {share}", format_seconds)
        for key, name in _LATENCIES.items()
        for share in ("p50", "p90", "p99")
    },
}
_RANGE_HEAD = ("", "least", "most")


def _range_rows(result: Result) -> list[tuple[str, ...]]:
    """Least and most over seeds; nothing for one seed."""
    rows = []
    for key, values in result.get("ranges", {}).items():
        name, shown = _RANGED[key]
        rows.append((name, *(shown(value) for value in values)))
    return rows


@prints
def print_serving(result: Result) -> Screen:
    """The answers in one screen; instances where there are several."""
    ranges = _range_rows(result)
    several = len(result["pools"]) > 1 or result["pools"][0]["replicas"] > 1
    return [
        heading(result["name"], "serving"),
        indented(fact_table(serving_facts(result), strong=True)),
        section("latency", number_table(("", *_SHARES), _latency_rows(result))),
        *([section(f"over {result['seeds']} seeds", number_table(_RANGE_HEAD, ranges))] if ranges else []),
        *([section("instances", number_table(_POOL_HEAD, _pool_rows(result)))] if several else []),
        section("where the time goes", number_table(("", "all steps", "share"), _part_rows(result))),
        *warnings(result["warnings"]),
    ]


def _pool_rows(result: Result) -> list[tuple[str, ...]]:
    return [
        (
            f"{pool['name']}: {pool['replicas']} of {_gpus_of(pool['gpus'] // pool['replicas'])}",
            f"{pool['busy_share']:.0%}",
            format_seconds(pool["step_s"]["mean"]),
            f"{pool['tokens_per_step']:,.0f}",
            format_bytes(pool["memory"]["weights"]),
            format_bytes(pool["memory"]["kv"]),
            _used(pool["kv_peak_share"]),
            "" if pool["rank_rows_imbalance"] is None else f"{pool['rank_rows_imbalance']:.3f}x",
        )
        for pool in result["pools"]
    ]


_POOL_HEAD = ("instances", "busy", "step", "tokens", "weights", "KV", "used", "rank rows")
_LINES = (
    ("tokens", "tokens of a step"),
    ("generated", "tokens generated"),
    ("waiting", "requests waiting"),
    ("pages", "pages in use"),
    ("seconds", "seconds of a step"),
)


def _over_time(pool: Result) -> Figure:
    """Load, waiting requests, pages and steps of one pool; not what it never has, as tokens generated for prompts."""
    timeline = pool["timeline"]
    lines = [(name, title) for name, title in _LINES if any(timeline[name])]
    panels = make_subplots(rows=len(lines), cols=1, shared_xaxes=True, vertical_spacing=0.03)
    figure = styled(panels, height=190 * len(lines))
    for row, (name, title) in enumerate(lines, start=1):
        line = {"color": _COLOUR, "width": 1.2}
        figure.add_scatter(x=timeline["end"], y=timeline[name], mode="lines", line=line, name=title, row=row, col=1)
        figure.update_yaxes(title_text=title.replace(" of ", "<br>of "), rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title_text="seconds", row=len(lines), col=1)
    return figure.update_layout(showlegend=False)


def _heat_map(seconds: Sequence[float], by_moment: Sequence[Sequence[float]], **shown: Any) -> Figure:
    """Moments across; `of` what down; `bar` says what the colours are, whose scale ends between `ends`."""
    by_row = list(zip(*by_moment, strict=True))
    figure = empty_figure(height=min(640, max(220, 14 * len(by_row) + 120)), x="seconds", y=shown["of"])
    low, high = shown["ends"]  # few tokens at the end would set the scale
    most = float(np.clip(np.quantile(np.array(by_row), 0.995), low, high))
    figure.add_heatmap(x=seconds, z=by_row, colorscale="Blues", zmin=0, zmax=most, colorbar=shown["bar"])
    return figure.update_yaxes(autorange="reversed")


def serving_page(result: Result) -> str:
    """Load, waiting requests, pages and steps over time, and the tables, as one HTML document without network."""
    served = f"{result['requests']:,} requests served on {_gpus(result)}."
    page = Page(result["name"], served, warnings=result["warnings"], of="serving")
    page.facts("Answers", serving_facts(result))
    with page.inside("div", css="tables"):
        for title, head, rows in (
            ("Latency", ("", *_SHARES), _latency_rows(result)),
            ("Where the time goes", ("", "all steps", "share"), _part_rows(result)),
            (f"Over {result['seeds']} seeds" if "seeds" in result else "", _RANGE_HEAD, _range_rows(result)),
        ):
            if not rows:
                continue
            with page.inside("div"):
                page.table(head, rows, title=title)
    page.table(_POOL_HEAD, _pool_rows(result), title="Instances")
    several = len(result["pools"]) > 1
    for pool in result["pools"]:
        of = f": {pool['name']}" if several else ""
        page.figure(_over_time(pool), name=f"over-time-{pool['name']}", title=f"Over time{of}")
        held, rows = pool["kv_share_over_time"], pool["expert_rows_over_time"]
        if len(held["share"][0]) > 1:
            figure = _heat_map(held["seconds"], held["share"], of="data group", bar=_PAGES, ends=(1e-6, 1.0))
            title = f"Pages in use of every data group over time{of}"
            page.figure(figure, name=f"groups-over-time-{pool['name']}", title=title)
        if rows is not None:
            figure = _heat_map(rows["seconds"], rows["times_mean"], of=rows["of"], bar=_ROWS, ends=(2.0, 3.0))
            title = f"Rows of every {rows['of']} over their mean, over time{of}"
            page.figure(figure, name=f"rows-over-time-{pool['name']}", title=title)
            page.text("p", _ROWS_NOTE, css="caption")
    return page.document()
