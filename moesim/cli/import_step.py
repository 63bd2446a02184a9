"""`moesim import-step`: a training step of one's own torch program, recorded without a GPU and priced for one."""

import argparse
from pathlib import Path

from moesim.cli.flags import add_force, add_json, add_quiet, check_writable
from moesim.errors import UserError
from moesim.strict_json import json_text

NAME = "import-step"
SUMMARY = "Record a training step of your own torch program on the meta device and estimate it on a GPU."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PROGRAM, --show, --gpu, --out, --host-per-op, --json, --quiet, --force."""
    parser.add_argument(
        "program",
        metavar="MODULE:FUNCTION",
        nargs="?",
        help="a function without arguments, in a module or a .py file, that makes the model and returns it with a "
        "closure that gives the loss; it runs on the meta device",
    )
    parser.add_argument("--show", metavar="FILE", type=Path, help="record nothing: show a step that was recorded")
    parser.add_argument("--gpu", default="h100", help="the GPU to estimate for, as `moesim gpus` names it; h100")
    parser.add_argument("--out", metavar="FILE", type=Path, help="keep the recorded step (.json or .json.gz)")
    parser.add_argument(
        "--host-per-op", metavar="MICROSECONDS", type=float, help="what your host needs to launch one operation"
    )
    parser.add_argument("--rows", metavar="N", type=int, default=20, help="operations to print, dearest first; 20")
    add_json(parser)
    add_quiet(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Record or load, estimate, show. Raises UserError."""
    from moesim.importing.pricing import HOST_S, step_estimate
    from moesim.importing.step_file import load_step, save_step
    from moesim.kernels import kernel_model
    from moesim.report.imported_screen import estimate_json, print_estimate

    if (args.program is None) == (args.show is None):
        raise UserError("say either which step to record (MODULE:FUNCTION) or which one to show (--show FILE)")
    if args.host_per_op is not None and not args.host_per_op >= 0:
        raise UserError(f"--host-per-op {args.host_per_op} is no time in microseconds; use e.g. 10")
    if args.out is not None:
        check_writable(args.out)
        if args.out.exists() and not args.force:
            raise UserError(f"{args.out} exists already; choose another --out, or --force to replace it")
    kernels = kernel_model(args.gpu)
    if args.show is not None:
        source, ops = load_step(args.show)
    else:
        from moesim.importing.program import record_program  # torch, so only here

        source, ops = args.program, record_program(args.program)
    if args.out is not None:
        save_step(args.out, ops, source=source)
    host_s = HOST_S if args.host_per_op is None else 1e-6 * args.host_per_op
    estimate = step_estimate(ops, kernels, host_per_op=host_s)
    if args.json:
        print(json_text(estimate_json(estimate, source=source, gpu=args.gpu), indent=1))
    elif not args.quiet:
        print_estimate(estimate, source=source, gpu=args.gpu, rows=args.rows)
    return 0
