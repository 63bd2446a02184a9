"""Verbs that measure or read what was measured: `moesim calibrate`, `validate`, `import-step`.

`calibrate` measures the kernels of the machine at hand, or reports how well a profile predicts; `validate` runs real
training beside its simulation, sets a trace beside its price, or recomputes what ships; `import-step` has a training
step of one's own torch program, recorded without a GPU or traced on one.
"""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.cli.flags import (
    FORCE,
    JSON,
    OVERRIDES,
    QUIET,
    Flag,
    check_writable,
    interrupts_explained_by,
    verb,
    wants_screen,
)
from moesim.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moesim.importing.traced_step import TracedStep
    from moesim.recorded.step_file import RecordedOp


@verb(
    "calibrate",
    "Measure this machine's kernels and write a profile for compute.profile (under torchrun for several GPUs).",
    Flag("--device", choices=("cuda", "cpu"), default="cuda", help="what to measure; cuda by default"),
    Flag("--out", metavar="FILE", type=Path, help="the profile to write (.json.gz)"),
    Flag("--extend", action="store_true", help="add to an existing profile what it lacks"),
    Flag("--budget", metavar="SECONDS", type=float, default=420.0, help="time to measure; 420 by default"),
    Flag("--families", metavar="A,B", help="only these families of kernels, comma-separated"),
    Flag("--report", action="store_true", help="measure nothing: print the leave-one-out errors"),
    Flag("--profile", metavar="NAME", help="the profile to report on (name or file)"),
    Flag(
        "--from-tables",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        const=Path(),
        help="measure nothing: make the profile of --gpu from the tables of aiconfigurator-core (or of that folder)",
    ),
    Flag("--gpu", metavar="NAME", help="whose tables to read, as the catalogue names it; e.g. b200"),
    Flag("--by-class", action="store_true", help="report by dtype and direction, not by family alone"),
    QUIET,
)
def calibrate(args: argparse.Namespace) -> int:
    """Measure and write, or report. Raises UserError; an interrupt (130) keeps what was measured and says so."""
    if not args.budget > 0:
        raise UserError(f"--budget {args.budget} is not a time in seconds; use e.g. 420")
    if args.out is not None and not args.report:
        check_writable(args.out)
    if args.from_tables is not None:
        return _from_tables(args)
    from moesim.kernels.command import calibrate_command

    code = calibrate_command(
        device=args.device,
        out=args.out,
        report=args.report,
        profile=args.profile,
        budget=args.budget,
        families=args.families,
        by_class=args.by_class,
        extend=args.extend,
        quiet=args.quiet,
    )
    if args.report:
        _report_calls(args.profile or str(args.out or "h200"))
    return code


def _report_calls(name: str) -> None:
    """NCCL's constants that a profile measured itself, with the errors on rows kept out of their fits."""
    from rich.console import Console

    from moesim.kernels import CalibratedModel, gpu_of_device, load_profile
    from moesim.network.calibration_report import call_errors, call_table, seen_bandwidth
    from moesim.network.nccl import kind_of
    from moesim.scenario import gpu_spec

    model = load_profile(name)
    if not isinstance(model, CalibratedModel) or not model.collectives:
        return
    rows, devices = model.collectives, [str(session.get("device", "")) for session in model.profile.sessions]
    gpu = next((known for device in devices if (known := gpu_of_device(device)) is not None), None)
    bandwidth = seen_bandwidth(rows) if gpu is None else gpu_spec(gpu).nvlink_bandwidth
    kind = None if gpu is None else kind_of(gpu, gpu_spec(gpu).scaled_from)
    found = call_errors(rows, link_bandwidth=bandwidth, kind=kind)
    console = Console()
    console.print()
    console.print(call_table(found, title=f"NCCL's calls as {model.name} measured them"))


def _from_tables(args: argparse.Namespace) -> int:
    if args.gpu is None or args.out is None:
        raise UserError("--from-tables needs --gpu NAME (e.g. b200) and --out FILE.json.gz")
    from moesim.kernels.command import tables_command

    folder = None if args.from_tables == Path() else args.from_tables
    return tables_command(args.gpu, folder=folder, out=args.out, extend=args.extend, quiet=args.quiet)


