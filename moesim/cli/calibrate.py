"""`moesim calibrate`: measure the kernels of the machine at hand and write a profile."""

import argparse
from pathlib import Path

from moesim.cli.flags import add_quiet, check_writable
from moesim.cli.interrupt import INTERRUPTED_EXIT_CODE
from moesim.errors import UserError

NAME = "calibrate"
SUMMARY = "Measure this machine's kernels and write a profile for compute.profile (under torchrun for several GPUs)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--device, --out, --name, --budget, --families, --quiet."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what to measure; cuda by default")
    parser.add_argument(
        "--out", metavar="FILE", type=Path, required=True, help="the profile; an existing one is extended"
    )
    parser.add_argument("--name", help="name of the profile; that of the file by default")
    parser.add_argument(
        "--budget", metavar="SECONDS", type=float, default=420.0, help="time to measure; 420 by default"
    )
    parser.add_argument("--families", metavar="A,B", help="only these families of kernels, comma-separated")
    add_quiet(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Measure and write. Raises UserError; an interrupt keeps what was measured and says so."""
    if not args.budget > 0:
        raise UserError(f"--budget {args.budget} is not a time in seconds; use e.g. 420")
    check_writable(args.out)
    from moesim.compute.benchmarks.calibrate import BUDGET_SHARES, run_calibration

    families = tuple(args.families.split(",")) if args.families else tuple(BUDGET_SHARES)
    try:
        run_calibration(
            device=args.device, out=args.out, name=args.name, budget=args.budget, families=families, quiet=args.quiet
        )
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT_CODE  # the calibration has said what it keeps
    return 0
