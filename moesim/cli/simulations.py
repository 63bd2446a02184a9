"""Verbs that simulate one scenario: `moesim run` a step, `serve` requests, `goodput` days of training."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.catalogue import (
    add_launch,
    add_software,
    flags_json,
    print_command,
    print_reading_summary,
    read_launch_of,
)
from moesim.cli.flags import (
    Verb,
    add_cache,
    add_csv,
    add_file,
    add_force,
    add_json,
    add_overrides,
    add_page,
    add_quiet,
    add_scenario,
    check_positive,
    check_writable,
    interrupts_explained_by,
    load,
    page_path,
    print_csv,
    training_left_in_cache,
    watched_training,
    write_output,
)
from moesim.errors import UserError
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.flags.megatron import Reading
    from moesim.reliability import Goodput
    from moesim.results import RunRecord
    from moesim.scenario import Scenario

TIMELINE_FILE = "timeline.json.gz"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """SCENARIO or --from-megatron, --set, --out, --timeline, --what-if, --parts, --flags, --json, --csv and more."""
    add_scenario(parser, optional=True)
    text = "simulate this Megatron-LM launch script or YAML file in place of a scenario; the script is read, never run"
    parser.add_argument("--from-megatron", metavar="ARGS.sh|yaml", type=Path, help=text)
    add_launch(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the run; runs/NAME by default")
    parser.add_argument(
        "--timeline",
        metavar="RANKS",
        nargs="?",
        type=_ranks_of_text,
        const=(),
        help="also write timeline.json.gz for Perfetto and trace tools; --timeline=0,3 for these ranks alone",
    )
    parser.add_argument(
        "--what-if",
        metavar="all",
        nargs="?",
        type=_what_if_of_text,
        const=False,
        help="also simulate the step with balanced routing, twice the network, no overlap and, where that needs no "
        "training, without the router's group limit; --what-if=all trains another router for the last",
    )
    parser.add_argument(
        "--parts",
        action="store_true",
        help="also print the parts of the step: one forward, one backward pass, overlapped pairs, optimizer, idle time",
    )
    parser.add_argument(
        "--allow-infeasible",
        action="store_true",
        help="simulate a layout that does not fit into memory all the same, and warn (memory.check=warn)",
    )
    add_software(parser, of="the layout")
    add_cache(parser)
    add_csv(add_json(parser))
    add_quiet(parser)
    add_force(parser)


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


def execute_run(args: argparse.Namespace) -> int:
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
        from moesim.report import check_ranks

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
    beside = {
        "--gpu": args.gpu,
        "--gpus": args.gpus,
        "--routing": args.routing,
        "--var": args.variables,
        "--args": args.arguments,
    }
    for flag, given in beside.items():
        if given:
            raise UserError(f"{flag} goes with --from-megatron; a scenario says it itself (--set cluster.gpu=h200)")
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
    from moesim.report import write_report, write_timeline
    from moesim.results.store import write_run

    also: dict[str, Callable[[Path], object]] = {"report.html": lambda path: write_report(record, path)}
    if args.timeline is not None:
        also[TIMELINE_FILE] = lambda path: write_timeline(record, path, ranks=args.timeline)
    write_run(record, out_dir, force=args.force, also=also)


def _show_run(record: "RunRecord", out_dir: Path, args: argparse.Namespace) -> None:
    if args.json:
        print(json_text({**record.result, **flags_json(record.scenario, args.flags)}, indent=1))
    elif args.csv:
        print_csv([record.result])
    elif not args.quiet:
        from moesim.report import print_facts

        print_facts(record.result)
        if args.parts:
            from moesim.report.run_view import print_parts

            print_parts(record)
        if args.flags:
            print_command(flags_json(record.scenario, args.flags)["flags"][args.flags])
        print(f"\nwritten to {out_dir}: open {out_dir / 'report.html'}")
        if args.timeline is not None:
            print(f"timeline for ui.perfetto.dev: {out_dir / TIMELINE_FILE}")


RUN = Verb(
    "run",
    "Simulate a scenario: train or load its router, run one step on the cluster, report where the time goes.",
    add_run_arguments,
    execute_run,
)


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """SCENARIO, --set, --max-load, --seeds, --worst, --out, --json, --quiet, --force."""
    add_file(parser, "serving", text="serving scenario (YAML), or the name of one that ships")
    add_overrides(parser)
    text = "the most requests per second that meet workload.slo, by bisection, and the answers at that load"
    parser.add_argument("--max-load", action="store_true", help=text)
    text = "draws of arrivals, whose least and most are given as ranges; 1 by default"
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help=text)
    text = "with --max-load and --seeds: every draw must meet workload.slo, not their mean alone"
    parser.add_argument("--worst", action="store_true", help=text)
    add_page(parser, what="the load over time", file="serve.html")
    add_json(parser)
    add_quiet(parser)
    add_force(parser)


def execute_serve(args: argparse.Namespace) -> int:
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

    if args.json:
        print(json_text(result, indent=1))
    elif not args.quiet:
        print_serving(result)  # first: what was simulated is not lost where a file is in the way
    if path is not None:
        write_output(serving_page(result), path, force=args.force)
        write_output(json_text(result, indent=1) + "\n", path.with_suffix(".json"), force=args.force)
        if not args.quiet and not args.json:
            print(f"\nplotted in {path}, its numbers in {path.with_suffix('.json')}")
    return 0


def _answers(scenario: Any, args: argparse.Namespace) -> dict[str, Any]:
    from moesim.serving import largest_load, serve, serve_seeds

    if args.max_load:
        return largest_load(scenario, seeds=args.seeds, worst=args.worst)
    return serve(scenario) if args.seeds == 1 else serve_seeds(scenario, args.seeds)


SERVE = Verb(
    "serve",
    "Serve requests on a cluster: time to first token, time per token, throughput, price, largest load.",
    add_serve_arguments,
    execute_serve,
)


def add_goodput_arguments(parser: argparse.ArgumentParser) -> None:
    """SCENARIO, --set, --days, --seeds, --out, --cache, --json, --csv, --quiet, --force."""
    add_scenario(parser)
    parser.add_argument("--days", metavar="D", type=float, default=54.0, help="days that are simulated; 54 by default")
    text = "draws of failures, over which the 90 %% range is taken; 20 by default"
    parser.add_argument("--seeds", metavar="N", type=int, default=20, help=text)
    add_page(parser, what="goodput over time, lost time by cause, goodput by interval", file="goodput.html")
    add_cache(parser)
    add_csv(add_json(parser))
    add_quiet(parser)
    add_force(parser)


def execute_goodput(args: argparse.Namespace) -> int:
    """Simulate, print, plot. Raises UserError, InfeasibleError and Interrupted."""
    scenario = load(args)
    path = None if args.csv and args.out is None else page_path(args, name=scenario.name, file="goodput.html")
    found = _goodput(scenario, args)
    from moesim.report.goodput_view import goodput_page, print_goodput

    if path is not None:
        write_output(goodput_page(found), path, force=args.force)
        write_output(json_text(found.result, indent=1) + "\n", path.with_suffix(".json"), force=args.force)
    if args.json:
        print(json_text(found.result, indent=1))
    elif args.csv:
        print_csv([found.result])
    elif not args.quiet and path is not None:
        print_goodput(found.result)
        print(f"\nplotted in {path}, its numbers in {path.with_suffix('.json')}")
    return 0


def _goodput(scenario: "Scenario", args: argparse.Namespace) -> "Goodput":
    from moesim.reliability import goodput

    quiet = args.quiet or args.json or args.csv
    with (
        interrupts_explained_by(lambda: training_left_in_cache(scenario, args.cache)),
        watched_training(quiet=quiet) as progress,
    ):
        return goodput(scenario, days=args.days, seeds=args.seeds, progress=progress, cache_dir=args.cache)


GOODPUT = Verb(
    "goodput",
    "Train for days with failures, checkpoints and slow parts: kept work, lost time by cause, best interval, price.",
    add_goodput_arguments,
    execute_goodput,
)
