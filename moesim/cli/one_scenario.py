"""Verbs that simulate one scenario: `moesim run` a step, `serve` requests, `goodput` days of training."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.flags import (
    CACHE,
    FORCE,
    JSON,
    JSON_OR_CSV,
    OPTIONAL_SCENARIO,
    OVERRIDES,
    QUIET,
    SCENARIO,
    Flag,
    check_positive,
    check_writable,
    interrupts_explained_by,
    load,
    page_flag,
    page_path,
    shipped_file,
    training_left_in_cache,
    verb,
    wants_screen,
    watched_training,
    watched_training_of,
    write_page,
)
from moesim.cli.launches import LAUNCH, flags_json, print_command, print_reading_summary, read_launch_of, software_flag
from moesim.errors import UserError

if TYPE_CHECKING:
    from moesim.flags.megatron import Reading
    from moesim.results import RunRecord
    from moesim.scenario import Scenario

TIMELINE_FILE = "timeline.json.gz"


def _ranks_of_text(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ranks; write --timeline behind SCENARIO, or =0,3")
    return tuple(int(word) for word in words)


def _what_if_of_text(text: str) -> bool:
    """Whether another router may be trained."""
    if text != "all":
        raise argparse.ArgumentTypeError(f"{text!r} is no choice; write --what-if behind SCENARIO, or --what-if=all")
    return True


@verb(
    "run",
    "Simulate a scenario: train or load its router, run one step on the cluster, report where the time goes.",
    OPTIONAL_SCENARIO,
    OVERRIDES,
    Flag(
        "--from-megatron",
        metavar="ARGS.sh|yaml",
        type=Path,
        help="simulate this Megatron-LM launch script or YAML file in place of a scenario; the script is read, never "
        "run",
    ),
    LAUNCH,
    Flag("--out", metavar="DIR", type=Path, help="folder of the run; runs/NAME by default"),
    Flag(
        "--timeline",
        metavar="RANKS",
        nargs="?",
        type=_ranks_of_text,
        const=(),
        help="also write timeline.json.gz for Perfetto and trace tools; --timeline=0,3 for these ranks alone",
    ),
    Flag(
        "--what-if",
        metavar="all",
        nargs="?",
        type=_what_if_of_text,
        const=False,
        help="also simulate the step with balanced routing, twice the network, no overlap and, where that needs no "
        "training, without the router's group limit; --what-if=all trains another router for the last",
    ),
    Flag(
        "--parts",
        action="store_true",
        help="also print the parts of the step: one forward, one backward pass, overlapped pairs, optimizer, idle time",
    ),
    Flag(
        "--allow-infeasible",
        action="store_true",
        help="simulate a layout that does not fit into memory all the same, and warn (memory.check=warn)",
    ),
    software_flag(of="the layout"),
    CACHE,
    JSON_OR_CSV,
    QUIET,
    FORCE,
)
def run(args: argparse.Namespace) -> int:
    """Run the scenario. Raises UserError, InfeasibleError and Interrupted."""
    from moesim.files import claimed
    from moesim.results.store import check_free

    if args.allow_infeasible:
        args.overrides = [*args.overrides, "memory.check=warn"]
    reading = _reading(args)
    scenario = load(args) if reading is None else reading.scenario
    out_dir = args.out or Path("runs") / scenario.name
    check_writable(out_dir)
    if args.timeline:
        from moesim.report.timeline import check_ranks

        check_ranks(scenario, args.timeline)
    with claimed(out_dir), interrupts_explained_by(lambda: training_left_in_cache(scenario, args.cache)):
        check_free(out_dir, force=args.force)
        record = _record(scenario, args)
        _write_run_folder(record, out_dir, args)
    if reading is not None and not (args.json or args.csv or args.quiet):
        print_reading_summary(reading)
    _show_run(record, out_dir, args)
    return 0


def _reading(args: argparse.Namespace) -> "Reading | None":
    """The launch that is simulated in place of a scenario. Raises UserError where neither or both are named."""
    if args.from_megatron is not None and args.scenario is not None:
        raise UserError("--from-megatron stands for the scenario; leave SCENARIO out")
    if args.from_megatron is not None:
        return read_launch_of(args, args.from_megatron)
    if args.scenario is None:
        raise UserError("name a SCENARIO, or a launch with --from-megatron; `moesim scenarios` lists those that ship")
    for flag in LAUNCH.flags:
        if getattr(args, flag.settings.get("dest", flag.words[0].removeprefix("--"))):
            remedy = "a scenario says it itself (--set cluster.gpu=h200)"
            raise UserError(f"{flag.words[0]} goes with --from-megatron; {remedy}")
    return None


def _record(scenario: "Scenario", args: argparse.Namespace) -> "RunRecord":
    from moesim.run import simulate
    from moesim.whatif import what_if

    with watched_training(quiet=args.quiet) as progress:
        record = simulate(scenario, progress=progress, cache_dir=args.cache)
    if args.what_if is None:
        return record
    with watched_training(quiet=args.quiet) as progress:
        return what_if(record, train=args.what_if, progress=progress, cache_dir=args.cache)


def _write_run_folder(record: "RunRecord", out_dir: Path, args: argparse.Namespace) -> None:
    from moesim.report.report import write_report
    from moesim.report.timeline import write_timeline
    from moesim.results.store import write_run

    also: dict[str, Callable[[Path], object]] = {"report.html": lambda path: write_report(record, path)}
    if args.timeline is not None:
        also[TIMELINE_FILE] = lambda path: write_timeline(record, path, ranks=args.timeline)
    write_run(record, out_dir, force=args.force, also=also)


def _show_run(record: "RunRecord", out_dir: Path, args: argparse.Namespace) -> None:
    flags = flags_json(record.scenario, args.flags)
    if not wants_screen(args, record.result | flags, [record.result]):
        return
    from moesim.report.run_view import print_facts, print_parts

    print_facts(record.result)
    if args.parts:
        print_parts(record)
    if args.flags:
        print_command(flags["flags"][args.flags])
    print(f"\nwritten to {out_dir}: open {out_dir / 'report.html'}")
    if args.timeline is not None:
        print(f"timeline for ui.perfetto.dev: {out_dir / TIMELINE_FILE}")


@verb(
    "serve",
    "Serve requests on a cluster: time to first token, time per token, throughput, price, largest load.",
    shipped_file("serving", "serving scenario (YAML), or the name of one that ships"),
    OVERRIDES,
    Flag(
        "--max-load",
        action="store_true",
        help="the most requests per second that meet workload.slo, by bisection, and the answers at that load",
    ),
    Flag(
        "--seeds",
        metavar="N",
        type=int,
        default=1,
        help="draws of arrivals, whose least and most are given as ranges; 1 by default",
    ),
    Flag(
        "--worst",
        action="store_true",
        help="with --max-load and --seeds: every draw must meet workload.slo, not their mean alone",
    ),
    page_flag(what="the load over time", file="serve.html"),
    JSON,
    QUIET,
    FORCE,
)
def serve(args: argparse.Namespace) -> int:
    """Serve, print, plot. Raises UserError and InfeasibleError."""
    check_positive(args, "seeds")
    if args.worst and not (args.max_load and args.seeds > 1):
        raise UserError("--worst is of several draws of a largest load; add --max-load --seeds N, or leave it out")
    from moesim.serving import load_serving
    from moesim.shipped import resolve

    scenario = load_serving(resolve(args.serving, "serving"), args.overrides)
    path = page_path(args, name=scenario.name, file="serve.html")
    if path is not None and path.suffix == ".json":
        raise UserError(f"--out {path}: its numbers go there; name the page, {path.with_suffix('.html')}")
    result = _answers(scenario, args)
    from moesim.report.serving_view import print_serving, serving_page

    if on_screen := wants_screen(args, result):
        print_serving(result)  # first: what was simulated is not lost where a file is in the way
    if path is not None:
        write_page(serving_page(result), result, path, force=args.force)
        if on_screen:
            print(f"\nplotted in {path}, its numbers in {path.with_suffix('.json')}")
    return 0


def _answers(scenario: Any, args: argparse.Namespace) -> dict[str, Any]:
    from moesim.serving import largest_load, serve, serve_seeds

    if args.max_load:
        return largest_load(scenario, seeds=args.seeds, worst=args.worst)
    return serve(scenario) if args.seeds == 1 else serve_seeds(scenario, args.seeds)


@verb(
    "goodput",
    "Train for days with failures, checkpoints and slow parts: kept work, lost time by cause, best interval, price.",
    SCENARIO,
    OVERRIDES,
    Flag("--days", metavar="D", type=float, default=54.0, help="days that are simulated; 54 by default"),
    Flag(
        "--seeds",
        metavar="N",
        type=int,
        default=20,
        help="draws of failures, over which the 90 %% range is taken; 20 by default",
    ),
    page_flag(what="goodput over time, lost time by cause, goodput by interval", file="goodput.html"),
    CACHE,
    JSON_OR_CSV,
    QUIET,
    FORCE,
)
def goodput(args: argparse.Namespace) -> int:
    """Simulate, print, plot. Raises UserError, InfeasibleError and Interrupted."""
    from moesim.reliability import goodput

    scenario = load(args)
    path = None if args.csv and args.out is None else page_path(args, name=scenario.name, file="goodput.html")
    with watched_training_of(scenario, args, quiet=args.quiet or args.json or args.csv) as progress:
        found = goodput(scenario, days=args.days, seeds=args.seeds, progress=progress, cache_dir=args.cache)
    from moesim.report.goodput_view import goodput_page, print_goodput

    if path is not None:
        write_page(goodput_page(found), found.result, path, force=args.force)
    if wants_screen(args, found.result) and path is not None:
        print_goodput(found.result)
        print(f"\nplotted in {path}, its numbers in {path.with_suffix('.json')}")
    return 0
