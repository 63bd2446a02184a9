"""The numbers of a result as readable lines: the terminal and the HTML report print the same ones.

Everything here reads `result`, the mapping that result.json holds; nothing is computed anew but shares and rounding. It
loads no library of arrays before it has one in hand: verbs that only list or read print by it, too.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from moesim.report.categories import Category, in_order
from moesim.units import format_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from moesim.results import SpanTable
    from moesim.trace import RoutingTrace

    FloatArray = NDArray[np.float64]

Result = Mapping[str, Any]
NOT_KNOWN = "not known"
_SHOWN_SHARE = 1e-3
ROUND_OFF = 1e-8  # share of the step below which a time is rounding of sums and differences


@dataclass(frozen=True)
class Fact:
    """One line: what, how much, and what to know about it."""

    label: str
    value: str
    note: str = ""


def percent(share: float | None, *, digits: int = 1) -> str:
    """`12.3 %`."""
    return NOT_KNOWN if share is None else f"{100 * share:.{digits}f} %"


def times(ratio: float | None) -> str:
    """`1.23x` of a ratio whose perfect value is 1."""
    return NOT_KNOWN if ratio is None else f"{ratio:.3f}x"


def count(value: float | None) -> str:
    """Whole number with thousands separated."""
    return NOT_KNOWN if value is None else f"{value:,.0f}"


def dollars(value: float | None) -> str:
    """US dollars with enough digits to be useful at any size."""
    if value is None:
        return NOT_KNOWN
    return f"${value:,.0f}" if abs(value) >= 1000 else f"${value:.4g}"


def seconds(value: float | None, *, digits: int = 4) -> str:
    """Seconds with a fitting unit and `digits` significant digits, trailing zeros included."""
    if value is None:
        return NOT_KNOWN
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(value) >= scale:
            return f"{value / scale:#.{digits}g}".rstrip(".") + f" {unit}"
    return f"{value * 1e9:.{digits}g} ns" if value else "0 s"


def bytes_column(values: Iterable[float]) -> Callable[[float], str]:
    """How to write amounts of bytes that are compared: all in the unit of the largest, with two decimals."""
    largest = max(values, default=0.0)
    scale, unit = next(((s, u) for s, u in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if largest >= s), (1e3, "kB"))
    return lambda value: f"{value / scale:,.2f} {unit}"


def step_time(result: Result) -> Fact:
    """Mean step time and its 90 % range; where chance of routing is unknown that of the kernels alone, and why."""
    bounds, of_kernels = result.get("step_time_range_s"), result.get("step_time_kernel_range_s")
    if bounds is None:
        reason = "one routing sample" if result["samples"] == 1 else "too few distinct sequences"
        if of_kernels is None:
            return Fact("step time", seconds(result["step_time_s"]), f"no range: {reason}")
        mean, span = _mean_and_span(result["step_time_s"], of_kernels)
        return Fact("step time", mean, f"90 % range {span} from kernels alone; none of routing: {reason}")
    mean, span = _mean_and_span(result["step_time_s"], bounds)
    return Fact("step time", mean, f"90 % range {span}{_parts_of_range(result)}")


def _mean_and_span(mean_s: float, bounds_s: Sequence[float]) -> tuple[str, str]:
    """The mean, and `low to high` with as many digits as tell them apart."""
    digits = _digits_that_tell_apart(*bounds_s)
    low, mean, high = (seconds(value, digits=digits) for value in (bounds_s[0], mean_s, bounds_s[1]))
    if low.split()[1] == high.split()[1]:
        low = low.split()[0]
    return mean, f"{low} to {high}"


def _parts_of_range(result: Result) -> str:
    """` (routing 0.1 %, kernels 2.6 %)`: half of either part's width, as a share of the step; nothing where no part is
    recorded, as before there were two."""
    names = (("routing", "step_time_routing_range_s"), ("kernels", "step_time_kernel_range_s"))
    halves = {
        name: (found[1] - found[0]) / 2 / result["step_time_s"]
        for name, key in names
        if (found := result.get(key)) is not None
    }
    widths = [f"{name} {percent(half, digits=0 if half >= 0.0995 else 1)}" for name, half in halves.items()]
    return f" ({', '.join(widths)})" if widths else ""


def _digits_that_tell_apart(low: float, high: float) -> int:
    """Significant digits that show the width of a range with two digits of its own; 4 to 7."""
    width = (high - low) / high
    return 4 if width <= 0 else min(7, max(4, 2 + math.ceil(-math.log10(width))))


def headline(result: Result) -> list[Fact]:
    """The numbers that answer the question of a run: six, and one more where rows are missing."""
    mfu, cost, lost_s = result["mfu"], result["cost"], result["imbalance"]["cost_s"]
    if abs(lost_s) < ROUND_OFF * result["step_time_s"]:
        lost_s = 0.0
    return [
        step_time(result),
        Fact(
            "tokens per second",
            count(result["tokens_per_second"]),
            f"{count(result['tokens_per_second_per_gpu'])} per GPU",
        ),
        Fact("MFU", percent(mfu["causal"]), _of_peak(mfu)),
        Fact(
            "cost of imbalance",
            percent(lost_s / result["step_time_s"]),
            f"{seconds(lost_s)}: the same rows spread evenly save it",
        ),
        Fact("dropped rows", percent(result["dropped_share"], digits=2), "of all routed (token, expert) rows"),
        *_kept_rows(result),
        Fact("price", _price(cost), _budget(cost)),
    ]


def _of_peak(mfu: Mapping[str, Any]) -> str:
    """Which peak MFU divides by; in other formats than bf16 also the share of the bf16 peak."""
    if mfu["peak"] in ("bf16", "fp16"):  # one peak for both
        return f"of the {mfu['peak']} peak, causal attention; {percent(mfu['non_causal'])} non-causal"
    causal, other = percent(mfu["causal_of_bf16_peak"]), percent(mfu["non_causal_of_bf16_peak"])
    return (
        f"of the {mfu['peak']} peak, causal attention; {percent(mfu['non_causal'])} non-causal. "
        f"Of the bf16 peak {causal} and {other}"
    )


def _kept_rows(result: Result) -> list[Fact]:
    """MFU and price by the rows that were kept, where not all were."""
    found = result.get("effective")
    if found is None or abs(found["kept_share"] - 1.0) < ROUND_OFF:
        return []
    note = f"{_price(found)}; {percent(found['kept_share'], digits=2)} of the rows are computed"
    return [Fact("kept rows alone", f"MFU {percent(found['mfu_causal'])}", note)]


def _price(cost: Mapping[str, Any]) -> str:
    per_million = cost.get("usd_per_million_tokens")
    return NOT_KNOWN if per_million is None else f"{dollars(per_million)} / M tokens"


def _budget(cost: Mapping[str, Any]) -> str:
    if cost.get("usd_per_step") is None:
        return "give cluster.price_per_gpu_hour to know it"
    step = f"{dollars(cost['usd_per_step'])} per step"
    if cost.get("usd_total") is None:
        return step
    return f"{step}; all tokens {dollars(cost['usd_total'])}, {cost['days']:.4g} days"


def memory(result: Result) -> Fact:
    """Peak memory of the pipeline rank that is nearest to its capacity, and how many routing samples fit."""
    found = result["memory"]
    rank = found["fullest_pipeline_rank"]
    peak, capacity = (found[f"{name}_bytes_by_pipeline_rank"][rank] for name in ("peak", "capacity"))
    where = f" on pipeline rank {rank}" if len(found["peak_bytes_by_pipeline_rank"]) > 1 else ""
    note = f"of {format_bytes(capacity)}{where}; {percent(found['fits_share'], digits=0)} of samples fit"
    return Fact("memory", format_bytes(peak), note)


def stages(result: Result) -> tuple[list[Fact], list[tuple[str, str, str]]]:
    """How evenly a pipeline's ranks are loaded; and runs of ranks with as many layers: ranks, layers, ms.

    Empty without a pipeline.
    """
    found = result.get("stages", {"pipeline_ranks": ()})
    ranks = found["pipeline_ranks"]
    if len(ranks) < 2:
        return [], []
    of_rank = [rank["seconds_per_micro_batch"] for rank in ranks]
    slowest = max(range(len(ranks)), key=of_rank.__getitem__)
    excess = percent(found["slowest_over_mean"] - 1.0)
    note = f"a micro-batch on pipeline rank {slowest}, the slowest; {excess} more than the mean"
    rows = []
    for layers, run in groupby(range(len(ranks)), key=lambda rank: tuple(ranks[rank]["layers"])):
        members = list(run)
        least, most = (f"{pick(of_rank[rank] for rank in members) * 1e3:.4g}" for pick in (min, max))
        names = f"{members[0]} to {members[-1]}" if len(members) > 1 else str(members[0])
        rows.append((names, layers_of_stages(layers), least if least == most else f"{least} to {most}"))
    return [Fact("pipeline", seconds(of_rank[slowest]), note)], rows


def layers_of_stages(layers: Sequence[int]) -> str:
    """`4 + 1`, or `7 x 1`: the layers of a rank's stages."""
    if len(layers) > 2 and len(set(layers)) == 1:
        return f"{len(layers)} x {layers[0]}"
    return " + ".join(map(str, layers))


