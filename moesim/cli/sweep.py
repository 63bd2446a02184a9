"""`moesim sweep`: simulate a scenario along the axes of a study, into a folder that can be resumed."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.flags import (
    add_cache,
    add_csv,
    add_file,
    add_json,
    add_overrides,
    add_quiet,
    add_workers,
    check_workers,
    check_writable,
)
from moesim.cli.outputs import print_csv, texts
from moesim.cli.session import interrupts_say
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.study import PointRecord
    from moesim.sweeper import Study, SweepFolder, SweepOutcome

NAME = "sweep"
SUMMARY = "Simulate a scenario along the axes of a study; every finished point is kept at once, a rerun does the rest."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """STUDY, --set, --out, --workers, --cluster, --retry, --dry-run, --cache, --json, --csv, --quiet."""
    add_file(parser, "study", text="study file (YAML): name, base, axes; or the name of one that ships")
    add_overrides(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the sweep; runs/NAME by default")
    add_workers(parser)
    parser.add_argument("--retry", action="store_true", help="also run the points again that failed before")
    parser.add_argument("--dry-run", action="store_true", help="list the points and simulate none")
    add_cache(parser)
    add_csv(add_json(parser))
    add_quiet(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Run the missing points. Returns 0 when none failed, 1 when one did, 2 when none fits its cluster.

    Raises UserError and Interrupted.
    """
    check_workers(args)
    from moesim.shipped import resolve
    from moesim.sweeper import SweepFolder, load_study

    study = load_study(resolve(args.study, "study"), args.overrides)
    folder = SweepFolder(args.out or Path("runs") / study.name)
    folder.check(study)
    if args.dry_run:
        _list(study, folder, args)
        return 0
    check_writable(folder.path)
    again = f"run the same command again to go on from {folder.path}"
    with interrupts_say(lambda: f"{len(folder.records())} of {study.num_points} points are kept; {again}"):
        outcome = _run(study, folder, args)
    _show(study, folder, outcome, args)
    return outcome.exit_code


def _run(study: "Study", folder: "SweepFolder", args: argparse.Namespace) -> "SweepOutcome":
    from moesim.display import opened_display
    from moesim.study import show_points
    from moesim.sweeper import sweep

    with opened_display(quiet=args.quiet) as display:
        return sweep(
            study,
            folder,
            workers=args.workers,
            cluster=args.cluster,
            retry=args.retry,
            cache_dir=args.cache,
            watch=None if display is None else show_points(display),
        )


def _list(study: "Study", folder: "SweepFolder", args: argparse.Namespace) -> None:
    finished = folder.records()
    reasons = {misfit.id: misfit.reason for misfit in study.misfits}
    rows: list[dict[str, Any]] = [
        {
            "id": point.id,
            "number": point.number,
            "values": dict(point.values),
            "status": finished[point.id].status if point.id in finished else None,
            "misfit": reasons.get(point.id),
        }
        for point in study.by_number
    ]
    if args.json:
        print(json_text({"study": study.as_json(), "points": rows}, indent=1))
    elif args.csv:
        print_csv([row | {"values": texts(row["values"])} for row in rows])
    else:
        from moesim.sweeper import print_points

        print_points(study, finished)


def _row(record: "PointRecord") -> dict[str, Any]:
    """What a table needs of a point: its values, and the result as `moesim run --csv` prints it."""
    head = {"id": record.id, "number": record.number, "status": record.status, "reason": record.reason}
    return {**head, "values": texts(record.values), **(record.result or {})}


def _show(study: "Study", folder: "SweepFolder", outcome: "SweepOutcome", args: argparse.Namespace) -> None:
    if args.json:
        records = [asdict(record) for record in outcome.records]
        print(json_text({"study": study.as_json(), "points": records}, indent=1))
    elif args.csv:
        print_csv([_row(record) for record in outcome.records])
    elif not args.quiet:
        from moesim.sweeper import print_sweep

        print_sweep(study, outcome)
        if outcome.torn:
            print("a line that a crash had left half-written was cut off and its point simulated again")
        print(f"\n{outcome.new} new points in {folder.path}; draw them with: moesim plot {folder.path}")
