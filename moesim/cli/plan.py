"""`moesim plan`: find the layout that reaches a goal, by simulation, and say why."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.flags import (
    add_cache,
    add_csv,
    add_file,
    add_force,
    add_json,
    add_overrides,
    add_quiet,
    add_workers,
    check_workers,
    check_writable,
)
from moesim.cli.launches import add_software, print_command
from moesim.cli.outputs import print_csv, texts, write_output
from moesim.cli.session import interrupts_say
from moesim.errors import UserError
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.planner.plan import Plan
    from moesim.planner.serving_plan import ServingPlan

NAME = "plan"
SUMMARY = (
    "Plan a training run, or a deployment for a load: look at every layout that the choices allow, simulate the best, "
    "rank and explain them."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PLAN, --set, --out, --workers, --cluster, --storage, --flags, --cache, --json, --csv, --quiet, --force."""
    add_file(parser, "plan", text="plan file (YAML), or the name of one that ships")
    add_overrides(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of the plan; runs/NAME by default")
    add_workers(parser)
    storage = "database of the search for many machines, e.g. postgresql://...; a journal in the folder by default"
    parser.add_argument("--storage", metavar="URL", help=storage)
    add_software(parser, of="the best layout (of all of them in plan.json and on the page of `moesim plot`)")
    add_cache(parser)
    add_csv(add_json(parser))
    add_quiet(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Make the plan, or go on with it. Raises UserError, InfeasibleError and Interrupted."""
    check_workers(args)
    from moesim.planner.loading import load_any_plan
    from moesim.planner.serving_plan import ServingPlan
    from moesim.shipped import resolve

    plan = load_any_plan(resolve(args.plan, "plan"), args.overrides)
    if isinstance(plan, ServingPlan):
        return _plan_serving(plan, args)
    out_dir = args.out or Path("runs") / plan.name
    check_writable(out_dir)
    with interrupts_say(lambda: f"what is finished is kept in {out_dir}; run the same command again to go on"):
        content = _make(plan, out_dir, args)
    if args.json:
        print(json_text(content, indent=1))
    elif args.csv:
        outcomes = content["outcomes"]
        ranked = [*content["ranking"], *(key for key in outcomes if key not in content["ranking"])]
        print_csv([_row(key, outcomes[key], on_front=key in content["front"]) for key in ranked])
    elif not args.quiet:
        from moesim.report.plan_screen import print_plan

        print_plan(content)
        if args.flags:
            print_command(content["outcomes"][content["ranking"][0]]["flags"][args.flags])
        print(f"\nwritten to {out_dir}: every layout above is a file in {out_dir / 'scenarios'} for `moesim run`")
    return 0


def _plan_serving(plan: "ServingPlan", args: argparse.Namespace) -> int:
    """A plan of serving, with its page. Raises UserError, InfeasibleError and Interrupted."""
    for flag, value in (("--cluster", args.cluster), ("--storage", args.storage), ("--flags", args.flags)):
        if value is not None:
            raise UserError(f"{flag} is for plans of training; leave it out")
    from moesim.display import opened_display
    from moesim.planner.serving_planning import make_serving_plan

    out_dir = args.out or Path("runs") / plan.name
    check_writable(out_dir)
    with (
        interrupts_say(lambda: f"what is finished is kept in {out_dir}; run the same command again to go on"),
        opened_display(quiet=args.quiet) as display,
    ):

        def progress(done: int, total: int) -> None:
            if display is not None:
                display.show("combinations", completed=done, total=total)

        content = {"name": plan.name, **make_serving_plan(plan, out_dir, progress=progress, force=args.force)}
    from moesim.report.serving_plan_view import print_serving_plan, serving_plan_page

    write_output(serving_plan_page(content), out_dir / "plan.html", force=True)
    if args.json:
        print(json_text(content, indent=1))
    elif args.csv:
        print_csv([{key: each[key] for key in _SERVING_COLUMNS} for each in content["ranking"]])
    elif not args.quiet:
        print_serving_plan(content)
        print(f"\nwritten to {out_dir}: plan.html, and every row above as a file in scenarios/ for `moesim serve`")
    return 0


_SERVING_COLUMNS = (
    "words", "units", "gpus", "usd_per_hour", "usd_per_million_output_tokens", "good_share",
    "tokens_per_second_per_user",
)  # fmt: skip


def _row(layout: str, outcome: dict[str, Any], *, on_front: bool) -> dict[str, Any]:
    shown = {key: value for key, value in outcome.items() if key != "flags"}
    return {"id": layout, **shown, "values": texts(outcome["values"]), "on_front": on_front}


def _make(plan: "Plan", out_dir: Path, args: argparse.Namespace) -> dict[str, Any]:
    from moesim.display import opened_display
    from moesim.planner.folder import Folder
    from moesim.planner.planning import make_plan, watching_on
    from moesim.study import show_points

    with opened_display(quiet=args.quiet) as display:
        watch = None if display is None else show_points(display)
        folder = Folder(out_dir, plan, workers=args.workers, cluster=args.cluster, cache_dir=args.cache, watch=watch)
        watching = watching_on(display)
        return make_plan(folder, storage=args.storage, watching=watching, force=args.force, flags=args.flags)
