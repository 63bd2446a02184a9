"""Verbs on routing traces: `moesim trace` and `trace import`, `trace hf`, `trace export`.

`trace` makes or shows that of a scenario, or lists and shows the library (`library:NAME`); `import` reads what others
recorded, `hf` how the routers of a transformers model route a text; `export` writes a table for other programs.
"""

import argparse
import fnmatch
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.cli.flags import (
    CACHE,
    FORCE,
    JSON,
    OVERRIDES,
    QUIET,
    Flag,
    check_new,
    check_positive,
    load,
    shipped_file,
    verb,
    wants_screen,
    watched_training_of,
)
from moesim.errors import UserError

if TYPE_CHECKING:
    from moesim.trace import RoutingTrace
    from moesim.trace.library import LibraryEntry


def show_library(args: argparse.Namespace) -> int:
    """List the entries that match (`library:`, `library:64x6/*`), or show or save one. Raises UserError."""
    from moesim.scenario.routing import LIBRARY_PREFIX
    from moesim.trace.library import find_entry, library_entries, load_library

    name = str(args.scenario).removeprefix(LIBRARY_PREFIX)
    if args.overrides:
        raise UserError(f"--set changes a scenario, and {args.scenario} is none; leave it out")
    if not name or any(sign in name for sign in "*?["):
        _list_entries([entry for entry in library_entries() if fnmatch.filter(entry.names, name or "*")], args)
        return 0
    entry = find_entry(name)
    trace = load_library(name)
    _save(trace, args)
    from moesim.report.catalogue_view import entry_facts, print_entry

    if wants_screen(args, entry_facts(entry, trace)):
        print_entry(entry, trace)
    return 0


def _save(trace: "RoutingTrace", args: argparse.Namespace) -> None:
    """Where --out says."""
    if args.out is not None:
        from moesim.trace import save_trace

        args.out.parent.mkdir(parents=True, exist_ok=True)
        save_trace(trace, args.out, replace=args.force)


def _list_entries(entries: "list[LibraryEntry]", args: argparse.Namespace) -> None:
    if args.out is not None:
        raise UserError("--out saves one trace; name one entry, e.g. library:64x6/published")
    if not entries:
        raise UserError(f"{args.scenario}: no entry has such a name; `moesim trace library:` lists all")
    if wants_screen(args, [asdict(entry) for entry in entries]):
        from moesim.report.catalogue_view import print_entries

        print_entries(entries)


@verb(
    "trace",
    "Make or show the routing trace of a scenario, or shipped routing: `library:` lists it, `library:NAME` shows one.",
    shipped_file("scenario", "scenario file (YAML) or shipped name, `library:NAME`, or `library:` for all"),
    OVERRIDES,
    Flag("--out", metavar="FILE", type=Path, help="save the trace there (.npz), for routing.kind: trace"),
    CACHE,
    JSON,
    QUIET,
    FORCE,
)
def trace(args: argparse.Namespace) -> int:
    """Make the trace, save it where asked, show it. Raises UserError, InfeasibleError and Interrupted."""
    if args.out is not None:
        check_new(args.out, force=args.force)
    if str(args.scenario).startswith("library:"):
        return show_library(args)
    from moesim.run import obtain_trace

    scenario = load(args)
    with watched_training_of(scenario, args, quiet=args.quiet) as progress:
        made = obtain_trace(scenario, progress=progress, cache_dir=args.cache)
    if made is None:
        raise UserError(f"{scenario.name}: the model is dense (model.experts = 0), so nothing is routed")
    _save(made, args)
    if args.json or not args.quiet:
        from moesim.report.run_view import print_trace, relative_load_LE, summarise

        summary = summarise(scenario, made)
        if wants_screen(args, summary):
            first_LE, last_LE = relative_load_LE(made, first=True), relative_load_LE(made, first=False)
            print_trace(scenario.name, summary, first_LE=first_LE, last_LE=last_LE)
    return 0


@verb(
    "trace import",
    "Make a routing trace of what others recorded: training programs, servers, tables (parquet) or counts.",
    Flag(
        "kind",
        metavar="KIND",
        help="flame, megatron, sglang, vllm, trtllm, olmoe, table or counts; auto tells the form by the content",
    ),
    Flag("path", metavar="PATH", type=Path, help="the file or folder that was recorded"),
    Flag("--out", metavar="FILE", type=Path, required=True, help="the trace, for routing.kind: trace"),
    Flag(
        "--model",
        metavar="NAME",
        help="a model of the catalogue or a config.json: gives experts and top-K, and refuses what differs",
    ),
    Flag("--experts", metavar="N", type=int, help="routed experts of a layer, where the source is silent"),
    Flag("--top-k", metavar="K", type=int, help="experts of a token, where the source holds counts alone"),
    Flag("--sequence-length", metavar="TOKENS", type=int, help="where the source does not part sequences"),
    Flag("--tokens", metavar="N", type=int, default=65_536, help="drawn from counts; 65,536 by default"),
    Flag("--seed", metavar="N", type=int, default=0, help="of what is drawn; 0 by default"),
    JSON,
    QUIET,
    FORCE,
)
def trace_import(args: argparse.Namespace) -> int:
    """Read the source, save the trace, say what was read. Raises UserError."""
    check_new(args.out, force=args.force)
    check_positive(args, "experts", "top_k", "tokens", "sequence_length")
    from moesim.routing.importing import ImportRequest, import_routing

    experts, top_k = _of_model(args)
    asked = ImportRequest(
        experts=experts, top_k=top_k, sequence_length=args.sequence_length, tokens=args.tokens, seed=args.seed
    )
    made = import_routing(args.kind, args.path, asked=asked)
    return _save_and_tell(made, _summary_of_import(made), args)


