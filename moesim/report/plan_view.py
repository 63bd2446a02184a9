"""What `moesim plan` prints: the funnel, the ranking, why the winner wins, and what would alter the choice."""

from collections.abc import Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moesim.report.categories import category
from moesim.report.facts import Fact, percent, routing, software
from moesim.report.terminal import Screen, fact_table, heading, indented, number_table, prints, section, warnings
from moesim.units import format_seconds, shortened

Plan = Mapping[str, Any]

_ROWS = 12  # of the ranking
_PARTS = 6  # of a comparison
NEAR_TIE = 0.01  # share of the cost below which two layouts are called alike: kernels are predicted to a few per cent
_SHORT = {
    "parallelism.pipeline": "pp",
    "parallelism.tensor": "tp",
    "parallelism.context": "cp",
    "parallelism.data": "dp",
    "parallelism.expert": "ep",
    "parallelism.expert_tensor": "etp",
    "workload.micro_batch": "mb",
}
_LONG = {
    "parallelism.pipeline": "pipeline",
    "parallelism.tensor": "tensor",
    "parallelism.context": "context",
    "parallelism.data": "data",
    "parallelism.expert": "expert",
    "parallelism.expert_tensor": "expert-tensor",
}


@prints
def print_plan(plan: Plan) -> Screen:
    """One plan, the content of plan.json."""
    blocks: list[RenderableType] = [
        heading(str(plan["name"]), _goal(plan["goal"])),
        section("what was looked at", _rejections(plan)),
        section(f"layouts by simulated {_objectives(plan)}", _ranking(plan)),
        *map(_note, (_legend(plan), _abbreviations(plan), *_dropping(plan))),
    ]
    for key, against in (
        ("runner_up", "why it wins: against the runner-up"),
        ("best_with_other_gpus", "against the best with other GPUs"),
    ):
        if key in plan["why"]:
            blocks.append(section(against, _comparison(plan, plan["why"][key])))
            blocks.append(_note(_sentence(plan, plan["why"][key])))
    blocks.append(section("what would alter the choice", _sensitivity(plan)))
    blocks += [_note(line) for line in _flips(plan)]
    if plan["baseline"] is not None:
        blocks.append(section("against a dense model", fact_table(_baseline(plan))))
    if known := software(plan):
        blocks.append(section("estimates rest on the software", fact_table(known)))
    if rests := routing({"router": plan.get("routing", {})}):
        blocks.append(section("estimates rest on the routing", fact_table(rests)))
    return blocks + warnings(plan.get("warnings", ()))


def _note(text: str) -> RenderableType:
    return indented(Text(text, style="dim"))


def _goal(goal: Mapping[str, Any]) -> str:
    words = [f"{goal['tokens']:.3g} tokens".replace("e+", "e")]
    if goal["deadline_days"] is not None:
        words.append(f"in {goal['deadline_days']:g} days" + (f" (by {goal['by']})" if goal.get("by") else ""))
    if goal["usd"] is not None:
        words.append(f"for at most ${goal['usd']:,.0f}")
    offers = ", ".join(f"{o['at_most']} {o['gpu']} at ${o['usd_per_gpu_hour']:g}/h" for o in goal["gpus"])
    return " ".join(words) + f"; on offer: {offers}"


STAGE_WORDS = {
    "offer": "more GPUs than offered",
    "sizes": "sizes do not divide",
    "places": "groups leave their node",
    "same": "same as another",
    "refused": "refused by a check",
    "unsupported": "not simulated yet",
    "memory": "does not fit into memory",
    "speed": "too slow",
    "deadline": "too late",
    "budget": "too dear",
}


def _rejections(plan: Plan) -> Table:
    counts = plan["counts"]
    by_stage: dict[str, int] = {}
    examples: dict[str, str] = {}
    for entry in counts["discarded"]:
        by_stage[entry["stage"]] = by_stage.get(entry["stage"], 0) + entry["count"]
        examples.setdefault(entry["stage"], entry["example"])
    how = "all" if counts["method"] == "enumerate" else f"NSGA-II, of {counts['combinations']:,}"
    lines = [Fact("combinations", f"{counts['looked_at']:,}", how)]
    lines += [
        Fact(f"  {STAGE_WORDS[stage]}", f"- {count:,}", f"e.g. {shortened(examples[stage], 78)}")
        for stage, count in by_stage.items()
    ]
    lines.append(
        Fact(
            "candidates",
            f"{counts['kept']:,}",
            f"by the screen, limits missed by less than {counts['slack'] - 1:.0%} let through",
        )
    )
    note = "and ranked by that alone"
    if counts["in_doubt"]:
        note += f"; {counts['in_doubt']} more might beat the winner if the screen erred there as it did at worst"
    lines.append(Fact("simulated", f"{counts['simulated']:,}", note))
    error = plan["screen_error"]
    if error is not None:
        correlation = "" if error["rank_correlation"] is None else f", rank correlation {error['rank_correlation']:.3f}"
        lines.append(
            Fact(
                "screen's error",
                f"{error['median']:.2%}",
                f"median of {error['layouts']} drawn at random; worst {error['worst']:.2%}{correlation}",
            )
        )
    return fact_table(lines)


