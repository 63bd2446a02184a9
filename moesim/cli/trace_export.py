"""`moesim trace export TRACE --out FILE.parquet`: a routing trace as a table for other programs."""

import argparse
from pathlib import Path

from moesim.cli.flags import add_force, add_quiet, check_new

NAME = "trace export"
SUMMARY = "Write a routing trace (a file or library:NAME) as a parquet table: a row per step, layer and token."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """TRACE, --out, --quiet, --force."""
    parser.add_argument("trace", metavar="TRACE", help="a trace file, or library:NAME for one that ships")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the parquet file")
    add_quiet(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Write the table. Raises UserError."""
    check_new(args.out, force=args.force)
    from moesim.api import load_trace
    from moesim.routing.importing.tensors import write_parquet

    rows = write_parquet(load_trace(args.trace), args.out)
    if not args.quiet:
        print(f"{rows} rows in {args.out}")
    return 0
