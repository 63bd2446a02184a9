"""What `moesim validate` does: run, simulate, compare, write."""

from datetime import date
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.scenario import Scenario
from moesim.validation.cases import Case, check_runnable, scenario_case, standard_cases, with_profile
from moesim.validation.table import SHIPPED_TABLES, SUFFIX, Table, make_table, recompute, save_table, shipped_table


def validate_command(
    *,
    device: str = "cuda",
    gpus: int = 1,
    out: Path | None = None,
    scenario: Scenario | None = None,
    profile: str | None = None,
    only: str | None = None,
    seconds: float = 2.0,
    keep_kernels: bool = False,
    report: bool = False,
    quiet: bool = False,
) -> Table:
    """Run real training beside its simulation, or with `report` recompute the shipped table's predictions.

    `out` keeps each case's measurement, so that an interrupted call goes on where it was, and gets `table.json`. That
    of a report gets what to ship in data/ after a change of the profile or of the simulation, a file for each of
    `SHIPPED_TABLES`; the table of the first, the standard cases on H200, is returned.
    `scenario` replaces the standard cases; `only` keeps those whose name contains it. Raises UserError for a missing
    device, too few GPUs, and scenarios that the measured software cannot run.
    """
    if report:
        return _report(out, quiet=quiet)
    from moesim.validation.launch import check_device

    if gpus < 1:
        raise UserError(f"--gpus {gpus} must be 1 or more")
    check_device(device, gpus)
    cases = [scenario_case(scenario, gpus)] if scenario is not None else list(standard_cases(device, gpus))
    cases = [with_profile(case, profile) for case in cases if only is None or only in case.name]
    if not cases:
        raise UserError(f"no case's name contains {only!r}; names are like fine64-4096-skewed-{gpus}gpu")
    for case in cases:
        check_runnable(case.scenario)
    if device == "cpu" and any(case.scenario.compute.profile is None for case in cases):
        raise UserError("--device cpu needs --profile: make one with `moesim calibrate --device cpu --out FILE`")
    table = _measure_and_predict(
        cases, device=device, out=out or Path("validation"), effort=(seconds, keep_kernels), quiet=quiet,
    )  # fmt: skip
    _show(table, quiet)
    return table


def _report(out: Path | None, *, quiet: bool) -> Table:
    tables = {name: recompute(shipped_table(name)) for name in SHIPPED_TABLES}
    for name, table in tables.items():
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            save_table(table, out / f"{name}{SUFFIX}")
        _show(table, quiet)
    return tables[SHIPPED_TABLES[0]]


def _measure_and_predict(
    cases: list[Case], *, device: str, out: Path, effort: tuple[float, bool], quiet: bool
) -> Table:
    import torch

    from moesim.validation.launch import device_name, measure_cases
    from moesim.validation.worker import Effort

    measured = measure_cases(
        cases,
        device=device,
        folder=out,
        effort=Effort(seconds=effort[0], profile=effort[1]),
        say=(lambda text: None) if quiet else print,
    )
    about: dict[str, Any] = {"name": device_name(device), "torch": torch.__version__, "date": date.today().isoformat()}
    table = make_table(cases, measured, about)
    if not table.rows:
        raise UserError("every case was skipped; try --only with a smaller one")
    save_table(table, out / "table.json")
    return table


def _show(table: Table, quiet: bool) -> None:
    if not quiet:
        from moesim.validation.show import print_table

        print_table(table)
