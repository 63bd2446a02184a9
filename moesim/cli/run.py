"""`moesim run`: simulate one scenario, write its folder, show the facts."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.cli.flags import add_cache, add_csv, add_force, add_json, add_quiet, add_scenario, check_writable, load
from moesim.cli.launches import (
    add_launch,
    add_software,
    flags_json,
    print_command,
    print_reading_summary,
    read_launch_of,
)
from moesim.cli.outputs import print_csv
from moesim.cli.session import interrupts_say, kept_of_training, watched_training
from moesim.errors import UserError
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.flags.from_megatron import Reading
    from moesim.results import RunRecord
    from moesim.scenario import Scenario

TIMELINE_FILE = "timeline.json.gz"
NAME = "run"
SUMMARY = "Simulate a scenario: train or load its router, run one step on the cluster, report where the time goes."


def add_arguments(parser: argparse.ArgumentParser) -> None:
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
        type=_ranks,
        const=(),
        help="also write timeline.json.gz for Perfetto and trace tools; --timeline=0,3 for these ranks alone",
    )
    parser.add_argument(
        "--what-if",
        metavar="all",
        nargs="?",
        type=_questions,
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
    parser.set_defaults(execute=execute)


def _ranks(text: str) -> tuple[int, ...]:
    words = text.split(",")
    if not all(word.isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ranks; write --timeline behind SCENARIO, or =0,3")
    return tuple(int(word) for word in words)


def _questions(text: str) -> bool:
    """Whether another router may be trained."""
    if text != "all":
        raise argparse.ArgumentTypeError(f"{text!r} is no choice; write --what-if behind SCENARIO, or --what-if=all")
    return True


def execute(args: argparse.Namespace) -> int:
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
    with claimed(out_dir), interrupts_say(lambda: kept_of_training(scenario, args.cache)):
        check_free(out_dir, force=args.force)
        record = _simulate(scenario, args)
        _write(record, out_dir, args)
    if reading is not None and not (args.json or args.csv or args.quiet):
        print_reading_summary(reading)
    _show(record, out_dir, args)
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


def _simulate(scenario: "Scenario", args: argparse.Namespace) -> "RunRecord":
    from moesim.run import simulate
    from moesim.whatif import what_if

    with watched_training(quiet=args.quiet) as progress:
        record = simulate(scenario, progress=progress, cache_dir=args.cache)
    if args.what_if is None:
        return record
    with watched_training(quiet=args.quiet) as progress:
        return what_if(record, train=args.what_if, progress=progress, cache_dir=args.cache)


def _write(record: "RunRecord", out_dir: Path, args: argparse.Namespace) -> None:
    from moesim.report import write_report, write_timeline
    from moesim.results.store import write_run

    also: dict[str, Callable[[Path], object]] = {"report.html": lambda path: write_report(record, path)}
    if args.timeline is not None:
        also[TIMELINE_FILE] = lambda path: write_timeline(record, path, ranks=args.timeline)
    write_run(record, out_dir, force=args.force, also=also)


def _show(record: "RunRecord", out_dir: Path, args: argparse.Namespace) -> None:
    if args.json:
        print(json_text({**record.result, **flags_json(record.scenario, args.flags)}, indent=1))
    elif args.csv:
        print_csv([record.result])
    elif not args.quiet:
        from moesim.report import print_facts

        print_facts(record.result)
        if args.parts:
            from moesim.report.parts_screen import print_parts

            print_parts(record)
        if args.flags:
            print_command(flags_json(record.scenario, args.flags)["flags"][args.flags])
        print(f"\nwritten to {out_dir}: open {out_dir / 'report.html'}")
        if args.timeline is not None:
            print(f"timeline for ui.perfetto.dev: {out_dir / TIMELINE_FILE}")