@verb(
    "validate",
    "Run real training on this machine's devices, simulate the same, and show both with the error per part.",
    Flag("scenario", metavar="SCENARIO", type=Path, nargs="?", help="run this one, not the standard cases"),
    OVERRIDES,
    Flag("--device", choices=("cuda", "cpu"), default="cuda", help="where to run; cuda by default"),
    Flag("--gpus", metavar="N", type=int, default=1, help="processes, one device each; 1 by default"),
    Flag("--profile", metavar="NAME", help="predict from this profile (name or file); cpu needs one"),
    Flag("--only", metavar="TEXT", help="only the cases whose name contains TEXT"),
    Flag("--seconds", type=float, default=2.0, help="seconds of measured steps per case; 2 by default"),
    Flag("--out", metavar="DIR", type=Path, help="folder of the measurements; validation by default"),
    Flag("--report", action="store_true", help="run nothing: predict the shipped measurements again"),
    Flag(
        "--step",
        metavar="FILE",
        type=Path,
        help="run nothing: a torch.profiler trace of one step, or a step made of one",
    ),
    Flag(
        "--calibrate",
        metavar="FILE",
        type=Path,
        help="beside --step: correct the prediction by this step of another trace",
    ),
    JSON,
    QUIET,
)
def validate(args: argparse.Namespace) -> int:
    """Run, compare, write and show. Raises UserError and Interrupted."""
    if args.step is not None:
        return _beside_trace(args)
    if args.calibrate is not None:
        raise UserError("--calibrate corrects the prediction of a trace; name the trace with --step")
    from moesim.scenario import load_scenario
    from moesim.validation import validate_command
    from moesim.validation.comparison import table_json

    kept = args.out or Path("validation")
    with interrupts_explained_by(lambda: f"finished cases are kept in {kept}; the same command goes on from there"):
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
    wants_screen(args, table_json(table))
    return 0


def _beside_trace(args: argparse.Namespace) -> int:
    from moesim.importing.traced_step import step_with_times
    from moesim.kernels import kernel_model
    from moesim.recorded.estimate import step_estimate
    from moesim.report.imported_step_view import print_comparison, traced_json

    if args.scenario is not None or args.report:
        raise UserError("--step runs nothing and needs neither a scenario nor --report; leave them out")
    step = step_with_times(args.step, gpu=args.profile)
    other = None if args.calibrate is None else step_with_times(args.calibrate)
    if other is not None and other.calibration == step.calibration:
        raise UserError(f"{args.calibrate} is the step itself; correct it by a trace of another size")
    gpu = args.profile or step.calibration.gpu
    estimate = step_estimate(step.ops, kernel_model(gpu), corrections=other.calibration if other else None)
    corrected_by = other.source if other else None
    if wants_screen(args, traced_json(step, estimate) | {"corrected_by": corrected_by}):
        print_comparison(step, estimate, gpu=gpu, corrected_by=corrected_by)
    return 0


USUAL_GPU, NODE = "h100", 8