def communication(result: Result) -> list[Fact]:
    """Bytes of one step over all ranks, by purpose and by tier."""
    facts = result["communication"]
    return [
        Fact("dispatch", format_bytes(facts["dispatch_bytes"]), "forward and backward, all ranks"),
        Fact("combine", format_bytes(facts["combine_bytes"]), "forward and backward, all ranks"),
        Fact("inside nodes", format_bytes(facts["intra_node_bytes"]), "dispatch and combine over NVLink"),
        Fact("between nodes", format_bytes(facts["inter_node_bytes"]), "dispatch and combine over the network"),
        Fact("copies per token", f"{facts['copies_per_token']:.3f}", "sent to other ranks, per token and layer"),
    ]


def hidden(table: "SpanTable") -> Fact:
    """Share of the time of dispatch, combine and collectives that runs behind computation, as trace tools define it.

    Mean over the ranks of the table; sample 0 of its spans.
    """
    import numpy as np

    from moesim.results import Stream, overlapped_transfer

    transfers = (Stream.COMMUNICATION, Stream.REDUCTION, Stream.BACKGROUND)
    rows_N = np.concatenate([table.rows(stream) for stream in transfers])
    total_R = (table.finish_NSR[rows_N, 0] - table.start_NSR[rows_N, 0]).sum(axis=0)
    behind_SR = sum(overlapped_transfer(table).values(), np.zeros_like(table.start_NSR[0]))
    share = float(behind_SR[0].sum() / total_R.sum()) if total_R.any() else None
    return Fact("behind computation", percent(share), "of the time of transfers in expert group 0, waiting included")


