"""The library of trained routing on a terminal: all entries, or one with the drift of its router.

Legend: L layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, TextIO

from rich.console import RenderableType
from rich.text import Text

from moesim.report.facts import Fact, percent
from moesim.report.screen import fact_table, indented, number_table, section, show
from moesim.trace import RoutingTrace
from moesim.trace.library import LibraryEntry
from moesim.trace.metrics import expert_load_LE, imbalance, mean_distinct_groups_L

_FULL_WIDTH = 92  # columns that all facts of the longest name need


def print_entries(entries: Sequence[LibraryEntry], *, file: TextIO | None = None, width: int | None = None) -> None:
    """One line per entry, with what was varied and what came of it."""
    show(lambda options: _list(entries, wide=options.max_width >= _FULL_WIDTH), file=file, width=width)


def _list(entries: Sequence[LibraryEntry], *, wide: bool) -> list[RenderableType]:
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


def entry_facts(entry: LibraryEntry, trace: RoutingTrace) -> dict[str, Any]:
    """Everything about an entry as JSON values; `drift` has the imbalance of every layer at every recorded step."""
    router = trace.router
    held_out = {
        int(step): float(loss)
        for step, loss in zip(trace.curves.validation_steps, trace.curves.validation_loss, strict=True)
    }
    loads = {each.step: each.counts_LSE.sum(axis=1) for each in trace.earlier}
    loads[trace.final.step] = expert_load_LE(trace.final, num_experts=router.num_experts)
    return {
        **asdict(entry),
        "router": asdict(router),
        "drift": [
            {"step": step, "held_out_loss": held_out.get(step), "imbalance": imbalance(load_LE).tolist()}
            for step, load_LE in loads.items()
        ],
        "distinct_groups_per_token": mean_distinct_groups_L(trace.final, router).tolist(),
    }


def print_entry(
    entry: LibraryEntry, trace: RoutingTrace, *, file: TextIO | None = None, width: int | None = None
) -> None:
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
    head = Text(f"library:{entry.name}", style="bold")
    show(lambda _: [head, indented(fact_table(lines)), drift], file=file, width=width)
