"""What verbs that only list or read print: what ships, by name, with its sources; what became of the flags of a launch.

These are `moesim gpus`, `scenarios`, `model`, `trace library:` and `scenarios from-megatron`, and a layout's command
line. Legend: L layers, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from moesim.report.facts import Fact, percent
from moesim.report.terminal import (
    Screen,
    Sized,
    fact_table,
    grid,
    heading,
    indented,
    number_table,
    prints,
    section,
    show,
    warnings,
)
from moesim.shipped import Shipped
from moesim.units import format_bandwidth, format_bytes

if TYPE_CHECKING:
    from moesim.flags.megatron import FlagFate, Reading
    from moesim.trace import RoutingTrace
    from moesim.trace.library import LibraryEntry

ShippedGroup = tuple[str, str, Sequence[Shipped]]  # head, verb, files

_COUNTS = ("causal", "non_causal")  # ways to count attention
_FORMATS = ("bf16", "fp8", "tf32", "fp32")
_FULL_WIDTH = 92  # columns that all facts of the longest name of the library need


@prints
def print_gpus(gpus: Sequence[Mapping[str, Any]]) -> Screen:
    """What `moesim gpus --json` holds: peaks in TFLOP/s, memory, NVLink, rent; then where they come from."""
    head = ("GPU", *_FORMATS, "memory", "bandwidth", "NVLink", "$/hour")
    rows = [
        (
            gpu["name"],
            *(_peak(gpu["peak_flop_per_s"].get(name)) for name in _FORMATS),
            format_bytes(gpu["memory_bytes"]),
            format_bandwidth(gpu["memory_bytes_per_s"]),
            format_bandwidth(gpu["nvlink_bytes_per_s"]),
            f"{gpu['usd_per_gpu_hour']:.2f}",
        )
        for gpu in gpus
    ]
    note = "peaks in TFLOP/s, dense; NVLink per direction; rents are quotes, defaults where a scenario names no price"
    sources = [Text(f"{gpu['name']}: {gpu['source']}; rent: {gpu['price_source']}", style="dim") for gpu in gpus]
    return [number_table(head, rows), Text(note, style="dim"), Text(), *sources]


def _peak(flops: float | None) -> str:
    return "-" if flops is None else f"{flops / 1e12:,.0f}"


@prints
def print_shipped(groups: Sequence[ShippedGroup]) -> Screen:
    """One section per kind of file."""
    columns: list[dict[str, Any]] = [{"no_wrap": True, "style": "bold"}, {}]
    return [
        section(f"{head}: moesim {verb} NAME", grid([(each.name, each.purpose) for each in files], *columns))
        for head, verb, files in groups
    ]


@prints
def print_catalogue(sizes: Mapping[str, Mapping[str, Any]]) -> Screen:
    """One line per model of the catalogue."""
    head = ("model", "parameters", "activated", "layers", "experts", "attention")
    rows = [
        (
            name,
            f"{size['total'] / 1e9:.2f} B",
            f"{size['activated'] / 1e9:.2f} B",
            str(size["layers"]),
            f"{size['experts']}, top {size['top_k']}" if size["experts"] else "dense",
            str(size["attention"]),
        )
        for name, size in sizes.items()
    ]
    return [number_table(head, rows)]


@prints
def print_model(name: str, counts: Mapping[str, Any]) -> Screen:
    """Parameters, FLOPs and memory of a model."""
    held, length = counts["parameters"], counts["sequence_length"]
    training = counts["training_flops_per_token"]
    parts = [key for key in held if key not in ("total", "activated", "inactive_experts") and held[key]]
    activated, causal, whole = f"{_billions(held['activated'])} activated per token", *(training[k] for k in _COUNTS)
    headline = [
        Fact("parameters", _billions(held["total"]), activated),
        Fact("training", f"{causal / 1e9:.2f} GFLOP per token", "3 x forward, causal attention"),
        Fact("", f"{causal * length / 1e12:.1f} TFLOP per sequence", f"of {length} tokens"),
        Fact("", f"{whole * length / 1e12:.1f} TFLOP per sequence", "attention counted whole"),
        *_routing(counts["routing"]),
    ]
    rows = [
        (_words(key), f"{held[key] / 1e6:,.1f}", "outside" if key == "mtp" else percent(held[key] / held["total"]))
        for key in parts
    ]
    return [
        Text(name, style="bold"),
        indented(fact_table(headline, strong=True)),
        section("parameters", number_table(("", "millions", "share"), rows)),
        section(f"training FLOPs of one sequence of {length} tokens, in TFLOP", _flops(counts)),
        section("memory of all parameters, before any sharding", _states(counts)),
        *_keys(counts.get("config")),
        *warnings(counts["left_out"]),
    ]


def _routing(named: str | None) -> list[Fact]:
    """What a scenario without a routing section gets; nothing of a dense model."""
    if named is None:
        return []
    which = "no router is known to be its own; a lower bound of imbalance" if named == "uniform" else "a trained router"
    return [Fact("routing", named, f"where a scenario names none; {which}")]


def _keys(config: Mapping[str, Any] | None) -> list[RenderableType]:
    """What became of the keys of a config.json."""
    if config is None:
        return []
    lines = [Text(f"{name}: {', '.join(config[key])}") for name, key in (("read", "read"), ("no effect", "harmless"))]
    return [section(f"keys of the config.json, of model type {config['model_type']}", Group(*lines))]


def _billions(number: float) -> str:
    return f"{number / 1e9:.2f} B"


def _words(key: str) -> str:
    return "multi-token prediction" if key == "mtp" else key.replace("_", " ")


def _flops(counts: Mapping[str, Any]) -> RenderableType:
    causal, whole = (counts["training_flops_per_sequence"][name] for name in _COUNTS)
    totals = sum(causal.values()), sum(whole.values())
    rows = [
        (
            _words(part),
            f"{causal[part] / 1e12:,.2f}",
            percent(causal[part] / totals[0]),
            f"{whole[part] / 1e12:,.2f}",
            percent(whole[part] / totals[1]),
        )
        for part in causal
    ]
    rows.append(("all", f"{totals[0] / 1e12:,.2f}", "", f"{totals[1] / 1e12:,.2f}", ""))
    return number_table(("", "causal", "share", "non-causal", "share"), rows)


def _states(counts: Mapping[str, Any]) -> RenderableType:
    recipes = counts["state_bytes"]
    kinds = list(next(iter(recipes.values())))
    rows = [
        (
            recipe,
            *(format_bytes(sizes[kind]) if sizes[kind] else "-" for kind in kinds),
            format_bytes(sum(sizes.values())),
        )
        for recipe, sizes in recipes.items()
    ]
    return number_table(("", *kinds, "all"), rows)


@prints
def print_entries(entries: "Sequence[LibraryEntry]") -> Screen:
    """One line per entry, with what was varied and what came of it."""
    return [Sized(lambda options: _entries(entries, options))]


def _entries(entries: "Sequence[LibraryEntry]", options: ConsoleOptions) -> Screen:
    wide = options.max_width >= _FULL_WIDTH
    head = ("library:", "held out", "imbalance", "dropped", *(("training", "tokens") if wide else ()))
    rows = [
        (
            entry.name,
            f"{entry.held_out_loss:.4f}",
            f"{entry.imbalance:.2f}",
            percent(entry.dropped_share, digits=2),
            *((f"{entry.train_loss:.4f}", f"{entry.tokens:,}") if wide else ()),
        )
        for entry in entries
    ]
    losses = "held out, training: losses" if wide else "held out: loss"
    note = f"{losses} in nats per byte; imbalance: the fullest expert over the mean; dropped: rows late in training"
    if not wide:
        note += f"; {_FULL_WIDTH} columns also show the training loss and the recorded tokens"
    return [number_table(head, rows), Text(note, style="dim")]


def entry_facts(entry: "LibraryEntry", trace: "RoutingTrace") -> dict[str, Any]:
    """Everything about an entry as JSON values; `drift` has the imbalance of every layer at every recorded step."""
    from moesim.trace.metrics import imbalance, mean_distinct_groups_L

    router = trace.router
    held_out = {
        int(step): float(loss)
        for step, loss in zip(trace.curves.validation_steps, trace.curves.validation_loss, strict=True)
    }
    loads = {each.step: each.counts_LSE.sum(axis=1) for each in trace.earlier}
    loads[trace.final.step] = trace.final_load_LE
    return {
        **asdict(entry),
        "router": asdict(router),
        "drift": [
            {"step": step, "held_out_loss": held_out.get(step), "imbalance": imbalance(load_LE).tolist()}
            for step, load_LE in loads.items()
        ],
        "distinct_groups_per_token": mean_distinct_groups_L(trace.final, router).tolist(),
    }


@prints
def print_entry(entry: "LibraryEntry", trace: "RoutingTrace") -> Screen:
    """What the entry is, where it comes from, and how its router settled."""
    facts, router = entry_facts(entry, trace), trace.router
    limit = f"at most {router.group_limit} of {router.num_groups} groups" if router.num_groups > 1 else "no groups"
    request: Any = entry.provenance["request"]
    thin = request["thin"]
    groups = ", ".join(f"{mean:.2f}" for mean in facts["distinct_groups_per_token"])
    lines = [
        Fact("router", router.kind, f"top {router.top_k} of {router.num_experts} experts, {limit}"),
        Fact("varied", entry.axis, "" if entry.axis == entry.value else entry.value),
        Fact("also called", ", ".join(entry.aliases) or "nothing else", ""),
        Fact(
            "recorded", f"{entry.tokens:,} tokens", f"{trace.num_layers} layers, sequences of {trace.sequence_length}"
        ),
        Fact("held-out loss", f"{entry.held_out_loss:.4f}", "nats per byte, nothing dropped"),
        Fact("training loss", f"{entry.train_loss:.4f}", "mean of the last tenth of the steps"),
        Fact("dropped in training", percent(entry.dropped_share, digits=2), "of all rows, last tenth of the steps"),
        Fact("groups per token", groups, "mean, per layer"),
        Fact(
            "model", f"{thin['layers']} layers of {thin['hidden']}", f"experts of width {thin['expert_intermediate']}"
        ),
        Fact("trained", f"{request['steps']} steps of {thin['tokens_per_step']:,}", f"bytes of {request['corpus']}"),
    ]
    columns = ("step", "held-out loss", *(f"layer {layer}" for layer in range(trace.num_layers)))
    rows = [
        (
            f"{each['step']:,}",
            "" if each["held_out_loss"] is None else f"{each['held_out_loss']:.4f}",
            *(f"{value:.3f}" for value in each["imbalance"]),
        )
        for each in facts["drift"]
    ]
    drift = section("experts, max / mean of the recorded tokens", number_table(columns, rows))
    return [Text(f"library:{entry.name}", style="bold"), indented(fact_table(lines)), drift]


@prints
def print_summary(reading: "Reading") -> Screen:
    """How many flags were read, and what was assumed; what is not modelled is among the warnings of the run."""
    lines = [indented(Text(f"assumed: {line}", style="dim")) for line in reading.taken]
    return [heading(reading.source, _counts(reading)), *lines, Text("")]


def print_flags(command: Mapping[str, Any], *, file: TextIO | None = None) -> None:
    """Print a command line, as in the JSON of a result, so that it can be pasted into a shell, and what it lacks."""
    show([Text(f"\nflags for {command['software']}", style="bold")], file=file)
    print(command["command"], file=file)  # not wrapped: a line break inside would part a word
    if command["unsaid"]:
        rows = [(entry["key"], f"instead: {entry['instead']}") for entry in command["unsaid"]]
        show([section("what these flags cannot say", _pairs(rows))], file=file)


def _counts(reading: "Reading") -> str:
    words = [f"{len(reading.read)} flags read", f"{len(reading.harmless)} change nothing"]
    return ", ".join([*words, f"{len(reading.left_out)} not modelled"])


@prints
def print_reading(reading: "Reading") -> Screen:
    """Every flag: what it became, why it changes nothing, what is not modelled, and what was assumed."""
    read = section("read", _pairs([(entry.flag, entry.becomes) for entry in reading.read]))
    blocks: list[RenderableType] = [heading(reading.source, _counts(reading)), read]
    if reading.harmless:
        blocks.append(section("changes nothing in a simulated step", _by_reason(reading.harmless)))
    if reading.taken:
        blocks.append(section("assumed", grid([(text,) for text in reading.taken], {"overflow": "fold"})))
    return blocks + warnings([f"not modelled: {line}" for line in reading.left_out])


def _pairs(rows: Sequence[tuple[str, str]]) -> Table:
    return grid(rows, {"overflow": "fold"}, {"overflow": "fold", "style": "dim"})


def _by_reason(entries: "Sequence[FlagFate]") -> Table:
    """The flags of every reason in one row."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        names.setdefault(entry.becomes, []).append(entry.flag.split()[0])
    return _pairs([(reason, " ".join(found)) for reason, found in names.items()])
