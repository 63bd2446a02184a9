"""`moesim topology`: the fabric of a scenario in numbers and as a drawing."""

import argparse
import json
from pathlib import Path

from moesim.cli.flags import add_force, add_json, add_scenario, check_writable, load
from moesim.errors import UserError

NAME = "topology"
SUMMARY = "Print the fabric of a scenario: nodes, links, bisection, oversubscription; draw it with --out."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SCENARIO, --set, --out, --json, --force."""
    add_scenario(parser)
    parser.add_argument("--out", metavar="FILE", type=Path, help="draw the fabric there (.html, works offline)")
    add_json(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Print and draw. Raises UserError."""
    if args.out is not None:
        if args.out.exists() and not args.force:
            raise UserError(f"{args.out} exists; choose another --out, or --force to replace it")
        check_writable(args.out)
    scenario = load(args)
    from moesim.network import build_fabric, describe
    from moesim.report.topology import fabric_json, print_fabric, write_fabric

    fabric = describe(build_fabric(scenario.cluster))
    if args.json:
        print(json.dumps(fabric_json(fabric), indent=1))
    else:
        print_fabric(scenario.name, fabric)
    if args.out is not None:
        write_fabric(scenario.name, fabric, args.out)
    return 0