def _objectives(plan: Plan) -> str:
    words = {"usd": "cost", "days": "days", "mfu": "MFU"}
    return ", then ".join(words[name] for name in plan["objectives"])


def layout_words(values: Mapping[str, Any]) -> str:
    """One layout in short: `dp16 ep8 pp2 mb1 full 1f1b`; sizes of 1 are left out."""
    words = [
        f"{short}{values[key]}"
        for key, short in _SHORT.items()
        if values.get(key, 1) != 1 or key == "workload.micro_batch"
    ]
    for key, value in values.items():
        if key in _SHORT or key in ("cluster.gpu", "gpus", "model"):
            continue
        words.append(_word(key, value))
    return " ".join(word for word in words if word)


def named(outcome: Mapping[str, Any]) -> str:
    """An outcome of plan.json by its GPUs and its layout."""
    values = outcome["values"]
    return f"{values['gpus']} {values['cluster.gpu']} {layout_words(values)}"


def verdict_on_change(change: Mapping[str, Any]) -> str:
    """What a changed condition does to the choice."""
    return change["note"] or ("another layout wins" if change["changes_winner"] else "the winner stays")


def _word(key: str, value: Any) -> str:
    name = key.rpartition(".")[2]
    if name == "zero":
        return (
            f"zero{value['dense']}" if value["dense"] == value["expert"] else f"zero{value['dense']}/{value['expert']}"
        )
    if name == "recompute":
        return "" if value == "none" else f"recompute={value if isinstance(value, str) else '+'.join(value)}"
    if isinstance(value, dict):
        kind = value.get("kind") or value.get("preset") or value.get("algorithm")
        rest = [f"{k}={v:g}" if isinstance(v, float) else f"{k}={v}" for k, v in value.items() if v != kind]
        return f"{kind}({', '.join(rest)})" if rest else f"{kind}"
    return f"M{value}" if name == "group_limit" else f"{name}={value}"


def _ranking(plan: Plan) -> Table:
    rows = []
    front, failing = set(plan["front"]), plan.get("failures", False)
    for rank, point in enumerate(plan["ranking"][:_ROWS], start=1):
        outcome = plan["outcomes"][point]
        values = outcome["values"]
        rows.append((
            f"{rank}{'*' if point in front else ' '}",
            f"{values['gpus']} {values['cluster.gpu']}",
            layout_words(values),
            f"${outcome['usd']:,.0f}",
            f"{outcome['days']:.1f}",
            f"{outcome['usd_per_million_tokens']:.4f}",
            format_seconds(outcome["step_s"]),
            percent(outcome["mfu"]),
            percent(outcome["peak_bytes"] / outcome["capacity_bytes"], digits=0),
            *((percent(outcome["goodput"]), f"{outcome['days_with_failures']:.1f}") if failing else ()),
        ))  # fmt: skip
    head: tuple[str, ...] = ("", "GPUs", "layout", "cost", "days", "$/M tok", "step", "MFU", "mem")
    if failing:
        head += ("goodput", "failing")
    return number_table(head, rows, words=3, wrapped=2, marked=0)


def _legend(plan: Plan) -> str:
    more = len(plan["ranking"]) - _ROWS
    missing = plan["counts"]["simulated"] - len(plan["ranking"])
    words = ["* on the front of cost and days: nothing simulated is both cheaper and sooner"]
    if more > 0:
        words.append(f"{more} more in plan.json")
    if missing > 0:
        words.append(f"{missing} simulated layouts miss the goal")
    return "; ".join(words)


