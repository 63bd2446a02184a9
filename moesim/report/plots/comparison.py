"""Two runs beside each other: what differs in their scenarios, metric by metric, and where the time went."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import plotly.graph_objects as go

from moesim.errors import UserError
from moesim.report import facts
from moesim.report.categories import FAMILIES, Category, category, in_order
from moesim.report.figures import empty_figure, steps, time_unit
from moesim.report.page import Page
from moesim.report.plots.groups import range_of, same_kernels
from moesim.report.plots.metrics import MISSING, flatten, metric, paths_of, plain, text, text_of
from moesim.report.plots.sources import Point, Source

_SMALL = 0.003  # share of the step below which a change joins "smaller changes"
_TILES = 6
_SHOWN = (
    "step_time_s",
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "mfu.causal",
    "mfu.causal_of_bf16_peak",
    "cost.usd_per_million_tokens",
    "cost.usd_total",
    "cost.days",
    "memory.peak_bytes",
    "imbalance.cost_s",
    "imbalance.expert",
    "imbalance.rank_rows",
    "imbalance.rank_bytes",
    "dropped_share",
    "effective.mfu_causal",
    "effective.usd_per_million_tokens",
    "communication.copies_per_token",
    "communication.dispatch_bytes",
    "communication.intra_node_bytes",
    "communication.inter_node_bytes",
    "router.validation_loss",
    "gpus",
)


@dataclass(frozen=True)
class Side:
    """One of the two: what it is called, its dotted settings and its result."""

    name: str
    settings: Mapping[str, Any]
    result: Mapping[str, Any]

    @property
    def attribution_s(self) -> Mapping[str, float]:
        """Seconds by category."""
        parts: Mapping[str, float] = self.result["attribution_s"]
        return parts


def sides(sources: Sequence[Source], numbers: tuple[int, int] | None) -> tuple[Side, Side]:
    """The two runs, or the points of those numbers in one sweep or plan. Raises UserError where there are not two."""
    if numbers is None:
        points = [point for source in sources for point in source.points]
        if len(points) != 2:
            raise UserError(f"comparison: needs two runs, not {len(points)}; name two, or --points 3,7 of one sweep")
        chosen = points
    else:
        if len(sources) != 1 or sources[0].kind == "run":
            raise UserError("--points: needs one folder of a sweep or plan")
        chosen = [_numbered(sources[0], number) for number in numbers]
    first, second = (_side(point) for point in chosen)
    if first.name == second.name:
        raise UserError(f"comparison: both sides are {first.name}")
    return first, second


def _numbered(source: Source, number: int) -> Point:
    for point in source.points:
        if point.number == number:
            return point
    known = ", ".join(str(point.number) for point in source.points[:12])
    raise UserError(f"--points: {source.folder} has no point {number}; there are {known}")


def _side(point: Point) -> Side:
    if point.result is None:
        raise UserError(f"comparison: point {point.number} has no result ({point.status}: {point.reason})")
    if "attribution_s" not in point.result:
        raise UserError(f"comparison: the result of {point.folder} has no attribution_s")
    name = point.folder if point.scenario is not None else f"point {point.number}"
    return Side(name, point.scenario if point.scenario is not None else flatten(dict(point.values)), point.result)


def differences(first: Side, second: Side) -> list[tuple[str, str, str]]:
    """(dotted key, value of the first, value of the second) of every setting that differs.

    Keys that one side lacks because they belong to another `kind` are shown with a dash.
    """
    keys = dict.fromkeys([*first.settings, *second.settings])
    both = [(key, first.settings.get(key, MISSING), second.settings.get(key, MISSING)) for key in keys]
    return [(key, text_of(one), text_of(other)) for key, one, other in both if one != other]


def changes(first: Side, second: Side) -> list[tuple[Category | None, float]]:
    """(category, seconds of the second minus the first) in the order of categories; None sums up the small ones.

    The sum is the difference of the attributed times, to rounding.
    """
    keys = dict.fromkeys([*first.attribution_s, *second.attribution_s])
    moved = {key: second.attribution_s.get(key, 0.0) - first.attribution_s.get(key, 0.0) for key in keys}
    least = _SMALL * first.result["step_time_s"]
    order = [part for part, _ in in_order(dict.fromkeys(keys, 1.0))]
    large: list[tuple[Category | None, float]] = [
        (part, moved[part.key]) for part in order if abs(moved[part.key]) >= least
    ]
    rest = sum(value for value in moved.values() if abs(value) < least)
    return [*large, (None, rest)] if abs(rest) > facts.ROUND_OFF * first.result["step_time_s"] else large


def waterfall(first: Side, second: Side) -> go.Figure:
    """From the step of the first run to that of the second, category by category."""
    begin, end = (sum(side.attribution_s.values()) for side in (first, second))
    scale, unit = time_unit(max(begin, end))
    parts = changes(first, second)
    return cascade(
        (plain(first.name), scale * begin),
        [(part.label if part else "smaller changes", scale * value) for part, value in parts],
        (plain(second.name), scale * end),
        title=f"{unit} of one step",
        amount=lambda value: f"{value:.4g} {'s' if unit == 'seconds' else 'ms'}",
    )


def cascade(
    begin: tuple[str, float],
    parts: Sequence[tuple[str, float]],
    end: tuple[str, float],
    *,
    title: str,
    amount: Callable[[float], str],
) -> go.Figure:
    """Bars from one total to another, a step for each part; `amount` writes the totals."""
    figure = empty_figure(height=150 + 30 * (len(parts) + 2), x=title)
    moved = [value for _, value in parts]
    levels = list(accumulate(moved, initial=begin[1]))
    low, high = min(*levels, end[1]), max(*levels, end[1])
    pad = 0.25 * (high - low) or 0.05 * high
    floor = 0.0 if low - pad < 0.6 * high else low - pad
    figure.add_waterfall(
        y=[begin[0], *(name for name, _ in parts), end[0]],
        x=[begin[1], *moved, end[1]],
        measure=["absolute", *["relative"] * len(moved), "total"],
        orientation="h",
        text=[amount(begin[1]), *(_signed(value) for value in moved), amount(end[1])],
        textposition="outside",
        cliponaxis=False,
        connector={"line": {"color": "#a3aab4", "width": 1, "dash": "dot"}},
        increasing={"marker": {"color": FAMILIES["communication"]}},
        decreasing={"marker": {"color": FAMILIES["compute"]}},
        totals={"marker": {"color": FAMILIES["overhead"]}},
        hovertemplate="%{y}: %{text}<extra></extra>",
        showlegend=False,
    )
    figure.update_yaxes(autorange="reversed", showgrid=False, tickfont={"size": 14})
    figure.update_xaxes(range=[floor, high + pad + 0.04 * (high - floor)])
    return figure


def _signed(value: float) -> str:
    """Three digits, all of a large number, and always a sign."""
    return f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+.3g}"


def metric_rows(first: Side, second: Side, paths: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """(label, first, second, change in per cent) of every metric that either side has."""
    rows = []
    for path in paths:
        found = metric(path)
        one, other = found.of(first.result), found.of(second.result)
        if one is None and other is None:
            continue
        rows.append((found.label, text(found, one), text(found, other), _change(one, other)))
    return rows


def _change(one: float | None, other: float | None) -> str:
    if one is None or other is None or (one == 0 and other != 0):
        return MISSING
    share = (other - one) / one if one else 0.0
    return f"{100 * share:+.1f} %" if abs(share) > facts.ROUND_OFF else "none"


def verdict(first: Side, second: Side) -> str:
    """One sentence: how much faster or slower, and whether the ranges can tell."""
    one, other = first.result["step_time_s"], second.result["step_time_s"]
    share = other / one - 1
    word = "longer" if share > 0 else "shorter"
    said = f"The step of {second.name} takes {facts.seconds(other)}, {abs(100 * share):.1f} % {word} than {first.name}."
    if abs(share) <= facts.ROUND_OFF:
        said = f"Both steps take {facts.seconds(one)}."
    alike = same_kernels(first.result, second.result)
    ranges = [found for side in (first, second) if (found := range_of(side.result, alone=alike)) is not None]
    if len(ranges) < 2:
        return said + " One of them has no 90 % range, so chance cannot be told from difference."
    whose = "of the routing" if alike else "of routing and kernels"
    if ranges[0][0] <= ranges[1][1] and ranges[1][0] <= ranges[0][1]:
        chance = "chance of routing" if alike else "chance of routing or an error of either GPU's kernels"
        return said + f" Their 90 % ranges {whose} overlap: the difference may be {chance}."
    return said + f" Their 90 % ranges {whose} do not overlap."


def add_comparison(page: Page, first: Side, second: Side) -> None:
    """All sections on two runs."""
    same_peak = first.result["mfu"].get("peak") == second.result["mfu"].get("peak")
    headline = [path for path in _SHOWN if not (same_peak and path == "mfu.causal_of_bf16_peak")]
    tiles = [
        (label, other, "the same in both") if change == "none" else (label, f"{one} → {other}", change)
        for label, one, other, change in metric_rows(first, second, headline[:_TILES])
    ]
    page.tiles(tiles, css="pair")
    _add_scenario(page, first, second)
    _add_time(page, first, second)
    page.heading("Metric by metric")
    head = ("", first.name, second.name, "change")
    page.table(head, metric_rows(first, second, _SHOWN))
    with page.details("All numbers of both results"):
        every = paths_of([first.result, second.result])
        page.table(head, [(path, *row[1:]) for path in every for row in metric_rows(first, second, [path])])


def _add_scenario(page: Page, first: Side, second: Side) -> None:
    page.heading("What differs in the scenario")
    rows = differences(first, second)
    if not rows:
        page.text("p", "Nothing: both ran the same settings.")
        return
    if any(key.startswith("model.") for key, _, _ in rows):
        page.text("p", "The models differ: tokens of the one are not tokens of the other.", css="warning")
    page.table(("key", first.name, second.name), rows, styles=("", "", ""))


def _add_time(page: Page, first: Side, second: Side) -> None:
    page.heading(
        "Where the time went",
        "Mean over ranks of one optimizer step; communication counts only where no computation hides it.",
    )
    page.figure(steps(((plain(first.name), first.attribution_s), (plain(second.name), second.attribution_s))),
                name="attribution", tools=True)  # fmt: skip
    keys = dict.fromkeys([*first.attribution_s, *second.attribution_s])
    pairs = {key: [side.attribution_s.get(key, 0.0) for side in (first, second)] for key in keys}
    order = sorted(keys, key=lambda key: -max(pairs[key]))
    longest = max(max(pair) for pair in pairs.values())
    step_s = first.result["step_time_s"]
    rows = []
    for key in order:
        one, other = pairs[key]
        if max(one, other) > facts.ROUND_OFF * step_s:
            part = category(key)
            numbers = (facts.seconds(one), facts.seconds(other), _difference(other - one, step_s))
            rows.append((part.colour, part.label, numbers, other / longest))
    page.bars(rows, head=("part", first.name, second.name, "difference", second.name))
    page.heading(
        "What made the difference", "Orange adds time, blue saves it. The axis need not begin at zero.", level=3
    )
    page.figure(waterfall(first, second), name="waterfall", tools=True)


def _difference(change_s: float, step_s: float) -> str:
    if abs(change_s) <= facts.ROUND_OFF * step_s:
        return "none"
    return ("+" if change_s > 0 else "-") + facts.seconds(abs(change_s))
