"""`moesim serve SCENARIO`: latencies, throughput and price of a deployment under a load of requests."""

import argparse
from typing import Any

from moesim.cli.flags import add_file, add_force, add_json, add_overrides, add_quiet, check_positive
from moesim.cli.outputs import add_page, place_of_page, write_output
from moesim.errors import UserError
from moesim.strict_json import json_text

NAME = "serve"
SUMMARY = "Serve requests on a cluster: time to first token, time per token, throughput, price, largest load."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SCENARIO, --set, --max-load, --seeds, --out, --json, --quiet, --force."""
    add_file(parser, "serving", text="serving scenario (YAML), or the name of one that ships")
    add_overrides(parser)
    text = "the most requests per second that meet workload.slo, by bisection, and the answers at that load"
    parser.add_argument("--max-load", action="store_true", help=text)
    text = "draws of arrivals, whose least and most are given as ranges; 1 by default"
    parser.add_argument("--seeds", metavar="N", type=int, default=1, help=text)
    add_page(parser, what="the load over time", file=f"{NAME}.html")
    add_json(parser)
    add_quiet(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Serve, print, plot. Raises UserError and InfeasibleError."""
    check_positive(args, "seeds")
    if args.max_load and args.seeds > 1:
        raise UserError("--max-load searches with one draw of arrivals; leave --seeds out")
    from moesim.serving import load_serving
    from moesim.shipped import resolve

    scenario = load_serving(resolve(args.serving, "serving"), args.overrides)
    path = place_of_page(args, name=scenario.name, file=f"{NAME}.html")
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
        return largest_load(scenario)
    return serve(scenario) if args.seeds == 1 else serve_seeds(scenario, args.seeds)
