"""Verbs on many scenarios: `moesim sweep` along axes, `plan` for a goal, and `plot` of what these and runs left.

Folders of sweeps and plans can be resumed; a page of `plot` needs no network.
"""

import argparse
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.flags import (
    CACHE,
    FORCE,
    JSON_OR_CSV,
    OVERRIDES,
    QUIET,
    WORKERS,
    Flag,
    check_page,
    check_workers,
    check_writable,
    interrupts_explained_by,
    shipped_file,
    texts,
    verb,
    wants_screen,
    write_output,
)
from moesim.cli.launches import print_command, software_flag
from moesim.errors import UserError

if TYPE_CHECKING:
    from moesim.planner.plan import Plan
    from moesim.planner.serving_plan import ServingPlan
    from moesim.sweeper import Study, SweepFolder, SweepOutcome


@verb(
    "sweep",
    "Simulate a scenario along the axes of a study; every finished point is kept at once, a rerun does the rest.",
    shipped_file("study", "study file (YAML): name, base, axes; or the name of one that ships"),
    OVERRIDES,
    Flag("--out", metavar="DIR", type=Path, help="folder of the sweep; runs/NAME by default"),
    *WORKERS,
    Flag("--retry", action="store_true", help="also run the points again that failed before"),
    Flag("--dry-run", action="store_true", help="list the points and simulate none"),
    CACHE,
    JSON_OR_CSV,
    QUIET,
)
def sweep(args: argparse.Namespace) -> int:
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
        _list_points(study, folder, args)
        return 0
    check_writable(folder.path)
    again = f"run the same command again to go on from {folder.path}"
    with interrupts_explained_by(lambda: f"{len(folder.records())} of {study.num_points} points are kept; {again}"):
        outcome = _swept(study, folder, args)
    _show_sweep(study, folder, outcome, args)
    return outcome.exit_code


def _swept(study: "Study", folder: "SweepFolder", args: argparse.Namespace) -> "SweepOutcome":
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


def _list_points(study: "Study", folder: "SweepFolder", args: argparse.Namespace) -> None:
    finished = folder.records()
    reasons = {invalid_point.id: invalid_point.reason for invalid_point in study.invalid_points}
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
    flat = [row | {"values": texts(row["values"])} for row in rows]
    if wants_screen(args, {"study": study.as_json(), "points": rows}, flat) or not (args.json or args.csv):
        from moesim.sweeper import print_points

        print_points(study, finished)


def _show_sweep(study: "Study", folder: "SweepFolder", outcome: "SweepOutcome", args: argparse.Namespace) -> None:
    records = [asdict(record) for record in outcome.records]
    heads = [{key: record[key] for key in ("id", "number", "status", "reason")} for record in records]
    rows = [
        head | {"values": texts(record.values)} | (record.result or {})  # as `moesim run --csv` prints it
        for head, record in zip(heads, outcome.records, strict=True)
    ]
    if wants_screen(args, {"study": study.as_json(), "points": records}, rows):
        from moesim.sweeper import print_sweep

        print_sweep(study, outcome)
        if outcome.torn:
            print("a line that a crash had left half-written was cut off and its point simulated again")
        print(f"\n{outcome.new} new points in {folder.path}; draw them with: moesim plot {folder.path}")


@verb(
    "plan",
    "Plan a training run, or a deployment: look at every layout, simulate the best, rank and explain them.",
    shipped_file("plan", "plan file (YAML), or the name of one that ships"),
    OVERRIDES,
    Flag("--out", metavar="DIR", type=Path, help="folder of the plan; runs/NAME by default"),
    *WORKERS,
    Flag(
        "--storage",
        metavar="URL",
        help="database of the search for many machines, e.g. postgresql://...; a journal in the folder by default",
    ),
    software_flag(of="the best layout (of all of them in plan.json and on the page of `moesim plot`)"),
    CACHE,
    JSON_OR_CSV,
    QUIET,
    FORCE,
)
def plan(args: argparse.Namespace) -> int:
    """Make the plan, or go on with it. Raises UserError, InfeasibleError and Interrupted."""
    check_workers(args)
    from moesim.planner.serving_plan import ServingPlan, load_any_plan
    from moesim.shipped import resolve

    loaded = load_any_plan(resolve(args.plan, "plan"), args.overrides)
    out_dir = args.out or Path("runs") / loaded.name
    if isinstance(loaded, ServingPlan):
        return _plan_serving(loaded, out_dir, args)
    check_writable(out_dir)
    with _resumable(out_dir):
        content = _planned(loaded, out_dir, args)
    outcomes = content["outcomes"]
    ranked = [*content["ranking"], *(key for key in outcomes if key not in content["ranking"])]
    rows = [
        {"id": key, **outcomes[key], "values": texts(outcomes[key]["values"]), "on_front": key in content["front"]}
        for key in ranked
    ]
    for row in rows:
        row.pop("flags", None)
    if wants_screen(args, content, rows):
        from moesim.report.plan_view import print_plan

        print_plan(content)
        if args.flags:
            print_command(content["outcomes"][content["ranking"][0]]["flags"][args.flags])
        print(f"\nwritten to {out_dir}: every layout above is a file in {out_dir / 'scenarios'} for `moesim run`")
    return 0