def balance(result: Result) -> list[Fact]:
    """Imbalance (max / mean, 1 is perfect) beside the floor that a uniform router has on the same window of tokens."""
    facts = result["imbalance"]
    return [
        Fact("experts", times(facts["expert"]), "rows of the busiest expert / mean"),
        Fact("uniform experts", times(facts["uniform_floor"]), "the floor for experts: what chance alone gives"),
        Fact("rank rows", times(facts["rank_rows"]), "rows of the busiest rank / mean"),
        Fact("uniform ranks", times(facts["uniform_floor_rank"]), "the floor for ranks, before drops"),
        Fact("rank bytes", times(facts["rank_bytes"]), "bytes of the busiest rank / mean"),
        Fact("rank time", times(facts["rank_time"]), "computing time of the slowest rank / mean, whole step"),
        Fact("window", f"{count(facts['window_tokens'])} tokens", "over which rows and bytes are counted"),
    ]


def placement(result: Result) -> list[Fact]:
    """Where experts sit, what decided it, and the ranks' balance beside that of neighbouring experts; none as usual."""
    found = result.get("placement", {"kind": "contiguous", "slots": 0, "experts": 0})  # results of before have none
    if "slots" not in found or (found["kind"] == "contiguous" and found["slots"] == found["experts"]):
        return []
    copies = found["slots"] - found["experts"]
    note = f"{found['slots_per_rank']} slots a rank; an expert has up to {found['most_copies']}" if copies else ""
    made = {"earlier": "the trace's first half; the rest is simulated", "same": "the rows that are simulated"}
    facts = [Fact("placement", found["kind"], made.get(found["made_on"], ""))]
    if copies:
        facts.append(Fact("copies", count(copies), note))
        sent = bytes_column([found["copy_gradient_bytes"]])(found["copy_gradient_bytes"])
        facts.append(Fact("their gradients", sent, "sent between copies in one step, all ranks"))
    if found["rank_rows_contiguous"] is not None:
        facts.append(Fact("ranks, contiguous", times(found["rank_rows_contiguous"]), "the same rows, experts in order"))
    if found.get("rank_rows_by_speed") is not None:
        facts.append(Fact("rows / speed", times(found["rank_rows_by_speed"]), "of the rank that has most, over mean"))
    facts.append(Fact("ranks, as placed", times(result["imbalance"]["rank_rows"]), "busiest / mean"))
    if found.get("searched"):
        best = min(found["searched"], key=lambda each: each["step_time_s"])
        tried = f"of {len(found['searched'])} that were simulated on the rows to place by"
        facts.append(
            Fact(
                "weight of traffic", f"{best['traffic']:g}", f"{seconds(best['step_time_s'])} a step, the least {tried}"
            )
        )
    return facts + replacing(found.get("replacing"))


