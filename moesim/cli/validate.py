"""`moesim validate`: run real training beside its simulation, or recompute the shipped comparison."""

import argparse
from pathlib import Path

from moesim.cli.flags import add_json, add_overrides, add_quiet
from moesim.cli.interrupt import interrupts_say
from moesim.strict_json import json_text

NAME = "validate"
SUMMARY = "Run real training on this machine's devices, simulate the same, and show both with the error per part."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[SCENARIO], --set, --device, --gpus, --profile, --only, --seconds, --out, --report, --json, --quiet."""
    parser.add_argument(
        "scenario", metavar="SCENARIO", type=Path, nargs="?", help="run this one, not the standard cases"
    )
    add_overrides(parser)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where to run; cuda by default")
    parser.add_argument("--gpus", metavar="N", type=int, default=1, help="processes, one device each; 1 by default")
    parser.add_argument("--profile", metavar="NAME", help="predict from this profile (name or file); cpu needs one")
    parser.add_argument("--only", metavar="TEXT", help="only the cases whose name contains TEXT")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds of measured steps per case; 2 by default")
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the measurements; validation by default")
    parser.add_argument("--report", action="store_true", help="run nothing: predict the shipped measurements again")
    add_json(parser)
    add_quiet(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Run, compare, write and show. Raises UserError and Interrupted."""
    from moesim.scenario import load_scenario
    from moesim.validation import validate_command
    from moesim.validation.table import table_json

    kept = args.out or Path("validation")
    with interrupts_say(lambda: f"finished cases are kept in {kept}; the same command goes on from there"):
        table = validate_command(
            device=args.device,
            gpus=args.gpus,
            out=args.out,
            scenario=None if args.scenario is None else load_scenario(args.scenario, args.overrides),
            profile=args.profile,
            only=args.only,
            seconds=args.seconds,
            report=args.report,
            quiet=args.quiet or args.json,
        )
    if args.json:
        print(json_text(table_json(table), indent=1))
    return 0