@verb(
    "import-step",
    "Estimate a training step of your own torch program, recorded without a GPU or traced by torch's profiler.",
    Flag(
        "step",
        metavar="STEP",
        nargs="?",
        help="MODULE:FUNCTION or FILE.py:FUNCTION, a function without arguments that makes the model and returns it "
        "with a closure that gives the loss (it runs on the meta device); or TRACE.json(.gz) of one step by "
        "torch.profiler",
    ),
    Flag("--show", metavar="FILE", type=Path, help="show a step that --out kept"),
    Flag(
        "--calibrate", metavar="STEP", type=Path, help="correct by this step of a trace (what --out kept, or the trace)"
    ),
    Flag("--gpu", help="the GPU to estimate for, as `moesim gpus` names it; that of a trace by default, else h100"),
    Flag("--out", metavar="FILE", type=Path, help="keep the step (.json or .json.gz)"),
    Flag("--host-per-op", metavar="MICROSECONDS", type=float, help="what your host needs to launch one operation"),
    Flag(
        "--host-factor",
        metavar="TIMES",
        type=float,
        help="how many times as slow your host is as the one that was measured; "
        "python -m moesim.kernels.benchmarks.host_in_situ says it",
    ),
    Flag("--ranks", metavar="N", type=int, help="spread a recorded step over N GPUs of one node: data parallelism"),
    Flag(
        "--spread",
        choices=("ddp", "fsdp2", "tp", "ep"),
        help="how: DistributedDataParallel (default), fully_shard of each layer, transformers' tensor or expert plan",
    ),
    Flag("--rows", metavar="N", type=int, default=20, help="lines to print, dearest first; 20"),
    JSON,
    QUIET,
    FORCE,
)
def import_step(args: argparse.Namespace) -> int:
    """Record, read or load, estimate, show. Raises UserError."""
    _check_import(args)
    corrected_by = _calibration(args)
    if args.step is not None and _is_file(args.step):
        from moesim.importing.traced_step import traced_step

        traced = traced_step(Path(args.step), gpu=args.gpu)
        _save_step(args, traced.ops, source=traced.source, calibration=traced.calibration.as_json())
        return _show_traced(args, traced)
    if args.show is not None:
        from moesim.recorded.step_file import load_step, step_content

        source, ops = load_step(args.show)
        if "calibration" in step_content(args.show) and args.calibrate is None and args.ranks is None:
            from moesim.importing.traced_step import step_with_times

            traced = step_with_times(args.show)
            _save_step(args, ops, source=source, calibration=traced.calibration.as_json())
            return _show_traced(args, traced)
    else:
        from moesim.importing.program import record_program  # torch, so only here

        source, ops = args.step, record_program(args.step)
    _save_step(args, ops, source=source)
    return _show_estimate(args, ops, source=source, traced=corrected_by)


def _calibration(args: argparse.Namespace) -> "TracedStep | None":
    if args.calibrate is None:
        return None
    from moesim.importing.traced_step import step_with_times

    return step_with_times(args.calibrate)


def _check_import(args: argparse.Namespace) -> None:
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
    if args.host_factor is not None and not 0 < args.host_factor < math.inf:
        raise UserError(f"--host-factor {args.host_factor} is no number of times above 0; use e.g. 1.2")
    if args.host_factor is not None and args.host_per_op is not None:
        raise UserError("--host-factor and --host-per-op both say how slow the host is; give one of them")
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


def _save_step(
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
    from moesim.report.imported_step_view import print_traced, traced_json

    if args.gpu not in (None, traced.calibration.gpu):
        return _show_estimate(args, traced.ops, source=traced.source, traced=traced)
    estimate = step_estimate(traced.ops, kernel_model(traced.calibration.gpu))
    if wants_screen(args, traced_json(traced, estimate)):
        print_traced(traced, estimate, rows=args.rows)
    return 0


def _show_estimate(
    args: argparse.Namespace, ops: "Sequence[RecordedOp]", *, source: str, traced: "TracedStep | None"
) -> int:
    from moesim.kernels import kernel_model
    from moesim.recorded.estimate import scalable_share, step_estimate
    from moesim.recorded.host import HOST
    from moesim.recorded.peak import step_peak
    from moesim.report.imported_step_view import estimate_json, print_estimate

    gpu = args.gpu or (traced.calibration.gpu if traced else USUAL_GPU)
    host = HOST if args.host_per_op is None else HOST.per_op(1e-6 * args.host_per_op)
    host = host.paced(args.host_factor or 1.0)
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
    peak = step_peak(ops) if ranks is None else None
    if wants_screen(args, estimate_json(estimate, source=source, gpu=gpu, corrected_by=corrected_by, peak=peak)):
        share = scalable_share(ops, kernels)
        print_estimate(
            estimate,
            source=source,
            gpu=gpu,
            rows=args.rows,
            corrected_by=corrected_by,
            scalable=share,
            peak=peak,
        )
    return 0
