"""`moesim calibrate`: measure and write a profile, or report how well a profile predicts."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.errors import UserError
from moesim.kernels.benchmarks.session import partial_folder
from moesim.kernels.calibrated import CalibratedModel
from moesim.kernels.error_table import STANDS_FOR, kind_misses
from moesim.kernels.errors import errors_that_hold
from moesim.kernels.estimate import KernelModel
from moesim.kernels.fitting import fit_profile
from moesim.kernels.loading import load_profile, scaled_from
from moesim.kernels.profile import load_profile_file, save_profile
from moesim.kernels.report import (
    beside_rows,
    beside_table,
    error_table,
    held_out_rows,
    held_table,
    kind_table,
    leave_one_out_rows,
)
from moesim.kernels.scaled import ScaledModel
from moesim.kernels.tabulated import TabulatedModel

if TYPE_CHECKING:
    from rich.console import Console

_WIDTH = 96  # columns that the widest table takes


def calibrate_command(
    *,
    device: str = "cuda",
    out: str | Path | None = None,
    report: bool = False,
    profile: str | None = None,
    budget: float = 420.0,
    families: str | None = None,
    by_class: bool = False,
    extend: bool = False,
    quiet: bool = False,
) -> int:
    """Run `moesim calibrate` and return its exit code.

    With `report`, print the leave-one-out errors of `profile` (a name or file; `out` or the shipped one when absent),
    and of a shipped one how well another GPU kind predicts it.
    Otherwise benchmark `device` (cuda or cpu; under torchrun on all its processes) for about `budget` seconds into the
    profile file `out`; `families` is a comma-separated choice. An existing `out` is never replaced: `extend` adds what
    it lacks, and an interrupted calibration into it goes on, and says so. Raises UserError for a user's mistake; an
    interrupt (exit code 130) keeps what was measured.
    """
    if report:
        return _report(profile or str(out or "h200"), by_class=by_class)
    if out is None:
        raise UserError("calibrate: say where the profile goes with --out FILE.json.gz, or ask for --report")
    path = Path(out)
    _check_out(path, extend=extend)
    from moesim.kernels.benchmarks.calibrate import BUDGET_SHARES, run_calibration  # torch, so only here

    chosen = tuple(families.split(",")) if families else tuple(BUDGET_SHARES)
    try:
        measured = run_calibration(device=device, out=path, budget=budget, families=chosen, quiet=quiet)
    except KeyboardInterrupt:
        return 130
    if measured is None:
        return 0
    fit_profile(measured)
    save_profile(measured, path)
    if not quiet:
        print(f"{len(measured.rows)} kernels in {path}")
    return 0


def tables_command(name: str, *, folder: Path | None, out: Path, extend: bool, quiet: bool) -> int:
    """Run `moesim calibrate --from-tables`: the profile of the GPU `name` into `out`. Raises UserError."""
    from moesim.kernels.tables import from_tables  # pyarrow, so only here
    from moesim.scenario import gpu_spec

    _check_out(out, extend=extend)
    profile = from_tables(name, folder=folder, models=load_profile, rates=gpu_spec)
    save_profile(profile, out)
    if not quiet:
        print(f"{len(profile.rows)} kernels in {out}")
    return os.EX_OK


def _check_out(path: Path, *, extend: bool) -> None:
    """Refuse to touch a finished profile unasked; say when an unfinished one is taken up."""
    partial = partial_folder(path)
    if partial.exists():
        if os.environ.get("RANK", "0") == "0":
            print(f"going on with the interrupted calibration in {partial}", file=sys.stderr)
    elif path.exists() and not extend:
        raise UserError(f"{path} exists already; choose another --out, or --extend to add what it lacks")


def _report(name: str, *, by_class: bool) -> int:
    from rich.console import Console

    path = Path(name)
    if path.exists():
        load_profile_file(path)  # says what is wrong with a file before anything is fitted
    model = load_profile(name)
    console = Console()
    console.width = max(console.width, _WIDTH)  # of a file or a pipe: no number is cut
    if isinstance(model, ScaledModel):
        console.print(f"{name} has no rows of its own: it is derived from {scaled_from(name)}; see the report on that")
        return _print_held(console, name, model)
    own = model.tables if isinstance(model, TabulatedModel) else model
    title = f"Leave-one-out errors of {own.name}"
    if own is not model:
        title += ", rows of published tables"
    console.print(error_table(leave_one_out_rows(own, by_class=by_class), title=title))
    if kept_out := held_out_rows(own, by_class=by_class):
        console.print()
        console.print(error_table(kept_out, title=f"Errors of {own.name} on rows kept out of every fit", caption=None))
    if isinstance(own, CalibratedModel) and (beside := beside_rows(own)):
        console.print()
        console.print(beside_table(beside, title=f"Kernels and transfers of {own.name} at once"))
    base = STANDS_FOR.get(name.lower())
    if base is not None:
        console.print()
        console.print(kind_table(kind_misses(name.lower()), title=f"{own.name} predicted from {base} by data sheets"))
    return _print_held(console, own.name, model)


def _print_held(console: "Console", name: str, model: KernelModel) -> int:
    """What the ranges of results on this GPU are made of."""
    clock = None
    base = model.base if isinstance(model, ScaledModel) else model
    if isinstance(base, TabulatedModel) and not base.law.known:
        clock = base.law.error, base.law.source
    console.print()
    console.print(held_table(errors_that_hold(model), title=f"Ranges of results on {name}", clock=clock))
    return os.EX_OK
