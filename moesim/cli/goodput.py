"""`moesim goodput SCENARIO`: what failures, checkpoints and slow parts leave of a training over days."""

import argparse
from typing import TYPE_CHECKING

from moesim.cli.flags import add_cache, add_csv, add_force, add_json, add_quiet, add_scenario, load
from moesim.cli.outputs import add_page, place_of_page, print_csv, write_output
from moesim.cli.session import interrupts_say, kept_of_training, watched_training
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.reliability import Goodput
    from moesim.scenario import Scenario

NAME = "goodput"
SUMMARY = (
    "Train for days with failures, checkpoints and slow parts: kept work, lost time by cause, best interval, price."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SCENARIO, --set, --days, --seeds, --out, --cache, --json, --csv, --quiet, --force."""
    add_scenario(parser)
    parser.add_argument("--days", metavar="D", type=float, default=54.0, help="days that are simulated; 54 by default")
    text = "draws of failures, over which the 90 %% range is taken; 20 by default"
    parser.add_argument("--seeds", metavar="N", type=int, default=20, help=text)
    add_page(parser, what="goodput over time, lost time by cause, goodput by interval", file=f"{NAME}.html")
    add_cache(parser)
    add_csv(add_json(parser))
    add_quiet(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Simulate, print, plot. Raises UserError, InfeasibleError and Interrupted."""
    scenario = load(args)
    path = None if args.csv and args.out is None else place_of_page(args, name=scenario.name, file=f"{NAME}.html")
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
    with interrupts_say(lambda: kept_of_training(scenario, args.cache)), watched_training(quiet=quiet) as progress:
        return goodput(scenario, days=args.days, seeds=args.seeds, progress=progress, cache_dir=args.cache)