def _abbreviations(plan: Plan) -> str:
    """What the short words of the shown layouts mean, those alone that are there."""
    shown = [plan["outcomes"][point]["values"] for point in plan["ranking"][:_ROWS]]
    keys = [key for key in _SHORT if any(values.get(key, 1) != 1 for values in shown)]
    sizes = [f"{_SHORT[key]} {_LONG[key]}" for key in keys if key in _LONG]
    ways = f"{', '.join(sizes)}: ways of parallelism; " if sizes else ""
    peak = f"MFU: of the {plan['mfu_peak']} peak, causal attention; " if "mfu_peak" in plan else ""
    failing = "; cost, days, $/M tok: with failures; goodput: kept work of all time; failing: days with failures"
    short = f"{ways}mb: sequences per micro-batch; {peak}mem: share of a GPU's memory"
    return short + (failing if plan.get("failures") else "")


def _dropping(plan: Plan) -> list[str]:
    """Which of the shown layouts drop rows: they do less for their price."""
    shares = [plan["outcomes"][point].get("dropped_share", 0.0) for point in plan["ranking"][:_ROWS]]
    dropping = [f"{rank}: {percent(share)}" for rank, share in enumerate(shares, start=1) if share]
    return [f"rows that they drop, and so do not compute for their price: {', '.join(dropping)}"] if dropping else []


def _comparison(plan: Plan, found: Mapping[str, Any]) -> Table:
    rows = []
    for part in found["parts"][:_PARTS]:
        mine, other = part["step_s"]
        label = category(part["part"]).label
        rows.append((label, format_seconds(mine), format_seconds(other), _signed(part["usd_difference"])))
    rest = sum(part["usd_difference"] for part in found["parts"][_PARTS:])
    rows.append(("other parts", "", "", _signed(rest)))
    rows.append(
        (
            "all",
            format_seconds(plan["outcomes"][plan["why"]["winner"]]["step_s"]),
            format_seconds(plan["outcomes"][found["other"]]["step_s"]),
            _signed(found["usd_difference"]),
        )
    )
    return number_table(("in a step", "winner", "other", "other costs more by"), rows)


def _signed(usd: float) -> str:
    return f"{'+' if usd >= 0 else '-'}${abs(usd):,.0f}"


def _sentence(plan: Plan, found: Mapping[str, Any]) -> str:
    parts = [part for part in found["parts"] if part["usd_difference"] * found["usd_difference"] > 0][:2]
    names = " and ".join(category(part["part"]).label for part in parts)
    days = found["days_difference"]
    when = f"{abs(days):.1f} days {'later' if days > 0 else 'sooner'}"
    text = f"the other: {named(plan['outcomes'][found['other']])}; {_signed(found['usd_difference'])}, {when}"
    if abs(found["usd_difference"]) < NEAR_TIE * plan["outcomes"][found["other"]]["usd"]:
        text += "; a near tie"
    return f"{text}; mostly {names}" if names else text


def _sensitivity(plan: Plan) -> Table:
    rows = []
    for change in plan["sensitivity"]["changes"]:
        winner = change["winner"]
        shown = "" if winner is None else named(plan["outcomes"][winner])
        cost = "" if change["usd"] is None else f"${change['usd']:,.0f}"
        days = "" if change["days"] is None else f"{change['days']:.1f}"
        rows.append(
            (
                change["change"],
                verdict_on_change(change),
                shown if change["changes_winner"] else "",
                cost,
                days,
                str(change["layouts"]),
            )
        )
    return number_table(("change", "", "best then", "cost", "days", "among"), rows, words=3, wrapped=2)


def _flips(plan: Plan) -> list[str]:
    return [
        f"{flip['gpu']} would win below ${flip['usd_per_gpu_hour']:.2f} per GPU-hour, "
        f"{flip['price_ratio']:.2f} times the winner's price (now {flip['price_ratio_now']:.2f} times)"
        for flip in plan["sensitivity"]["price_flips"]
    ]


def _baseline(plan: Plan) -> list[Fact]:
    base = plan["baseline"]
    if base["id"] is None:
        return [Fact("no layout", base["note"], base["source"])]
    hours = f"the winner takes {percent(base['gpu_hours_of_winner'])} of its GPU-hours"
    return [
        Fact("model", base["model"], base["source"]),
        Fact("best layout", named(base), base["note"]),
        Fact("cost", f"${base['usd']:,.0f}", f"the winner costs {percent(base['usd_of_winner'])} of it"),
        Fact("days", f"{base['days']:.1f}", hours),
    ]
