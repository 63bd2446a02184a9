"""What people see of a plan of serving: the screen, and a page with the front of interactivity and throughput.

The same picture shows results of `moesim serve` beside plans (`serving_plot`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

from plotly.graph_objects import Figure
from rich.console import RenderableType
from rich.text import Text

from moesim.errors import UserError, closest
from moesim.report.facts import Fact
from moesim.report.figures import empty_figure
from moesim.report.page import Page
from moesim.report.terminal import Screen, fact_table, heading, indented, number_table, prints, section, warnings
from moesim.strict_json import parse_json
from moesim.units import format_seconds

Load = Mapping[str, Any]
KINDS = {"serving": "deployment", "serving plan": "plan"}  # of a record: what it is
X, Y = "tokens_per_second_per_user", "output_tokens_per_second_per_gpu"
_TITLES = {X: "tokens per second of a user (interactivity)", Y: "output tokens per second of a GPU"}
_COLOURS = ("#2474b5", "#d9822b", "#3a9d5d", "#8a5fb0", "#c0504d", "#7f6b4f", "#2aa0a4", "#b0487f")
_PLOT_HEAD = ("", "GPUs", "good", "TTFT p90", "TPOT p90", "tokens/s/user", "output tokens/s/GPU")


@dataclass(frozen=True)
class Dots:
    """Loads of one colour, each with what stands beside the pointer."""

    name: str
    colour: str
    loads: Sequence[tuple[str, Load]]


def trade_off(
    groups: Sequence[Dots], *, fronts: Sequence[tuple[str, str, Sequence[Load]]] = (), x: str = X, y: str = Y
) -> Figure:
    """Dots by two numbers of their loads, and fronts (name, colour, loads in order) as dotted lines.

    Loads without one of them, as answers of one token have no time per token, are left out. Raises UserError for a
    number that no load has.
    """
    figure = empty_figure(height=460, x=_TITLES.get(x, x), y=_TITLES.get(y, y))
    every = [load for group in groups for _, load in group.loads]
    for key in (x, y):
        if every and not any(load.get(key, "") is None for load in every):
            number(every[0], key)
    for group in groups:
        shown = [(words, load) for words, load in group.loads if {x, y} <= numbers_of(load).keys()]
        figure.add_scatter(
            x=[number(load, x) for _, load in shown],
            y=[number(load, y) for _, load in shown],
            text=[words for words, _ in shown],
            mode="markers", name=group.name, marker={"color": group.colour, "size": 8},
        )  # fmt: skip
    for name, colour, loads in fronts:
        figure.add_scatter(
            x=[number(load, x) for load in loads], y=[number(load, y) for load in loads],
            mode="lines", name=name, line={"color": colour, "width": 1.2, "dash": "dot"}, hoverinfo="skip",
        )  # fmt: skip
    figure.update_xaxes(rangemode="tozero")
    figure.update_yaxes(rangemode="tozero")
    return figure.update_layout(showlegend=True)


def number(load: Load, key: str) -> float:
    """A number of a load by its dotted key. Raises UserError, with the nearest, for a key that is none."""
    known = numbers_of(load)
    if key not in known:
        raise UserError(f"{key}: no number of these loads{closest(key, known) or '; known: ' + ', '.join(known)}")
    return known[key]


def numbers_of(load: Load) -> dict[str, float]:
    """Every number of a load, one level down too, by its dotted key."""
    found = {}
    for key, value in load.items():
        inner = value.items() if isinstance(value, Mapping) else ((None, value),)
        for name, each in inner:
            if isinstance(each, int | float) and not isinstance(each, bool):
                found[key if name is None else f"{key}.{name}"] = float(each)
    return found


def serving_record(path: Path) -> dict[str, Any] | None:
    """What `moesim serve` or a plan of serving left in a file, or in a folder; None where there is nothing of them.

    Raises UserError for a record of theirs without a result.
    """
    places = [path / "plan.json", path / "serve.json"] if path.is_dir() else [path] if path.suffix == ".json" else []
    for place in places:
        if not place.is_file():
            continue
        try:
            found = parse_json(place.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError):
            continue
        if isinstance(found, dict) and isinstance(found.get("kind"), str) and found["kind"] in KINDS:
            if not isinstance(found.get("name"), str):
                raise UserError(f"{place}: {found['kind']} without a name; let `moesim` write it anew")
            if found["kind"] == "serving plan" and found.get("status") != "done":
                raise UserError(f"{place}: no finished plan; {found.get('reason') or 'let `moesim plan` end first'}")
            return found
    return None


def serving_plot(paths: Sequence[Path], *, x: str | None = None, y: str | None = None) -> str | None:
    """The HTML document on deployments and plans of serving; None where no path is of them.

    Raises UserError where only some are, and for numbers that they lack.
    """
    records = [serving_record(path) for path in paths]
    if not any(records):
        return None
    for path, record in zip(paths, records, strict=True):
        if record is None:
            raise UserError(f"{path}: not of serving, as others are; plot them apart")
    groups, fronts, rows = [], [], []
    names = _names([str(record["name"]) for record in records if record], paths)
    for index, (name, record) in enumerate(zip(names, records, strict=True)):
        assert record is not None
        colour = _COLOURS[index % len(_COLOURS)]
        loads = record["loads"] if record["kind"] == "serving plan" else [record | {"words": "as simulated"}]
        groups.append(Dots(name, colour, [(f"{name}: {_words(load)}", load) for load in loads]))
        if record["kind"] == "serving plan" and x is None and y is None:
            front = [loads[place] for place in record["front"]]
            fronts.append((f"front of {name}", colour, front))
            loads = front
        rows += [_plot_row(f"{name}: {_words(load)}" if len(loads) > 1 else name, load) for load in loads]
    what = [KINDS[str(record["kind"])] for record in records if record]
    kinds = dict.fromkeys(what)
    counts = " and ".join(f"{what.count(kind)} {kind}{'s' if what.count(kind) > 1 else ''}" for kind in kinds)
    about = f"{counts} of serving; of plans every simulated load is a point, their fronts are rows below."
    page = Page(" and ".join(names), about)
    page.figure(trade_off(groups, fronts=fronts, x=x or X, y=y or Y), name="figure-0", tools=True)
    page.table(_PLOT_HEAD, rows)
    return page.document()


def _names(names: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Names of records, with where they lie where several are alike."""
    return [
        name if names.count(name) == 1 else f"{name} ({path.stem if path.suffix else path.name})"
        for name, path in zip(names, paths, strict=True)
    ]


