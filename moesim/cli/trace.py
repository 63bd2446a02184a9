"""`moesim trace`: make or show the routing trace of a scenario, or an entry of the library (`library:NAME`)."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.cli.flags import add_cache, add_force, add_json, add_quiet, add_scenario, check_new, load
from moesim.cli.library import show_library
from moesim.cli.session import interrupts_say, kept_of_training, watched_training
from moesim.errors import UserError
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.scenario import Scenario
    from moesim.trace import RoutingTrace

NAME = "trace"
SUMMARY = (
    "Make or show the routing trace of a scenario, or shipped routing: `library:` lists it, `library:NAME` shows one."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SCENARIO or library:NAME, --set, --out, --cache, --json, --quiet, --force."""
    add_scenario(parser, text="scenario file (YAML) or shipped name, `library:NAME`, or `library:` for all")
    parser.add_argument("--out", metavar="FILE", type=Path, help="save the trace there (.npz), for routing.kind: trace")
    add_cache(parser)
    add_json(parser)
    add_quiet(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Make the trace, save it where asked, show it. Raises UserError, InfeasibleError and Interrupted."""
    if args.out is not None:
        check_new(args.out, force=args.force)
    if str(args.scenario).startswith("library:"):
        return show_library(args)
    scenario = load(args)
    with interrupts_say(lambda: kept_of_training(scenario, args.cache)):
        trace = _make(scenario, quiet=args.quiet, cache_dir=args.cache)
    if args.out is not None:
        from moesim.trace import save_trace

        args.out.parent.mkdir(parents=True, exist_ok=True)
        save_trace(trace, args.out, replace=args.force)
    if args.json or not args.quiet:
        _show(scenario, trace, as_json=args.json)
    return 0


def _make(scenario: "Scenario", *, quiet: bool, cache_dir: Path | None) -> "RoutingTrace":
    from moesim.run import obtain_trace

    with watched_training(quiet=quiet) as progress:
        trace = obtain_trace(scenario, progress=progress, cache_dir=cache_dir)
    if trace is None:
        raise UserError(f"{scenario.name}: the model is dense (model.experts = 0), so nothing is routed")
    return trace


def _show(scenario: "Scenario", trace: "RoutingTrace", *, as_json: bool) -> None:
    from moesim.report.terminal import relative_load_LE, summarise

    summary = summarise(scenario, trace)
    if as_json:
        print(json_text(summary, indent=1))
        return
    from moesim.report.terminal import print_trace

    first_LE, last_LE = relative_load_LE(trace, first=True), relative_load_LE(trace, first=False)
    print_trace(scenario.name, summary, first_LE=first_LE, last_LE=last_LE)
