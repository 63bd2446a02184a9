"""`moesim sweep`: simulate a scenario along the axes of a study, into a folder that can be resumed."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.cli.flags import (
    add_cache,
    add_json,
    add_overrides,
    add_quiet,
    add_workers,
    check_workers,
    check_writable,
)
from moesim.cli.interrupt import interrupts_say
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.sweeper import Study, SweepFolder, SweepOutcome

NAME = "sweep"
SUMMARY = "Simulate a scenario along the axes of a study; every finished point is kept at once, a rerun does the rest."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """STUDY, --set, --out, --workers, --cluster, --retry, --dry-run, --cache, --json, --quiet."""
    parser.add_argument("study", metavar="STUDY", type=Path, help="study file (YAML): name, base, axes")
    add_overrides(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the sweep; runs/NAME by default")
    add_workers(parser)
    parser.add_argument("--retry", action="store_true", help="also run the points again that failed before")
    parser.add_argument("--dry-run", action="store_true", help="list the points and simulate none")
    add_cache(parser)
    add_json(parser)
    add_quiet(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Run the missing points. Returns 0 when none failed, 1 when one did, 2 when none fits its cluster.

    Raises UserError and Interrupted.
    """
    check_workers(args)
    from moesim.sweeper import SweepFolder, load_study

    study = load_study(args.study, args.overrides)
    folder = SweepFolder(args.out or Path("runs") / study.name)
    folder.check(study)
    if args.dry_run:
        _list(study, folder, as_json=args.json)
        return 0
    check_writable(folder.path)
    again = f"run the same command again to go on from {folder.path}"
    with interrupts_say(lambda: f"{len(folder.records())} of {study.num_points} points are kept; {again}"):
        outcome = _run(study, folder, args)
    _show(study, folder, outcome, args)
    return outcome.exit_code


def _run(study: "Study", folder: "SweepFolder", args: argparse.Namespace) -> "SweepOutcome":
    from moesim.study import watched_points
    from moesim.sweeper import sweep

    with watched_points(quiet=args.quiet) as watch:
        return sweep(
            study,
            folder,
            workers=args.workers,
            cluster=args.cluster,
            retry=args.retry,
            cache_dir=args.cache,
            watch=watch,
        )


def _list(study: "Study", folder: "SweepFolder", *, as_json: bool) -> None:
    finished = folder.records()
    if as_json:
        reasons = {misfit.id: misfit.reason for misfit in study.misfits}
        rows = [
            {
                "id": point.id,
                "number": point.number,
                "values": dict(point.values),
                "status": finished[point.id].status if point.id in finished else None,
                "misfit": reasons.get(point.id),
            }
            for point in study.by_number
        ]
        print(json_text({"study": study.as_json(), "points": rows}, indent=1))
    else:
        from moesim.sweeper import print_points

        print_points(study, finished)


def _show(study: "Study", folder: "SweepFolder", outcome: "SweepOutcome", args: argparse.Namespace) -> None:
    if args.json:
        records = [asdict(record) for record in outcome.records]
        print(json_text({"study": study.as_json(), "points": records}, indent=1))
    elif not args.quiet:
        from moesim.sweeper import print_sweep

        print_sweep(study, outcome)
        if outcome.torn:
            print("a line that a crash had left half-written was cut off and its point simulated again")
        print(f"\n{outcome.new} new points in {folder.path}; draw them with: moesim plot {folder.path}")