def _of_model(args: argparse.Namespace) -> tuple[int | None, int | None]:
    """Experts and top-K: those of --model where it is given, else of their flags."""
    if args.model is None:
        return args.experts, args.top_k
    from moesim.cli.catalogue import find_model

    model = find_model(args.model, [])
    if model.experts == 0:
        raise UserError(f"--model {args.model} is dense; name a model that has experts")
    for flag, value, of_model in (("experts", args.experts, model.experts), ("top-k", args.top_k, model.top_k)):
        if value not in (None, of_model):
            raise UserError(f"--{flag} {value}, but {args.model} has {of_model}; leave one of them out")
    return model.experts, model.top_k


def _save_and_tell(trace: "RoutingTrace", facts: dict[str, object], args: argparse.Namespace) -> int:
    """Save a trace that was read, and print the facts of it."""
    _save(trace, args)
    facts = {"trace": str(args.out), **facts, "notes": trace.provenance["notes"] or ["none"]}
    if wants_screen(args, facts):
        for key, value in facts.items():
            print(f"{key.replace('_', ' ')}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return 0


def _summary_of_import(trace: "RoutingTrace") -> dict[str, object]:
    from moesim.scenario.routers import ROUTERS

    drawn = ROUTERS[trace.router.kind].drawn
    return {
        "form": trace.provenance["form"],
        "read": f"counts, from which {trace.final.num_tokens} tokens were drawn" if drawn else "experts of every token",
        "steps": [step.step for step in trace.steps],
        "layers": trace.provenance["layers"],
        "experts": trace.router.num_experts,
        "top_k": trace.router.top_k,
        "sequences": trace.num_sequences,
        "sequence_length": trace.sequence_length,
    }


@verb(
    "trace hf",
    "Make a routing trace of a transformers MoE model in a local folder (safetensors) that reads a text.",
    Flag("model", metavar="MODEL_DIR", type=Path, help="folder with config.json and safetensors"),
    Flag("--text", metavar="FILE", type=Path, required=True, help="what the model reads"),
    Flag("--out", metavar="FILE", type=Path, required=True, help="the trace, for routing.kind: trace"),
    Flag("--tokens", metavar="N", type=int, default=65_536, help="read at most; 65,536 by default"),
    Flag(
        "--sequence-length",
        metavar="TOKENS",
        type=int,
        help="4,096 by default, or fewer where the model or the text ends before",
    ),
    Flag("--batch", metavar="N", type=int, default=1, help="sequences read at a time; 1 by default"),
    Flag("--device", metavar="NAME", default="auto", help="cpu, cuda, cuda:1 ...; auto: CUDA if any"),
    JSON,
    QUIET,
    FORCE,
)
def trace_hf(args: argparse.Namespace) -> int:
    """Load the model, read the text, save the trace, say what was seen. Raises UserError."""
    check_new(args.out, force=args.force)
    check_positive(args, "tokens", "sequence_length", "batch")
    from moesim.display import opened_display
    from moesim.routing.hf import ReadingOptions, record_model

    reading = ReadingOptions(
        tokens=args.tokens, sequence_length=args.sequence_length, batch=args.batch, device=args.device
    )
    with opened_display(quiet=args.quiet) as display:

        def show(completed: int, total: int) -> None:
            if display is not None:
                display.show("tokens", completed=completed, total=total)

        made = record_model(args.model, args.text, reading=reading, progress=show)
    return _save_and_tell(made, _summary_of_model(made), args)


def _summary_of_model(trace: "RoutingTrace") -> dict[str, object]:
    from moesim.trace.metrics import imbalance

    load_LE = trace.final_load_LE
    return {
        "routers": trace.provenance["routers"],
        "router": trace.router.kind,
        "layers": trace.provenance["layers"],
        "experts": trace.router.num_experts,
        "top_k": trace.router.top_k,
        "groups": f"{trace.router.group_limit} of {trace.router.num_groups}",
        "sequences": trace.num_sequences,
        "sequence_length": trace.sequence_length,
        "imbalance": round(float(imbalance(load_LE).mean()), 3),
    }


@verb(
    "trace export",
    "Write a routing trace (a file or library:NAME) as a parquet table: a row per step, layer and token.",
    Flag("trace", metavar="TRACE", help="a trace file, or library:NAME for one that ships"),
    Flag("--out", metavar="FILE", type=Path, required=True, help="the parquet file"),
    QUIET,
    FORCE,
)
def trace_export(args: argparse.Namespace) -> int:
    """Write the table. Raises UserError."""
    check_new(args.out, force=args.force)
    from moesim.api import load_trace
    from moesim.routing.importing.source import write_parquet

    rows = write_parquet(load_trace(args.trace), args.out)
    if not args.quiet:
        print(f"{rows} rows in {args.out}")
    return 0
