"""The page of `moesim plot`: a figure with its filters, what has no result, and every point as a row.

A plan adds why the winner wins, what would alter the choice, and what was discarded before.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.report import facts
from moesim.report.categories import category
from moesim.report.page import Page
from moesim.report.plan_view import named, verdict_on_change
from moesim.report.plots.comparison import add_comparison, cascade, sides, verdict
from moesim.report.plots.curves import along_axis, curves, heat_axes, heat_map, point_marks
from moesim.report.plots.drawing import (
    COMPARISON,
    COST_PERFORMANCE,
    CURVES,
    HEAT_MAP,
    AxisKey,
    Drawing,
    PlotRequest,
    choose,
    kind_of,
)
from moesim.report.plots.groups import Axis, Collection, Group, collect
from moesim.report.plots.looks import label_of
from moesim.report.plots.metrics import HEADLINE, LOWER, MISSING, Metric, metric, plain, text
from moesim.report.plots.scatter import cost_performance, dots, drawn_groups, has_front, suits_dots
from moesim.report.plots.sources import DONE, PRESET, Source, read_sources, with_values

Plan = Mapping[str, Any]

_OPPONENTS = {"runner_up": "Why it wins: against the runner-up", "best_with_other_gpus": "Against the best other GPUs"}
_SMALL = 0.02  # share of the largest part below which parts are summed up
_ROUNDING = 1e-9  # share of that below which their sum is none


def add_plan(page: Page, plan: Plan) -> None:
    """The sections of one plan.json; what a plan does not hold is left out."""
    for key, title in _OPPONENTS.items():
        found = plan.get("why", {}).get(key)
        if found:
            _add_opponent(page, plan, title, found, name=key.replace("_", "-"))
    _add_sensitivity(page, plan)
    _add_discarded(page, plan)
    _add_flags(page, plan)


def _add_opponent(page: Page, plan: Plan, title: str, found: Mapping[str, Any], *, name: str) -> None:
    """The cost of the goal, from the winner to another layout, part by part."""
    winner, other = plan["why"]["winner"], found["other"]
    usd = [plan["outcomes"][identity]["usd"] for identity in (winner, other)]
    names = [named(plan["outcomes"][identity]) for identity in (winner, other)]
    page.heading(
        title,
        f"The winner, {names[0]}, costs {facts.dollars(usd[0])} for the goal; the other, {names[1]}, "
        f"{facts.dollars(usd[1])}. Orange is what the other spends more, blue what it spends less. "
        "The axis need not begin at zero.",
    )
    parts = _large(found["parts"])
    figure = cascade(
        ("the winner", usd[0]), parts, ("the other", usd[1]), title="USD for the goal", amount=facts.dollars
    )
    page.figure(figure, name=name, tools=True)


def _large(parts: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """(label, USD) of the large parts, and the sum of the others."""
    usd = {part["part"]: part["usd_difference"] for part in parts}
    least = _SMALL * max(map(abs, usd.values()), default=0.0)
    large = [(category(key).label, value) for key, value in usd.items() if abs(value) > least]
    rest = sum(value for value in usd.values() if abs(value) <= least)
    shown = [*large, ("smaller changes", rest)] if abs(rest) > _ROUNDING * least else large
    return [(plain(label), value) for label, value in shown]


def _add_sensitivity(page: Page, plan: Plan) -> None:
    changes = plan.get("sensitivity", {}).get("changes", ())
    if not changes:
        return
    page.heading("What would alter the choice")
    rows = []
    for change in changes:
        best = named(plan["outcomes"][change["winner"]]) if change["changes_winner"] and change["winner"] else ""
        days = "" if change["days"] is None else f"{change['days']:.1f}"
        usd = "" if change["usd"] is None else facts.dollars(change["usd"])
        rows.append((change["change"], verdict_on_change(change), best, usd, days))
    page.table(("change", "", "best then", "USD", "days"), rows, styles=("", "", "note", "number", "number"))
    for flip in plan["sensitivity"].get("price_flips", ()):
        page.text(
            "p",
            f"{flip['gpu']} would win below ${flip['usd_per_gpu_hour']:.2f} per GPU-hour, {flip['price_ratio']:.2f} "
            f"times the price of the winner's GPUs; now it is {flip['price_ratio_now']:.2f} times.",
        )


def _add_flags(page: Page, plan: Plan) -> None:
    """The command lines of the ranked layouts, where the plan was asked for them."""
    outcomes = [plan["outcomes"][identity] for identity in plan.get("ranking", ())]
    told = [outcome for outcome in outcomes if outcome.get("flags")]
    if not told:
        return
    page.heading("The layouts as flags")
    for outcome in told:
        for command in outcome["flags"].values():
            with page.details(f"{named(outcome)}: flags for {command['software']}"):
                page.text("pre", command["command"])
                rows = [(entry["key"], entry["instead"]) for entry in command["unsaid"]]
                page.table(("what these flags cannot say", "instead"), rows, styles=("", "note"))


def _add_discarded(page: Page, plan: Plan) -> None:
    """The funnel from all combinations to those that were simulated, and how well the screen in it estimates."""
    counts = plan.get("counts", {})
    if not counts.get("discarded"):
        return
    page.heading("Discarded before simulation")
    said = (
        f"Of {counts['looked_at']:,} combinations {counts['kept']:,} passed and {counts['simulated']:,} were simulated."
    )
    error = plan.get("screen_error")
    if error:
        said += (
            f" The fast estimate that screened them is {facts.percent(error['median'], digits=2)} off in the median of "
            f"{error['layouts']} layouts drawn at random, {facts.percent(error['worst'], digits=2)} at worst."
        )
    page.text("p", said)
    rows = [(e["stage"], f"{e['count']:,}", e["reason"], e["example"]) for e in counts["discarded"]]
    page.table(("stage", "count", "reason", "example"), rows, styles=("", "number", "", "note"))


_MOST_FILTERS = 12
_MOST_NAMES = 8
_MOST_BOXES = 40  # values of an axis up to which each gets a tick box


def plot_page(paths: Sequence[Path], asked: PlotRequest, *, points: tuple[int, int] | None = None) -> str:
    """The HTML document on the runs, sweeps and plans in `paths`; `points` chooses two of one sweep to compare.

    Raises UserError for what cannot be read, compared or found.
    """
    sources = read_sources(paths)
    runs_alone = all(source.kind == "run" for source in sources)
    if asked.kind == COMPARISON or points is not None or (asked.kind is None and runs_alone and len(sources) == 2):
        return _compared(sources, points)
    if runs_alone and len(sources) == 1:
        raise UserError(f"{paths[0]}: one run alone; name a second one, or open its report.html")
    values = with_values(sources)
    collection = collect(sources, values)
    if kind_of(collection, asked) == COST_PERFORMANCE:
        collection = collect(sources, values, split=True)
    return _drawn(collection, choose(collection, asked))


def _compared(sources: Sequence[Source], points: tuple[int, int] | None) -> str:
    first, second = sides(sources, points)
    warnings = [f"{side.name}: {text}" for side in (first, second) for text in side.result.get("warnings", ())]
    page = Page(f"{first.name} and {second.name}", verdict(first, second), warnings=warnings)
    add_comparison(page, first, second)
    return page.document()


def _drawn(collection: Collection, drawing: Drawing) -> str:
    title = " and ".join(dict.fromkeys(source.name for source in collection.sources))
    page = Page(title, _describe(collection), warnings=_notices(collection, drawing))
    if drawing.kind == COST_PERFORMANCE:
        _add_tiles(page, collection, drawing)
    _add_filters(page, collection, drawing)
    _add_figures(page, collection, drawing)
    if len(collection.sources) == 1 and collection.sources[0].kind == "plan":
        add_plan(page, collection.sources[0].about)
    _add_missing(page, collection)
    sort = _add_table(page, collection, drawing)
    page.data(
        {
            "axes": [axis.name for axis in collection.axes],
            "at": [group.at for group in collection.groups],
            "done": [group.status == DONE for group in collection.groups],
            "sort": sort,
        },
        name="plot-data",
    )
    page.code((Path(__file__).parent / "plot.js").read_text(encoding="utf-8"))
    return page.document()


def _describe(collection: Collection) -> str:
    """What was varied, in one sentence."""
    varied = [f"{axis.name} ({len(axis.values)})" for axis in collection.axes if len(axis.values) > 1]
    more = len(varied) - _MOST_NAMES
    axes = ", ".join(varied[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
    repeats = " and ".join(f"{len(axis.values)} values of {axis.name}" for axis in collection.repeats)
    kinds = Counter(source.kind for source in collection.sources)
    what = " and ".join(f"{count} {kind}s" if count > 1 else f"a {kind}" for kind, count in kinds.items())
    what = what[0].upper() + what[1:]
    said = f"{what}. Varied: {axes}." if axes else f"{what}; nothing was varied."
    return said + (f" Means over {repeats}." if repeats else "")


def _notices(collection: Collection, drawing: Drawing) -> list[str]:
    notices = [notice for source in collection.sources for notice in source.notices]
    counts = Counter(point.status for point in collection.points if point.status != DONE)
    if counts:
        parts = " and ".join(f"{count} {status}" for status, count in counts.items())
        notices.append(
            f"Without a result: {counts.total()} of {len(collection.points)} points ({parts}). The reasons are below."
        )
    if any(PRESET in axis.keys for axis in collection.axes):
        notices.append("These are different models: a token of one is not a token of another.")
    for found in drawing.metrics:
        lacking = sum(group.estimate(found) is None for group in collection.done)
        if lacking:
            notices.append(f"{lacking} of {len(collection.done)} layouts have no {found.path} and are not drawn there.")
    return notices


def _add_tiles(page: Page, collection: Collection, drawing: Drawing) -> None:
    """The two ends of the front, over all points whatever the filters show."""
    eligible = set(collection.eligible)
    groups = [group for group in drawn_groups(collection, drawing.metrics) if group.index in eligible]
    if not groups or not has_front(drawing):
        return
    tiles = []
    for found in reversed(drawing.metrics):
        means = {group.index: e.mean for group in groups if (e := group.estimate(found)) is not None}
        best = (min if found.better == LOWER else max)(means, key=lambda index: means[index])
        tiles.append((f"best {found.label}", text(found, means[best]), _layout(collection.groups[best], collection)))
    page.tiles(tiles)


def _layout(group: Group, collection: Collection) -> str:
    varied = [
        f"{axis.name} {axis.texts[place]}"
        for axis, place in zip(collection.axes, group.at, strict=True)
        if len(axis.values) > 1 and axis.texts[place] != MISSING
    ]
    return ", ".join([label_of(group), *varied[:_MOST_NAMES]]) + (", ..." if len(varied) > _MOST_NAMES else "")


def _add_filters(page: Page, collection: Collection, drawing: Drawing) -> None:
    """Tick boxes for the values of every axis; a choice of one value for axes that a heat map cannot show."""
    one_at_a_time = _chosen_singly(collection, drawing)
    with page.inside("form", css="filters", autocomplete="off"):
        filters = [(index, axis) for index, axis in enumerate(collection.axes) if len(axis.values) > 1]
        for index, axis in filters:
            if axis in one_at_a_time or (index, axis) in filters[:_MOST_FILTERS]:
                single = axis in one_at_a_time or len(axis.values) > _MOST_BOXES
                page.filter(index, axis.name, axis.texts, title=", ".join(axis.keys), single=single)
        with page.inside("div", css="count"):
            page.text("output", "", id="shown")
            page.text("button", "show all", type="button", id="all")


def _chosen_singly(collection: Collection, drawing: Drawing) -> list[Axis]:
    if drawing.kind != HEAT_MAP:
        return []
    shown = [key.axis for key in heat_axes(drawing)]
    return [axis for axis in collection.axes if axis not in shown]


def _add_figures(page: Page, collection: Collection, drawing: Drawing) -> None:
    if drawing.kind == HEAT_MAP:
        for number, variable in enumerate(y for y in drawing.ys if isinstance(y, Metric)):
            figure = heat_map(collection, drawing, variable)
            page.figure(figure, name=f"figure-{number}", title=variable.label.capitalize(), tools=True)
        return
    draw = {COST_PERFORMANCE: cost_performance, CURVES: dots if suits_dots(drawing) else curves}[drawing.kind]
    page.figure(draw(collection, drawing), name="figure-0", tools=True)
    page.text("p", _caption(collection, drawing), css="caption")
    if drawing.kind == CURVES and isinstance(drawing.x, Metric):
        along = along_axis(collection, drawing)
        if point_marks(along) != along.texts:  # the numbers beside the points need their names
            rows = Drawing(CURVES, AxisKey(along), (drawing.x, *drawing.ys), drawing.colour)
            figure = dots(collection, rows, numbered=True)
            page.figure(figure, name="figure-1", title=f"Each {along.name}, by its number", tools=True)


def _caption(collection: Collection, drawing: Drawing) -> str:
    """How to read the figure."""
    if drawing.kind == COST_PERFORMANCE:
        among = "points shown" if len(collection.eligible) == len(collection.groups) else "layouts that meet the goal"
        front = f"The staircase is the Pareto front of the {among}: no other is better in both. "
        return (front if has_front(drawing) else "") + "The pointer brings up the whole layout of a point."
    if collection.repeats:
        bands = "90 % intervals: Student's t over repetitions"
    elif all(group.alike for group in collection.groups):
        bands = "90 % ranges over resampled routing (errors of the GPU's kernels are common to all)"
    else:
        bands = "90 % ranges of resampled routing and of the known errors of each GPU's kernels"
    return f"Bands and bars are {bands}, where there are any; axes need not begin at zero."


def _add_missing(page: Page, collection: Collection) -> None:
    """Points without a result, by reason."""
    missing = [point for point in collection.points if point.status != DONE]
    if not missing:
        return
    page.heading("Points without a result")
    by_reason: dict[tuple[str, str], list[int]] = {}
    for point in missing:
        by_reason.setdefault((point.status, point.reason or "no reason was given"), []).append(point.number)
    rows = [
        (status, str(len(numbers)), ", ".join(map(str, numbers[:30])) + (" …" if len(numbers) > 30 else ""), reason)
        for (status, reason), numbers in sorted(by_reason.items(), key=lambda item: -len(item[1]))
    ]
    page.table(("", "count", "points", "reason"), rows, styles=("", "number", "note", "note"))


def _add_table(page: Page, collection: Collection, drawing: Drawing) -> list[list[Any]]:
    """Every group as a row; returns what each cell is sorted by."""
    axes = [(place, axis) for place, axis in enumerate(collection.axes) if len(axis.values) > 1]
    shown = [metric(path) for path in dict.fromkeys([*(m.path for m in drawing.metrics), *HEADLINE])]
    ranked = any(group.rank is not None for group in collection.groups)
    head = [
        *(["rank"] if ranked else []),
        "point",
        *(axis.name for _, axis in axes),
        *(found.label for found in shown),
        "result",
    ]
    rows, sort = [], []
    for group in collection.groups:
        means = [None if (e := group.estimate(found)) is None else e.mean for found in shown]
        texts = ["" if mean is None else text(found, mean) for found, mean in zip(shown, means, strict=True)]
        label = label_of(group).removeprefix("points").removeprefix("point").strip()
        values = [axis.texts[group.at[place]] for place, axis in axes]
        runs = f"{len(group.results)} runs" if len(group.results) > 1 else DONE
        note = runs if group.status == DONE else group.status
        rank = ["" if group.rank is None else str(group.rank)] if ranked else []
        rows.append([*rank, label, *values, *texts, note])
        first = group.points[0].number if group.points[0].scenario is None else label
        sort.append([*([group.rank] if ranked else []), first, *(group.at[place] for place, _ in axes), *means, note])
    page.heading("All points", "A click on the head of a column sorts by it.")
    styles = [*["number" for _ in range(ranked)], "note", *["" for _ in axes], *["number" for _ in shown], "note"]
    attributes = [{"data-group": str(group.index)} for group in collection.groups]
    page.table(head, rows, styles=styles, name="points", css="sortable", row_attributes=attributes)
    return sort