def _resumable(out_dir: Path) -> AbstractContextManager[None]:
    return interrupts_explained_by(
        lambda: f"what is finished is kept in {out_dir}; run the same command again to go on"
    )


def _plan_serving(plan: "ServingPlan", out_dir: Path, args: argparse.Namespace) -> int:
    """A plan of serving, with its page. Raises UserError, InfeasibleError and Interrupted."""
    for flag, value in (("--cluster", args.cluster), ("--storage", args.storage), ("--flags", args.flags)):
        if value is not None:
            raise UserError(f"{flag} is for plans of training; leave it out")
    from moesim.display import opened_display
    from moesim.planner.serving_planning import make_serving_plan

    check_writable(out_dir)
    with _resumable(out_dir), opened_display(quiet=args.quiet) as display:

        def progress(done: int, total: int) -> None:
            if display is not None:
                display.show("combinations", completed=done, total=total)

        content = {"name": plan.name, **make_serving_plan(plan, out_dir, progress=progress, force=args.force)}
    from moesim.report.serving_plan_view import print_serving_plan, serving_plan_page

    write_output(serving_plan_page(content), out_dir / "plan.html", force=True)
    if wants_screen(args, content, [{key: each[key] for key in _SERVING_COLUMNS} for each in content["ranking"]]):
        print_serving_plan(content)
        print(f"\nwritten to {out_dir}: plan.html, and every row above as a file in scenarios/ for `moesim serve`")
    return 0


_SERVING_COLUMNS = (
    "words", "units", "gpus", "usd_per_hour", "usd_per_million_output_tokens", "good_share",
    "tokens_per_second_per_user",
)  # fmt: skip


def _planned(plan: "Plan", out_dir: Path, args: argparse.Namespace) -> dict[str, Any]:
    from moesim.display import opened_display
    from moesim.planner.planning import callbacks_on, make_plan
    from moesim.planner.simulations import Folder
    from moesim.study import show_points

    with opened_display(quiet=args.quiet) as display:
        watch = None if display is None else show_points(display)
        folder = Folder(out_dir, plan, workers=args.workers, cluster=args.cluster, cache_dir=args.cache, watch=watch)
        callbacks = callbacks_on(display)
        return make_plan(folder, storage=args.storage, callbacks=callbacks, force=args.force, flags=args.flags)


PLOT_FILE = "plot.html"
PLOT_KINDS = ("curves", "heat_map", "cost_performance", "comparison")
_METRIC = "a metric such as step_time_s, mfu.causal, router.validation_loss"


def _pair(text: str) -> tuple[int, int]:
    words = text.split(",")
    if len(words) != 2 or not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no pair of points; write --points 3,7")
    return int(words[0]), int(words[1])


@verb(
    "plot",
    "Plot sweeps, plans, runs and what serves: cost against performance, curves, heat maps, comparisons.",
    Flag(
        "runs",
        metavar="RUNS",
        nargs="+",
        type=Path,
        help="folders of moesim run, sweep or plan, in any mix; or what serve wrote",
    ),
    Flag(
        "--kind", choices=PLOT_KINDS, help="what to draw; by default what the study's plot section says, or what suits"
    ),
    Flag("--x", metavar="NAME", help=f"what goes to the right: a key that was varied, or {_METRIC}"),
    Flag("--y", metavar="NAME", action="append", default=[], help=f"what goes upwards: {_METRIC}; may be repeated"),
    Flag("--colour", metavar="KEY", help="the varied key that colours tell apart"),
    Flag("--points", metavar="3,7", type=_pair, help="compare these two points of one sweep or plan"),
    Flag(
        "--out",
        metavar="FILE.html",
        type=Path,
        help=f"the page; {PLOT_FILE} in the folder when only one is given, else in the working directory",
    ),
    QUIET,
    FORCE,
)
def plot(args: argparse.Namespace) -> int:
    """Draw and write. Raises UserError."""
    path = args.out or (args.runs[0] / PLOT_FILE if len(args.runs) == 1 and args.runs[0].is_dir() else Path(PLOT_FILE))
    check_page(path, file=PLOT_FILE)
    from moesim.report.plots import PlotRequest, plot_page
    from moesim.report.serving_plan_view import serving_plot

    page = serving_plot(args.runs, x=args.x, y=args.y[0] if args.y else None)
    if page is None:
        asked = PlotRequest(kind=args.kind, x=args.x, ys=tuple(args.y), colour=args.colour)
        page = plot_page(args.runs, asked, points=args.points)
    else:
        for flag, value in (("--kind", args.kind), ("--colour", args.colour), ("--points", args.points)):
            if value is not None:
                raise UserError(f"{flag} is for runs of training; leave it out")
        if len(args.y) > 1:
            raise UserError("--y: one number goes upwards of what serves; name one")
    write_output(page, path, force=args.force)
    if not args.quiet:
        print(f"plotted in {path}")
    return 0
