"""`moesim calibrate`: measure the kernels of the machine at hand, or report how well a profile predicts."""

import argparse
from pathlib import Path

from moesim.cli.flags import add_quiet, check_writable
from moesim.errors import UserError

NAME = "calibrate"
SUMMARY = "Measure this machine's kernels and write a profile for compute.profile (under torchrun for several GPUs)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--device, --out, --extend, --budget, --families, --report, --profile, --from-tables, --gpu, --by-class, -q."""
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what to measure; cuda by default")
    parser.add_argument("--out", metavar="FILE", type=Path, help="the profile to write (.json.gz)")
    parser.add_argument("--extend", action="store_true", help="add to an existing profile what it lacks")
    parser.add_argument(
        "--budget", metavar="SECONDS", type=float, default=420.0, help="time to measure; 420 by default"
    )
    parser.add_argument("--families", metavar="A,B", help="only these families of kernels, comma-separated")
    parser.add_argument("--report", action="store_true", help="measure nothing: print the leave-one-out errors")
    parser.add_argument("--profile", metavar="NAME", help="the profile to report on (name or file)")
    parser.add_argument(
        "--from-tables",
        metavar="FOLDER",
        nargs="?",
        type=Path,
        const=Path(),
        help="measure nothing: make the profile of --gpu from the tables of aiconfigurator-core (or of that folder)",
    )
    parser.add_argument("--gpu", metavar="NAME", help="whose tables to read, as the catalogue names it; e.g. b200")
    parser.add_argument("--by-class", action="store_true", help="report by dtype and direction, not by family alone")
    add_quiet(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
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
