"""What a plan adds to its page: why the winner wins, what would alter the choice, and what was discarded before."""

from collections.abc import Mapping, Sequence
from typing import Any

from moesim.report import facts
from moesim.report.categories import category
from moesim.report.page import Page
from moesim.report.plan_screen import named, verdict_on_change
from moesim.report.plots.comparison import cascade
from moesim.report.plots.points import plain

Plan = Mapping[str, Any]

_OPPONENTS = {"runner_up": "Why it wins: against the runner-up", "best_with_other_gpus": "Against the best other GPUs"}
_SMALL = 0.02  # share of the largest part below which parts are summed up


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
    page.text("h2", title)
    page.text(
        "p",
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
    return [(plain(label), value) for label, value in [*large, ("smaller changes", rest)] if value]


def _add_sensitivity(page: Page, plan: Plan) -> None:
    changes = plan.get("sensitivity", {}).get("changes", ())
    if not changes:
        return
    page.text("h2", "What would alter the choice")
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
    page.text("h2", "The layouts as flags")
    for outcome in told:
        for command in outcome["flags"].values():
            page.open("details")
            page.text("summary", f"{named(outcome)}: flags for {command['software']}")
            page.text("pre", command["command"])
            rows = [(entry["key"], entry["instead"]) for entry in command["unsaid"]]
            page.table(("what these flags cannot say", "instead"), rows, styles=("", "note"))
            page.close("details")


def _add_discarded(page: Page, plan: Plan) -> None:
    """The funnel from all combinations to those that were simulated, and how well the screen in it estimates."""
    counts = plan.get("counts", {})
    if not counts.get("discarded"):
        return
    page.text("h2", "Discarded before simulation")
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
