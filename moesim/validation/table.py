"""Measured and predicted times side by side: as data, as text, and recomputed from the shipped profile."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moesim.errors import UserError
from moesim.files import write_atomically
from moesim.scenario import Scenario, dump_scenario, load_scenario_text
from moesim.strict_json import json_text, packed, parse_json, unpacked
from moesim.validation.cases import Case
from moesim.validation.predict import predict

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
            "measured": {key: value for key, value in row.measured.items() if key not in ("kernels", "scenario")},
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
        rows = tuple(
            Row(Case(row["name"], _scenario(row)), row["measured"], row["predicted"]) for row in content["rows"]
        )
        return Table(content["device"], rows)
    except OSError as error:
        raise UserError(
            f"{path}: cannot read this table ({error.strerror}); run `moesim validate` to make one"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a whole validation table ({error!r}); run `moesim validate` again") from None


def _scenario(row: dict[str, Any]) -> Scenario:
    return load_scenario_text(row["scenario"], source=row["name"])


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
