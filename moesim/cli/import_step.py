"""`moesim import-step`: a training step of one's own torch program, recorded without a GPU or traced on one."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.cli.flags import add_force, add_json, add_quiet, check_writable
from moesim.errors import UserError
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesim.importing.traced_step import TracedStep
    from moesim.recorded.step_file import RecordedOp

NAME = "import-step"
SUMMARY = "Estimate a training step of your own torch program, recorded without a GPU or traced by torch's profiler."
USUAL_GPU, NODE = "h100", 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """STEP, --show, --calibrate, --gpu, --out, --host-per-op, --rows, --json, --quiet, --force."""
    parser.add_argument(
        "step",
        metavar="STEP",
        nargs="?",
        help="MODULE:FUNCTION or FILE.py:FUNCTION, a function without arguments that makes the model and returns it "
        "with a closure that gives the loss (it runs on the meta device); or TRACE.json(.gz) of one step by "
        "torch.profiler",
    )
    parser.add_argument("--show", metavar="FILE", type=Path, help="show a step that --out kept")
    parser.add_argument(
        "--calibrate", metavar="STEP", type=Path, help="correct by this step of a trace (what --out kept, or the trace)"
    )
    parser.add_argument(
        "--gpu", help="the GPU to estimate for, as `moesim gpus` names it; that of a trace by default, else h100"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="keep the step (.json or .json.gz)")
    parser.add_argument(
        "--host-per-op", metavar="MICROSECONDS", type=float, help="what your host needs to launch one operation"
    )
    parser.add_argument(
        "--ranks", metavar="N", type=int, help="spread a recorded step over N GPUs of one node: data parallelism"
    )
    parser.add_argument(
        "--spread", choices=("ddp", "fsdp2"), help="how: DistributedDataParallel (default), fully_shard of each layer"
    )
    parser.add_argument("--rows", metavar="N", type=int, default=20, help="lines to print, dearest first; 20")
    add_json(parser)
    add_quiet(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Record, read or load, estimate, show. Raises UserError."""
    _check(args)
    corrected_by = _calibration(args)
    if args.step is not None and _is_file(args.step):
        from moesim.importing.traced_step import traced_step

        traced = traced_step(Path(args.step), gpu=args.gpu)
        _save(args, traced.ops, source=traced.source, calibration=traced.calibration.as_json())
        return _show_traced(args, traced)
    if args.show is not None:
        from moesim.recorded.step_file import load_step, step_content

        source, ops = load_step(args.show)
        if "calibration" in step_content(args.show) and args.calibrate is None and args.ranks is None:
            from moesim.importing.traced_step import step_with_times

            traced = step_with_times(args.show)
            _save(args, ops, source=source, calibration=traced.calibration.as_json())
            return _show_traced(args, traced)
    else:
        from moesim.importing.program import record_program  # torch, so only here

        source, ops = args.step, record_program(args.step)
    _save(args, ops, source=source)
    return _show_estimate(args, ops, source=source, traced=corrected_by)


def _calibration(args: argparse.Namespace) -> "TracedStep | None":
    if args.calibrate is None:
        return None
    from moesim.importing.traced_step import step_with_times

    return step_with_times(args.calibrate)


