"""What `moesim validate` does: run, simulate, compare, write.

Measured and predicted times side by side: as data, as text, and recomputed from the shipped profile.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from moesim.errors import UserError
from moesim.files import write_atomically
from moesim.scenario import Scenario, dump_scenario, load_scenario_text
from moesim.strict_json import json_text, packed, parse_json, unpacked
from moesim.validation.cases import Case, check_runnable, scenario_case, standard_cases, with_profile
from moesim.validation.prediction import predict

SCHEMA_VERSION = 1
SHIPPED = Path(__file__).parent / "data"
SUFFIX = ".json.gz"
# On H200: the standard cases; other models, sizes and lengths on one GPU; sigmoid routers, replicas, other skews on
# two. On H100: all of these again; then models and sizes that were measured when nothing was changed any more.
SHIPPED_TABLES = ("h200", "h200-unseen", "h200-unseen-2gpu", "h100", "h100-last")
GOALS = {"median": 0.03, "worst": 0.08, "from_tokens": 4096, "skew": 1 / 3}


@dataclass(frozen=True)
class Row:
    """One case with what was measured and what is predicted (both as `predict` gives them)."""

    case: Case
    measured: dict[str, Any]
    predicted: dict[str, Any]

    @property
    def error(self) -> float:
        """Predicted / measured step time - 1."""
        return float(self.predicted["step"] / self.measured["step"] - 1.0)

    def part_errors(self) -> dict[str, float]:
        """Predicted / measured - 1 of every part that took time."""
        pairs = {**self.measured["parts"], **self.measured["layer_parts"]}
        given = {**self.predicted["parts"], **self.predicted["layer_parts"]}
        return {key: given[key] / value - 1.0 for key, value in pairs.items() if key in given and value > 0}


@dataclass(frozen=True)
class Table:
    """The rows of one device, and what ran there."""

    device: dict[str, Any]
    rows: tuple[Row, ...]

    def summary(self) -> dict[str, float | None]:
        """Median and worst error of the step at and above 4096 tokens, and the worst relative error of a slowdown.

        None where there is no case to take it over.
        """
        large = [abs(row.error) for row in self.rows if row.case.tokens >= GOALS["from_tokens"]]
        skews = [abs(predicted / measured - 1.0) for _, measured, predicted in self.slowdowns() if measured > 0]
        return {
            "cases": float(len(self.rows)),
            "median_error": float(np.median(large)) if large else None,
            "worst_error": float(np.max(large)) if large else None,
            "worst_skew_error": float(np.max(skews)) if skews else None,
        }

    def slowdowns(self) -> list[tuple[str, float, float]]:
        """(name, measured, predicted) slowdown by skew, as a share of the uniform case, where both cases are there."""
        by_name = {row.case.name: row for row in self.rows}
        found = []
        for name, row in by_name.items():
            uniform = by_name.get(name.replace("-skewed-", "-uniform-"))
            if "-skewed-" in name and row.case.gpus > 1 and uniform is not None:
                measured = row.measured["step"] / uniform.measured["step"] - 1.0
                predicted = row.predicted["step"] / uniform.predicted["step"] - 1.0
                found.append((name, float(measured), float(predicted)))
        return found


def table_json(table: Table) -> dict[str, Any]:
    """The table as JSON values: scenarios in full, so that the predictions can be made again."""
    rows = [
        {
            "name": row.case.name,
            "scenario": dump_scenario(row.case.scenario),
            "measured": {key: value for key, value in row.measured.items() if key != "scenario"},
            "predicted": row.predicted,
            "error": row.error,
        }
        for row in table.rows
    ]
    content = {"schema_version": SCHEMA_VERSION, "device": table.device, "summary": table.summary(), "rows": rows}
    rounded: dict[str, Any] = _rounded(content)
    return rounded


def save_table(table: Table, path: Path) -> None:
    """Write the table as JSON, gzipped where the name ends in .gz; never leaves a half-written file in its place."""
    write_atomically(path, packed(json_text(table_json(table), separators=(",", ":")) + "\n", path))


def load_table(path: Path) -> Table:
    """A table as it was written. Raises UserError when it is missing, damaged or of another schema version."""
    try:
        content = parse_json(unpacked(path.read_bytes()))
        if content["schema_version"] != SCHEMA_VERSION:
            raise UserError(f"{path}: validation table of schema version {content['schema_version']}; validate again")
        cases = [Case(row["name"], load_scenario_text(row["scenario"], source=row["name"])) for row in content["rows"]]
        pairs = zip(cases, content["rows"], strict=True)
        return Table(content["device"], tuple(Row(case, row["measured"], row["predicted"]) for case, row in pairs))
    except OSError as error:
        raise UserError(
            f"{path}: cannot read this table ({error.strerror}); run `moesim validate` to make one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a whole validation table ({error!r}); run `moesim validate` again") from None


def shipped_table(name: str = "h200") -> Table:
    """The table that the package ships. Raises UserError for a name that it does not have."""
    path = SHIPPED / f"{name}{SUFFIX}"
    if not path.exists():
        names = sorted(file.name.removesuffix(SUFFIX) for file in SHIPPED.glob(f"*{SUFFIX}"))
        raise UserError(f"no validation table {name!r} is shipped; there is: {', '.join(names) or 'none'}")
    return load_table(path)


def recompute(table: Table) -> Table:
    """The same measurements beside predictions made now, from the profiles that the scenarios name."""
    return Table(
        table.device, tuple(Row(row.case, row.measured, predict(row.case, row.measured["rows"])) for row in table.rows)
    )


def differences(table: Table, again: Table) -> dict[str, float]:
    """Largest relative difference between the predictions of two tables of the same cases, by case."""
    found = {}
    for old, new in zip(table.rows, again.rows, strict=True):
        pairs = [(old.predicted["step"], new.predicted["step"])]
        for kind in ("parts", "layer_parts"):
            pairs += [(value, new.predicted[kind][key]) for key, value in old.predicted[kind].items()]
        found[old.case.name] = max(abs(b - a) / max(abs(a), 1e-9) for a, b in pairs)
    return found


def make_table(cases: Sequence[Case], measured: dict[str, dict[str, Any]], device: dict[str, Any]) -> Table:
    """Predictions beside measurements of every case that was not skipped."""
    done = [(case, measured[case.name]) for case in cases if "skipped" not in measured[case.name]]
    return Table(device, tuple(Row(case, result, predict(case, result["rows"])) for case, result in done))


def _rounded(value: Any) -> Any:
    """Six significant digits everywhere: more is noise, and files of two machines can be compared."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