def replacing(found: Result | None) -> list[Fact]:
    """What placing experts anew costs and brings; none where they are placed once."""
    if found is None:
        return []
    moved = bytes_column([found["moved_bytes"]])(found["moved_bytes"])
    best = "placing once" if found["best_every"] is None else f"every {count(found['best_every'])} steps"
    facts = [
        Fact("placed anew", f"every {count(found['every'])} steps", f"{found['mean_age']:g} steps ago in the mean"),
        Fact("moved each time", moved, f"in {seconds(found['moving_s'])}, with nothing beside it"),
        Fact("step with moving", seconds(found["step_time_s"]), f"{seconds(found['moving_per_step_s'])} of it"),
        Fact("placed once", seconds(found["never_step_time_s"]), f"{count(found['never_age'])} steps ago"),
    ]
    if found["contiguous_step_time_s"] is not None:
        facts.append(Fact("experts in order", seconds(found["contiguous_step_time_s"]), "never placed by rows"))
    return [*facts, Fact("best", best, f"{seconds(found['best_step_time_s'])} a step")]


def training(result: Result) -> list[Fact]:
    """How the router was made, its loss where it was trained, and what training did to the balance of experts."""
    router = result["router"]
    facts = [Fact("router", str(router["kind"]))]
    if router.get("validation_loss") is not None:
        facts.append(Fact("held-out loss", f"{router['validation_loss']:.4f}", "nats per byte"))
    if router.get("train_loss") is not None:
        facts.append(Fact("training loss", f"{router['train_loss']:.4f}", "nats per byte"))
    if len(router.get("steps", ())) > 1:
        for step, ratio in zip(router["steps"], (router["imbalance_first"], router["imbalance_last"]), strict=True):
            facts.append(Fact(f"experts, step {step}", times(ratio), "busiest / mean on all recorded text"))
    return facts


def sources(result: Result) -> list[Fact]:
    """Which share of the estimated time rests on what, largest first."""
    shares = sorted(result["estimate_sources"].items(), key=lambda item: -item[1])
    return [Fact(name, percent(share), "of estimated time") for name, share in shares]


def transfer_sources(result: Result) -> list[Fact]:
    """What transfers and collectives rest on; results of earlier versions do not say."""
    named = (text.partition(": ") for text in result.get("transfer_sources", ()))
    return [Fact(name, "", source) for name, _, source in named]


ERRORS_HEAD = ("", "of the step", "known error")


def errors(result: Result) -> list[tuple[str, str, str]]:
    """(kernels and their source, share of the critical path, known error): what the kernels' part of the range is made
    of, the weightiest first.

    Parts of less than a thousandth of the step are left out; results of earlier versions have none.
    """
    return [
        (f"{part['family']}, {part['source']}", percent(part["share"]), percent(math.expm1(part["log_error"])))
        for part in result.get("step_time_errors", ())
        if part["share"] >= _SHOWN_SHARE
    ]