def _check(args: argparse.Namespace) -> None:
    if (args.step is None) == (args.show is None):
        raise UserError(
            "say either which step to import (MODULE:FUNCTION or TRACE.json) or which one to show (--show FILE)"
        )
    if args.step is not None and ":" not in args.step and not _is_file(args.step):
        what = "is a folder" if Path(args.step).is_dir() else "does not exist"
        raise UserError(
            f"{args.step} {what}; name a trace (TRACE.json or .json.gz), MODULE:FUNCTION or FILE.py:FUNCTION"
        )
    if args.step is not None and args.step.endswith(".py"):
        raise UserError(f"{args.step} is a program; name its function that makes the step: {args.step}:FUNCTION")
    if args.rows < 1:
        raise UserError(f"--rows {args.rows} prints nothing; use 1 or more, or --quiet")
    if args.host_per_op is not None and not args.host_per_op >= 0:
        raise UserError(f"--host-per-op {args.host_per_op} is no time in microseconds; use e.g. 10")
    if args.step is not None and _is_file(args.step) and args.calibrate is not None:
        raise UserError(
            "a trace is measured and needs no --calibrate; to set it beside a prediction that another trace corrects: "
            "moesim validate --step TRACE.json --calibrate STEP.json"
        )
    if args.spread is not None and args.ranks is None:
        raise UserError(f"--spread {args.spread} says how, not over how many GPUs; add --ranks N")
    if args.ranks is not None and not 2 <= args.ranks <= NODE:
        raise UserError(
            f"--ranks {args.ranks} is no number of GPUs of one node (2 to {NODE}); for more, use the step as the "
            "software of a scenario: implementation: {kind: imported, file: STEP.json}"
        )
    if args.ranks is not None and args.step is not None and _is_file(args.step):
        raise UserError("--ranks spreads a recorded step; a trace has its own ranks: moesim validate --step TRACE.json")
    if args.out is not None:
        check_writable(args.out)
        if args.out.exists() and not args.force:
            raise UserError(f"{args.out} exists already; choose another --out, or --force to replace it")


def _is_file(step: str) -> bool:
    return step.endswith((".json", ".json.gz")) or (":" not in step and Path(step).is_file())


def _save(
    args: argparse.Namespace,
    ops: "Sequence[RecordedOp]",
    *,
    source: str,
    calibration: "dict[str, object] | None" = None,
) -> None:
    from moesim.recorded.step_file import save_step

    if args.out is not None:
        save_step(args.out, ops, source=source, calibration=calibration)


def _show_traced(args: argparse.Namespace, traced: "TracedStep") -> int:
    """A step of a trace on its own GPU as it was measured; on another one as its corrections predict it."""
    from moesim.kernels import kernel_model
    from moesim.recorded.estimate import step_estimate
    from moesim.report.step_screens import print_traced, traced_json

    if args.gpu not in (None, traced.calibration.gpu):
        return _show_estimate(args, traced.ops, source=traced.source, traced=traced)
    estimate = step_estimate(traced.ops, kernel_model(traced.calibration.gpu))
    if args.json:
        print(json_text(traced_json(traced, estimate), indent=1))
    elif not args.quiet:
        print_traced(traced, estimate, rows=args.rows)
    return 0


def _show_estimate(
    args: argparse.Namespace, ops: "Sequence[RecordedOp]", *, source: str, traced: "TracedStep | None"
) -> int:
    from moesim.kernels import kernel_model
    from moesim.recorded.estimate import HOST, scalable_share, step_estimate
    from moesim.report.step_screens import estimate_json, print_estimate

    gpu = args.gpu or (traced.calibration.gpu if traced else USUAL_GPU)
    host = HOST if args.host_per_op is None else HOST._replace(op=1e-6 * args.host_per_op, view=0.0)
    corrections = traced.calibration if traced else None
    kernels = kernel_model(gpu)
    ranks = None
    if args.ranks is not None:
        from moesim.program.scenario_fabric import node_fabric
        from moesim.recorded.spread import DDP, Ranks

        fabric = node_fabric(kernels, gpu=gpu, ranks=args.ranks)
        ranks = Ranks(wrapper=args.spread or DDP, fabric=fabric, ranks=tuple(range(args.ranks)))
    estimate = step_estimate(ops, kernels, host=host, corrections=corrections, ranks=ranks)
    corrected_by = traced.source if traced else None
    if args.json:
        print(json_text(estimate_json(estimate, source=source, gpu=gpu, corrected_by=corrected_by), indent=1))
    elif not args.quiet:
        share = scalable_share(ops, kernels)
        print_estimate(estimate, source=source, gpu=gpu, rows=args.rows, corrected_by=corrected_by, scalable=share)
    return 0