def _words(load: Load) -> str:
    return f"{load['words']}{', the alternative' if load.get('is_alternative') else ''}"


def _plot_row(name: str, load: Load) -> tuple[str, ...]:
    return (
        name,
        f"{load['gpus']}",
        f"{load['good_share']:.1%}",
        format_seconds(load["ttft_s"]["p90"]),
        format_seconds(load["tpot_s"]["p90"]),
        "" if load[X] is None else f"{load[X]:,.1f}",
        f"{load[Y]:,.1f}",
    )


Plan = Mapping[str, Any]

_HEAD = ("", "instances", "GPUs", "USD/h", "$/M output", "good", "TTFT p90", "TPOT p90", "tokens/s/user", "imbalance")
_BLUE = "#2474b5"
_ROWS = 15
_MISSED = 8


def _row(number: str, shown: Plan) -> tuple[str, ...]:
    imbalance, rate = shown["rank_rows_imbalance"], shown["tokens_per_second_per_user"]
    return (
        number,
        f"{shown['units']} x {shown['words']}",
        f"{shown['gpus']}",
        f"{shown['usd_per_hour']:,.2f}",
        f"{shown['usd_per_million_output_tokens']:.4g}",
        f"{shown['good_share']:.1%}",
        format_seconds(shown["ttft_s"]["p90"]),
        format_seconds(shown["tpot_s"]["p90"]),
        "" if rate is None else f"{rate:,.0f}",
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


_NARROW = itemgetter(0, 1, 2, 3, 4, 6, 7)  # columns that a screen has room for


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


@prints
def print_serving_plan(plan: Plan) -> Screen:
    """One plan, the content of plan.json."""
    rows = [_NARROW(row) for row in _rows(plan)]
    content: list[RenderableType] = [
        heading(plan["name"], "plan of serving"),
        indented(fact_table(_facts(plan), strong=True)),
        section("what carries the load", number_table(_NARROW(_HEAD), rows, words=2, wrapped=1, marked=0)),
        *(indented(Text(note, style="dim")) for note in _notes(plan)),
        *warnings(plan["warnings"]),
        section("front of interactivity and throughput", number_table(_FRONT_HEAD, _front(plan)[:_ROWS])),
    ]
    if plan["missed"]:
        rows = [Fact(each["words"], "", each["reason"]) for each in plan["missed"][:_MISSED]]
        content.append(section(f"what does not ({len(plan['missed'])})", fact_table(rows)))
    return content


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
    page = Page(plan["name"], warnings=plan["warnings"], of="plan of serving")
    page.facts("Goal", _facts(plan))
    page.heading("What carries the load")
    page.table(_HEAD, _rows(plan), styles=("", "", *("number",) * (len(_HEAD) - 2)))
    for note in _notes(plan):
        page.text("p", note)
    page.figure(_figure(plan), name="front", title="Interactivity and throughput")
    page.table(_FRONT_HEAD, _front(plan), styles=("", "number", "number", ""))
    if plan["missed"]:
        page.heading("What does not carry it")
        page.table(("instances", "why"), [(each["words"], each["reason"]) for each in plan["missed"]], styles=("", ""))
    return page.document()
