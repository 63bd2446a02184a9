"""`moesim topology`: the fabric of a scenario in numbers and as a drawing."""

import argparse
from pathlib import Path

from moesim.cli.flags import add_force, add_json, add_scenario, load
from moesim.cli.outputs import add_page, place_of_page, write_output
from moesim.strict_json import json_text

NAME = "topology"
SUMMARY = "Print and draw the fabric of a scenario: nodes, links, bisection, oversubscription, degraded parts."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SCENARIO, --set, --out, --json, --force."""
    add_scenario(parser)
    add_page(parser, what="the drawing", file=f"{NAME}.html")
    add_json(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Print and draw. Raises UserError."""
    scenario = load(args)
    path: Path | None = place_of_page(args, name=scenario.name, file=f"{NAME}.html")
    from moesim.report.topology import fabric_json, fabric_page, print_fabric
    from moesim.report.topology_layout import fabric_parts

    parts = fabric_parts(scenario.cluster)
    if path is not None:
        write_output(fabric_page(scenario.name, parts), path, force=args.force)
    if args.json:
        print(json_text(fabric_json(parts), indent=1))
    else:
        print_fabric(scenario.name, parts)
        print(f"\ndrawn in {path}")
    return 0
