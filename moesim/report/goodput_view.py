"""What people see of days of training: a screen, and a page with goodput over time, by cause and by interval."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from rich.console import RenderableType

from moesim.engine.job import SECONDS_PER_DAY, Ledger
from moesim.reliability import Goodput
from moesim.report.facts import Fact, percent
from moesim.report.figures import empty_figure
from moesim.report.page import Page
from moesim.report.terminal import Screen, fact_table, heading, indented, number_table, prints, section, warnings
from moesim.units import format_bytes, format_seconds

Result = Mapping[str, Any]

TIME_PARTS = {
    "useful": "kept work",
    "slowed": "kept work, slower than alone",
    "checkpoint": "standing for checkpoints",
    "lost": "work lost by failures",
    "detection": "until a failure is found",
    "restart": "starting again, reading",
    "repair": "waiting for repair",
}
_COLOURS = {"lost": "#b3256b", "detection": "#e07b1a", "restart": "#2474b5", "repair": "#7a828e"}
_BLUE, _RED, _SOFT = "#2474b5", "#b3256b", "#7a828e"
_MOST_SEEDS_DRAWN = 20
_MOST_CAUSES = 12  # of the screen


def duration(seconds: float) -> str:
    """Seconds in the largest unit of everyday that fits: `2.1 min`, `3.08 h`, `5.2 days`."""
    for size, name in ((SECONDS_PER_DAY, "days"), (3600.0, "h"), (60.0, "min")):
        if seconds >= size:
            return f"{seconds / size:,.3g} {name}" if seconds < 1000 * size else f"{seconds / size:,.0f} {name}"
    return format_seconds(seconds, digits=3)


def goodput_facts(result: Result) -> list[Fact]:
    """The headline."""
    spread = result["goodput_range"]
    between = result["mean_time_between_failures_s"]
    shown = f"90 % range {percent(spread[0])} to {percent(spread[1])} over {result['seeds']} seeds; " if spread else ""
    often = f"one in {duration(between)}" if between else "none"
    facts = [
        Fact("goodput", percent(result["goodput"]), f"{shown}work that was kept, of all time"),
        Fact("failures", f"{result['failures']:,.0f}", f"{often}; on {result['days_with_failures']:,.1f} days"),
        Fact("tokens per day", f"{result['tokens_per_day']:.4g}", "useful ones"),
        Fact(
            "price",
            f"${result['usd_per_million_useful_tokens']:.4g} / M tokens",
            f"useful ones, spares paid; ${result['usd_per_million_tokens_without_failures']:.4g} by the step alone",
        ),
    ]
    if result["days_total"] is not None:
        facts.append(
            Fact("whole training", f"{result['days_total']:,.1f} days", f"${result['usd_total']:,.0f} with failures")
        )
    facts += [*_checkpoint_facts(result["checkpoint"]), Fact("rests on", "", "; ".join(result["rests_on"]))]
    return facts


def _checkpoint_facts(checkpoint: Mapping[str, Any]) -> list[Fact]:
    how = "copied, then written beside work" if checkpoint["asynchronous"] else "written while the job stands"
    stand = f"stands {duration(checkpoint['blocking_s'])}, written in {duration(checkpoint['write_s'])}"
    facts = [
        Fact("checkpoint", format_bytes(checkpoint["bytes"]), f"{how}; {stand}"),
        Fact("interval", duration(checkpoint["interval_s"]), f"of work, {checkpoint['interval_steps']:,} steps"),
    ]
    if checkpoint["best_s"] is not None:
        formulas = [f"{name.capitalize()} {duration(checkpoint[f'{name}_s'])}" for name in ("young", "daly")
                    if checkpoint[f"{name}_s"] is not None]  # fmt: skip
        note = "by simulation" + (f"; {', '.join(formulas)}" if formulas else "")
        facts.append(Fact("best interval", duration(checkpoint["best_s"]), note))
    return facts


def _time_rows(result: Result) -> list[tuple[str, ...]]:
    total = sum(result["time_s"].values())
    spent = {name: seconds for name, seconds in result["time_s"].items() if seconds > 0}
    return [(TIME_PARTS[name], duration(seconds), f"{seconds / total:.2%}") for name, seconds in spent.items()]


_CAUSE_HEAD = ("", "failures", "work lost", "found", "restart", "repair", "all")


def _cause_rows(result: Result) -> list[tuple[str, ...]]:
    keys = ("lost_s", "detection_s", "restart_s", "repair_s", "all_s")
    return [(row["cause"], f"{row['failures']:,.1f}", *(duration(row[key]) for key in keys))
            for row in result["causes"] if row["all_s"] > 0]  # fmt: skip


@prints
def print_goodput(result: Result) -> Screen:
    """The answers in one screen."""
    about = f"{result['days']:g} days on {result['gpus']:,} GPUs, step {format_seconds(result['step_time_s'])}"
    content: list[RenderableType] = [
        heading(result["name"], about),
        indented(fact_table(goodput_facts(result), strong=True)),
        section("where the time goes", number_table(("", "in all", "share"), _time_rows(result))),
    ]
    rows = _cause_rows(result)
    if rows:
        some = "" if len(rows) <= _MOST_CAUSES else f", {_MOST_CAUSES} of {len(rows)}"
        content.append(section(f"time by cause{some}", number_table(_CAUSE_HEAD, rows[:_MOST_CAUSES])))
    return content + warnings(result["warnings"])


def goodput_page(found: Goodput) -> str:
    """One HTML document without network."""
    result = found.result
    page = Page(
        str(result["name"]),
        f"{result['days']:g} days of training on {result['gpus']:,} GPUs, "
        f"{format_seconds(result['step_time_s'])} a step, {result['seeds']} draws of failures.",
        warnings=result["warnings"],
        of="goodput",
    )
    page.facts("Answers", goodput_facts(result))
    page.heading(
        "Goodput over time",
        "Share of the time so far that went into work that was kept. Bold: the first draw; thin: others.",
    )
    page.figure(over_time(found), name="over-time")
    page.heading("Where the time goes")
    page.table(("", "in all", "share"), _time_rows(result))
    if _cause_rows(result):
        page.heading("Lost time by cause")
        page.figure(by_cause(result), name="by-cause")
        page.table(_CAUSE_HEAD, _cause_rows(result))
    if result["checkpoint"]["searched"]:
        page.heading(
            "Goodput by time between checkpoints",
            "Every point is simulated with the same failures; the best interval is that of a fit through "
            "the points near it.",
        )
        page.figure(by_interval(result), name="by-interval")
    return page.document()


def _so_far(ledger: Ledger, days: float) -> tuple[list[float], list[float]]:
    """(day, useful share until then), from 1 % of the time on: before that the share says nothing."""
    points = np.array(ledger.kept)
    grid = np.linspace(0.01, 1, 400) * days * SECONDS_PER_DAY
    kept = np.interp(grid, points[:, 0], points[:, 1])
    return (grid / SECONDS_PER_DAY).tolist(), (kept / grid).tolist()


def over_time(found: Goodput) -> go.Figure:
    """Useful share of the time so far, a line per draw."""
    figure = empty_figure(height=360, x="day", y="goodput so far")
    lines = [_so_far(ledger, found.result["days"]) for ledger in found.ledgers[:_MOST_SEEDS_DRAWN]]
    for number in reversed(range(len(lines))):
        x, y = lines[number]
        look = {"color": _BLUE, "width": 2.5} if number == 0 else {"color": _SOFT, "width": 0.7}
        figure.add_scatter(x=x, y=y, mode="lines", line=look, opacity=1.0 if number == 0 else 0.6,
                           hovertemplate="day %{x:.1f}: %{y:.2%}<extra></extra>")  # fmt: skip
    figure.update_layout(showlegend=False)
    room = max(1 - min(min(shares) for _, shares in lines), 1e-3)  # also where nothing fails: one straight line
    figure.update_yaxes(tickformat=".1%" if room > 0.01 else ".2%", range=[1 - 1.1 * room, 1 + 0.05 * room])
    return figure


def by_cause(result: Result) -> go.Figure:
    """Hours by cause, stacked by what they went into."""
    rows = [row for row in reversed(result["causes"]) if row["all_s"] > 0]
    figure = empty_figure(height=130 + 26 * len(rows), x="hours", y="")
    for name, colour in _COLOURS.items():
        hours = [row[f"{name}_s"] / 3600 for row in rows]
        if any(hours):
            figure.add_bar(y=[row["cause"] for row in rows], x=hours, orientation="h", name=TIME_PARTS[name],
                           marker={"color": colour},
                           hovertemplate="%{y}: %{x:.2f} h<extra>" + TIME_PARTS[name] + "</extra>")  # fmt: skip
    figure.update_layout(barmode="stack", showlegend=True, legend={"traceorder": "normal"})
    figure.update_yaxes(showgrid=False)
    return figure


def by_interval(result: Result) -> go.Figure:
    """Goodput of every simulated interval, the best one and those of the formulas marked."""
    checkpoint = result["checkpoint"]
    figure = empty_figure(height=380, x="minutes of work between checkpoints", y="goodput")
    figure.add_scatter(
        x=[point["interval_s"] / 60 for point in checkpoint["searched"]],
        y=[point["goodput"] for point in checkpoint["searched"]],
        mode="lines+markers", name="simulated", line={"color": _BLUE, "width": 2},
        hovertemplate="%{x:.3g} min: %{y:.2%}<extra></extra>",
    )  # fmt: skip
    low = min(point["goodput"] for point in checkpoint["searched"])
    high = max(point["goodput"] for point in checkpoint["searched"])
    marks = (("best_s", "best, simulated", _RED, "solid"), ("young_s", "Young", _SOFT, "dash"),
             ("daly_s", "Daly", _SOFT, "dot"))  # fmt: skip
    for key, name, colour, dash in marks:
        if checkpoint[key] is not None:
            at = checkpoint[key] / 60
            label = f"{name}: {duration(checkpoint[key])}"
            figure.add_scatter(x=[at, at], y=[low, high], mode="lines", name=label,
                               line={"color": colour, "width": 2, "dash": dash}, hoverinfo="name")  # fmt: skip
    figure.update_layout(showlegend=True)
    figure.update_xaxes(type="log", dtick="D2")
    figure.update_yaxes(tickformat=".1%")
    return figure