STEP_PARTS = ("forward", "backward", "reduction", "optimizer")


def print_table(table: Table, *, console: Console | None = None) -> None:
    """Steps and their parts, the parts of the MoE layers, the slowdowns by skew, and the summary."""
    console = console or Console()
    console.print(_steps(table))
    if any(row.measured["layer_parts"] for row in table.rows):
        console.print(_layers(table))
    if table.slowdowns():
        console.print(_slowdowns(table))
    console.print(_summary(table))


def _summary(table: Table) -> str:
    summary = table.summary()
    goal = f"goals: median {GOALS['median']:.0%}, worst {GOALS['worst']:.0%}, skew within {GOALS['skew']:.0%}"
    parts = [
        f"{text} {value:.1%}"
        for text, value in (
            ("median error", summary["median_error"]),
            ("worst", summary["worst_error"]),
            ("slowdown by skew off by up to", summary["worst_skew_error"]),
        )
        if value is not None
    ]
    if not parts:
        return f"no case has {GOALS['from_tokens']:.0f} tokens or more, from which on errors are summed up"
    return f"step time at {GOALS['from_tokens']:.0f} tokens and more: {', '.join(parts)} ({goal})"


def _by_case(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> RichTable:
    """A row for each case, its name first."""
    shown = RichTable(title=title)
    shown.add_column("case")
    for column in columns:
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(*row)
    return shown


def _steps(table: Table) -> RichTable:
    rows = [
        (
            row.case.name,
            _pair(row.measured["step"], row.predicted["step"]),
            *(_pair(row.measured["parts"][part], row.predicted["parts"][part]) for part in STEP_PARTS),
        )
        for row in table.rows
    ]
    title = f"Measured and predicted on {table.device.get('name', '?')}, ms (error)"
    return _by_case(title, ("step", *STEP_PARTS), rows)


def _layers(table: Table) -> RichTable:
    known = {key.split(".")[1] for row in table.rows for key in row.measured["layer_parts"]}
    parts = [part for part in ("router", "permute", "dispatch", "experts", "combine", "shared") if part in known]
    measured = [row for row in table.rows if row.measured["layer_parts"]]
    rows = [(row.case.name, *(_layer_cell(row, part) for part in parts)) for row in measured]
    return _by_case("MoE layers, forward + backward, ms per layer (error)", parts, rows)


def _layer_cell(row: Row, part: str) -> str:
    def both(source: dict[str, float]) -> float:
        return source.get(f"forward.{part}", 0.0) + source.get(f"backward.{part}", 0.0)

    scenario = row.case.scenario
    runs = scenario.model.moe_layers * scenario.num_micro_batches
    return _pair(both(row.measured["layer_parts"]) / runs, both(row.predicted["layer_parts"]) / runs)


def _pair(measured: float, predicted: float) -> str:
    if round(max(measured, predicted) * 1e3, 2) == 0:
        return "-"  # a part that this case does not have
    error = f" ({predicted / measured - 1:+.1%})" if measured > 0 else ""
    return f"{measured * 1e3:.2f} {predicted * 1e3:.2f}{error}"


def _slowdowns(table: Table) -> RichTable:
    rows = [(name, f"{measured:.1%}", f"{predicted:.1%}") for name, measured, predicted in table.slowdowns()]
    return _by_case("Slowdown by skew", ("measured", "predicted"), rows)


def validate_command(
    *,
    device: str = "cuda",
    gpus: int = 1,
    out: Path | None = None,
    scenario: Scenario | None = None,
    profile: str | None = None,
    only: str | None = None,
    seconds: float = 2.0,
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
    from moesim.validation.real_runs import check_device

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
    table = _measure_and_predict(cases, device=device, out=out or Path("validation"), seconds=seconds, quiet=quiet)
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


def _measure_and_predict(cases: list[Case], *, device: str, out: Path, seconds: float, quiet: bool) -> Table:
    import torch

    from moesim.validation.measurement import Effort
    from moesim.validation.real_runs import device_name, measure_cases

    measured = measure_cases(
        cases,
        device=device,
        folder=out,
        effort=Effort(seconds=seconds),
        log=(lambda text: None) if quiet else print,
    )
    about: dict[str, Any] = {"name": device_name(device), "torch": torch.__version__, "date": date.today().isoformat()}
    table = make_table(cases, measured, about)
    if not table.rows:
        raise UserError("every case was skipped; try --only with a smaller one")
    save_table(table, out / "table.json")
    return table


def _show(table: Table, quiet: bool) -> None:
    if not quiet:
        print_table(table)