def routing(result: Result) -> list[Fact]:
    """What the routing rests on; nothing for dense models and results of earlier versions."""
    router = result["router"]
    if not router.get("rests_on"):
        return []
    facts = [Fact("routing", router["rests_on"], router.get("rests_on_how", ""))]
    if router.get("model_default"):
        facts.append(Fact("", "the model's default", "what a scenario without routing gets (moesim model NAME)"))
    if cut := router.get("sequences_rest_on"):
        facts.append(Fact("sequences", cut, "cut the recording, which does not say how"))
    return facts


def software(result: Result) -> list[Fact]:
    """Whose kernels were priced, how their list was obtained and what it was checked against."""
    known = result.get("software")  # results of earlier versions do not say
    if known is None:
        return []
    return [
        Fact("software", str(known["name"]), str(known["listed"])),
        *([Fact("set otherwise", "", str(known["switches"]))] if known.get("switches") else []),
        Fact("checked", "", str(known["checked"])),
    ]


def attribution(result: Result) -> list[tuple[Category, float, float]]:
    """(category, seconds, share of the step), largest first."""
    parts = sorted(in_order(result["attribution_s"]), key=lambda part: -part[1])
    step_s = result["step_time_s"]
    return [(category, value, value / step_s) for category, value in parts if value > ROUND_OFF * step_s]


def jitter(result: Result) -> float:
    """Seconds of the waiting that are for chips and hosts slower than others by chance; older runs do not tell."""
    return float(result.get("waiting", {}).get("jitter_s", 0.0))


def what_if(result: Result) -> list[tuple[str, str, str, str, str]]:
    """(question, step time, difference with its share, price of a million tokens, why there is no answer)."""
    rows = []
    for entry in result.get("what_if", ()):
        if entry["step_time_s"] is None:
            rows.append((entry["label"], "-", "-", "-", entry["note"]))
            continue
        share = entry["difference_s"] / result["step_time_s"]
        # a difference of rounding is none
        change = f"{100 * share:+.1f} %" if abs(share) > ROUND_OFF else "none"
        rows.append(
            (entry["label"], seconds(entry["step_time_s"]), change, dollars(entry["usd_per_million_tokens"]), "")
        )
    return rows


def samples(result: Result) -> list[Fact]:
    """What the means and the range were drawn from."""
    router = result["router"]
    facts = [
        Fact("routing samples", count(result["samples"]), "each a whole step"),
        step_time(result),
    ]
    if "trace_sequences" in router:
        facts.append(
            Fact(
                "trace",
                f"{router['trace_sequences']} sequences",
                f"for a batch of {router['batch_sequences']} sequences",
            )
        )
        facts.append(Fact("reused", percent(router["reused_share"]), "of a batch's sequences come twice"))
    return facts


def spread(load_LE: "FloatArray") -> list[Fact]:
    """Quantiles of the relative load of single experts."""
    import numpy as np

    names = {"coldest": 0.0, "5 % quantile": 0.05, "median": 0.5, "95 % quantile": 0.95, "hottest": 1.0}
    return [Fact(name, times(float(np.quantile(load_LE, share)))) for name, share in names.items()]


def trace_imbalance(trace: "RoutingTrace") -> "dict[int, FloatArray]":
    """Max / mean expert load per layer [L] of every step that the trace knows of, over all its tokens."""
    from moesim.trace.metrics import imbalance

    num_experts = trace.router.num_experts
    counted = {step.step: imbalance(step.counts_LSE.sum(axis=1)) for step in trace.earlier}
    recorded = {step.step: imbalance(step.load_LE(num_experts=num_experts)) for step in trace.steps}
    return counted | recorded


def trace_facts(trace: "RoutingTrace") -> list[Fact]:
    """What was recorded."""
    router = trace.router
    facts = [
        Fact("experts", count(router.num_experts), f"{router.top_k} per token"),
        Fact(
            "recorded",
            f"{count(trace.final.num_tokens)} tokens",
            f"{trace.num_layers} layers, after {trace.final.step} steps",
        ),
    ]
    if router.num_groups > 1:
        facts.insert(1, Fact("groups", count(router.num_groups), f"at most {router.group_limit} per token"))
    return facts
