"""What people see of a plan of serving: the screen, and a page with the front of interactivity and throughput."""

from collections.abc import Mapping
from typing import Any, TextIO

from plotly.graph_objects import Figure
from plotly.offline import get_plotlyjs
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moesim.report.facts import Fact
from moesim.report.page import Page
from moesim.report.screen import fact_table, indented, number_table, section, show, warnings
from moesim.report.serving_trade_off import Dots, trade_off
from moesim.units import format_seconds

Plan = Mapping[str, Any]

_HEAD = ("", "instances", "GPUs", "USD/h", "$/M output", "good", "TTFT p90", "TPOT p90", "tokens/s/user", "imbalance")
_BLUE = "#2474b5"
_ROWS = 15
_MISSED = 8


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _row(number: str, shown: Plan) -> tuple[str, ...]:
    imbalance = shown["rank_rows_imbalance"]
    return (
        number,
        f"{shown['units']} x {shown['words']}",
        f"{shown['gpus']}",
        f"{shown['usd_per_hour']:,.2f}",
        f"{shown['usd_per_million_output_tokens']:.4g}",
        f"{shown['good_share']:.1%}",
        format_seconds(shown["ttft_s"]["p90"]),
        format_seconds(shown["tpot_s"]["p90"]),
        _number(shown["tokens_per_second_per_user"], 0),
        "" if imbalance is None else f"{imbalance:.3f}x",
    )


def _rows(plan: Plan) -> list[tuple[str, ...]]:
    rows = [
        _row(f"{rank}{'' if shown['whole'] else '~'}", shown)
        for rank, shown in enumerate(plan["ranking"][:_ROWS], start=1)
    ]
    other = plan["alternative"]
    if other is not None and other["best"] is not None:
        words = f"{other['best']['words']}; {other['model']}"
        rows.append(_row("other", {**other["best"], "words": words}))
    return rows


_NARROW = (0, 1, 2, 3, 4, 6, 7)  # columns that a screen has room for


def _table(plan: Plan) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for column in _NARROW:
        table.add_column(justify="left" if column < 2 else "right", no_wrap=column != 1)
    for number, row in enumerate([_HEAD, *_rows(plan)]):
        style = "dim" if number == 0 else "bold" if number == 1 else ""
        table.add_row(*(Text(row[column], style=style) for column in _NARROW))
    return table


def _facts(plan: Plan) -> list[Fact]:
    slo = plan["slo"]
    limits = [f"{name} {format_seconds(slo[name])}" for name in ("ttft", "tpot") if slo.get(name) is not None]
    what = {"usd": "least USD per hour", "gpus": "fewest GPUs"}[plan["best"]]
    offers = ", ".join(f"{each['at_most']} {each['gpu']} at ${each['usd_per_gpu_hour']:g}/h" for each in plan["offers"])
    return [
        Fact("goal", what, f"{slo['share']:.0%} of {plan['requests']:,} requests within {' and '.join(limits)}"),
        Fact("on offer", f"{len(plan['offers'])} kinds", offers),
        Fact("combinations", f"{plan['combinations']:,}", f"{plan['simulations']:,} simulations"),
        Fact("meet the goal", f"{len(plan['ranking'])}", "of the model itself"),
    ]


def _notes(plan: Plan) -> list[str]:
    notes = [
        "~ simulated as one unit with its share of the requests; the others as whole fleets behind one router",
        "ep: ranks that share experts, dp: data groups, tp: tensor ranks, pp: stages of an instance",
        "$/M output: rent over the output tokens that the load asks for",
    ]
    other = plan["alternative"]
    if other is not None:
        found = "" if other["best"] is not None else "; none of its combinations meets the goal"
        notes.append(f"other: the alternative, by its cost only, not by how well it answers: {other['source']}{found}")
    return notes


def _front(plan: Plan) -> list[tuple[str, ...]]:
    loads = [plan["loads"][place] for place in plan["front"]]
    return [
        (
            load["words"],
            f"{load['tokens_per_second_per_user']:,.1f}",
            f"{load['output_tokens_per_second_per_gpu']:,.1f}",
            "yes" if load["meets"] else "no",
        )
        for load in loads
    ]


_FRONT_HEAD = ("instances", "tokens/s/user", "output tokens/s/GPU", "within limits")


def print_serving_plan(plan: Plan, *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print one plan, the content of plan.json."""
    content: list[RenderableType] = [
        Text.assemble((plan["name"], "bold"), ("  plan of serving", "dim")),
        indented(fact_table(_facts(plan), strong=True)),
        section("what carries the load", _table(plan)),
        *(indented(Text(note, style="dim")) for note in _notes(plan)),
        *warnings(plan["warnings"]),
        section("front of interactivity and throughput", number_table(_FRONT_HEAD, _front(plan)[:_ROWS])),
    ]
    if plan["missed"]:
        rows = [Fact(each["words"], "", each["reason"]) for each in plan["missed"][:_MISSED]]
        content.append(section(f"what does not ({len(plan['missed'])})", fact_table(rows)))
    show(lambda _: content, file=file, width=width)


def _kind_of(load: Plan) -> str:
    if load["is_alternative"]:
        return "alternative"
    return "within the limits" if load["meets"] else "beyond the limits"


_KINDS = {"within the limits": _BLUE, "beyond the limits": "#b9c4cc", "alternative": "#d9822b"}


def _figure(plan: Plan) -> Figure:
    """Every simulated load: tokens per second of a user across, of a GPU upwards; the front as a line."""
    groups = [
        Dots(name, colour, [(load["words"], load) for load in plan["loads"] if _kind_of(load) == name])
        for name, colour in _KINDS.items()
    ]
    front = [plan["loads"][place] for place in plan["front"]]
    return trade_off([each for each in groups if each.loads], fronts=[("front", _BLUE, front)])


def serving_plan_page(plan: Plan) -> str:
    """The plan as one HTML document without network."""
    page = Page()
    page.text("h1", plan["name"])
    for warning in plan["warnings"]:
        page.text("p", warning, css="warning")
    page.facts("Goal", _facts(plan))
    page.text("h2", "What carries the load")
    page.table(_HEAD, _rows(plan), styles=("", "", *("number",) * (len(_HEAD) - 2)))
    for note in _notes(plan):
        page.text("p", note)
    page.figure(_figure(plan), name="front", title="Interactivity and throughput")
    page.table(_FRONT_HEAD, _front(plan), styles=("", "number", "number", ""))
    if plan["missed"]:
        page.text("h2", "What does not carry it")
        page.table(("instances", "why"), [(each["words"], each["reason"]) for each in plan["missed"]], styles=("", ""))
    return page.document(title=f"{plan['name']} - plan of serving", script=get_plotlyjs())
