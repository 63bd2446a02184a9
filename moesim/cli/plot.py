"""`moesim plot`: runs, sweeps, plans and deployments as one HTML page that needs no network."""

import argparse
from pathlib import Path

from moesim.cli.flags import add_force, add_quiet, check_writable
from moesim.cli.outputs import write_output
from moesim.errors import UserError

NAME = "plot"
SUMMARY = (
    "Plot sweeps, plans, runs and what serves: cost against performance, curves with their uncertainty, heat maps, "
    "comparisons."
)
DEFAULT = "plot.html"
KINDS = ("curves", "heat_map", "cost_performance", "comparison")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """RUNS, --kind, --x, --y, --colour, --points, --out, --quiet, --force."""
    parser.add_argument(
        "runs",
        metavar="RUNS",
        nargs="+",
        type=Path,
        help="folders of moesim run, sweep or plan, in any mix; or what serve wrote",
    )
    parser.add_argument(
        "--kind", choices=KINDS, help="what to draw; by default what the study's plot section says, or what suits"
    )
    metric = "a metric such as step_time_s, mfu.causal, router.validation_loss"
    parser.add_argument("--x", metavar="NAME", help=f"what goes to the right: a key that was varied, or {metric}")
    parser.add_argument(
        "--y", metavar="NAME", action="append", default=[], help=f"what goes upwards: {metric}; may be repeated"
    )
    parser.add_argument("--colour", metavar="KEY", help="the varied key that colours tell apart")
    parser.add_argument("--points", metavar="3,7", type=_pair, help="compare these two points of one sweep or plan")
    place = f"the page; {DEFAULT} in the folder when only one is given, else in the working directory"
    parser.add_argument("--out", metavar="FILE.html", type=Path, help=place)
    add_quiet(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def _pair(text: str) -> tuple[int, int]:
    words = text.split(",")
    if len(words) != 2 or not all(word.strip().isdecimal() for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no pair of points; write --points 3,7")
    return int(words[0]), int(words[1])


def execute(args: argparse.Namespace) -> int:
    """Draw and write. Raises UserError."""
    path = args.out or (args.runs[0] / DEFAULT if len(args.runs) == 1 and args.runs[0].is_dir() else Path(DEFAULT))
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file, such as {path / DEFAULT}")
    check_writable(path)
    from moesim.report.plots import Asked, plot_page
    from moesim.report.serving_plan_view import serving_plot

    page = serving_plot(args.runs, x=args.x, y=args.y[0] if args.y else None)
    if page is not None:
        for flag, value in (("--kind", args.kind), ("--colour", args.colour), ("--points", args.points)):
            if value is not None:
                raise UserError(f"{flag} is for runs of training; leave it out")
        if len(args.y) > 1:
            raise UserError("--y: one number goes upwards of what serves; name one")
        return _write(page, path, args)
    asked = Asked(kind=args.kind, x=args.x, ys=tuple(args.y), colour=args.colour)
    return _write(plot_page(args.runs, asked, points=args.points), path, args)


def _write(page: str, path: Path, args: argparse.Namespace) -> int:
    write_output(page, path, force=args.force)
    if not args.quiet:
        print(f"plotted in {path}")
    return 0
