"""`moesim validate`: run real training beside its simulation, set a trace beside its price, or recompute what ships."""

import argparse
from pathlib import Path

from moesim.cli.flags import add_json, add_overrides, add_quiet
from moesim.cli.session import interrupts_say
from moesim.errors import UserError
from moesim.strict_json import json_text

NAME = "validate"
SUMMARY = "Run real training on this machine's devices, simulate the same, and show both with the error per part."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """[SCENARIO] and the flags of a run; --step and --calibrate for a trace; --report, --json, --quiet."""
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
    parser.add_argument(
        "--step",
        metavar="FILE",
        type=Path,
        help="run nothing: a torch.profiler trace of one step, or a step made of one",
    )
    text = "beside --step: correct the prediction by this step of another trace"
    parser.add_argument("--calibrate", metavar="FILE", type=Path, help=text)
    add_json(parser)
    add_quiet(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Run, compare, write and show. Raises UserError and Interrupted."""
    if args.step is not None:
        return _beside_trace(args)
    if args.calibrate is not None:
        raise UserError("--calibrate corrects the prediction of a trace; name the trace with --step")
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


def _beside_trace(args: argparse.Namespace) -> int:
    from moesim.importing.traced_step import step_with_times
    from moesim.kernels import kernel_model
    from moesim.recorded.estimate import step_estimate
    from moesim.report.step_screens import print_beside, traced_json

    if args.scenario is not None or args.report:
        raise UserError("--step runs nothing and needs neither a scenario nor --report; leave them out")
    step = step_with_times(args.step, gpu=args.profile)
    other = None if args.calibrate is None else step_with_times(args.calibrate)
    if other is not None and other.calibration == step.calibration:
        raise UserError(f"{args.calibrate} is the step itself; correct it by a trace of another size")
    gpu = args.profile or step.calibration.gpu
    estimate = step_estimate(step.ops, kernel_model(gpu), corrections=other.calibration if other else None)
    corrected_by = other.source if other else None
    if args.json:
        print(json_text(traced_json(step, estimate) | {"corrected_by": corrected_by}, indent=1))
    elif not args.quiet:
        print_beside(step, estimate, gpu=gpu, corrected_by=corrected_by)
    return 0
