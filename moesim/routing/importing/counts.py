"""The reader of plain counts: how often experts were chosen, as CSV or JSON."""

import math
import re
from pathlib import Path
from typing import Any

from moesim.routing.importing.assembly import of_counts
from moesim.routing.importing.source import Source, numbers_of, refuse
from moesim.strict_json import parse_json


def read_counts(path: Path) -> Source:
    """CSV (a line a layer, a number an expert), or JSON: lists, or `{"weight": lists}` as EPLB takes.

    A folder must hold one such file alone.
    """
    if path.is_dir():
        files = sorted([*path.glob("*.json"), *path.glob("*.csv")])
        if len(files) != 1:
            refuse(path, f"holds {len(files)} files of JSON or CSV", "name the file of counts")
        path = files[0]
    if not path.is_file():
        refuse(path, "no such file", "name a CSV or JSON file of counts, a row per layer")
    text = path.read_text(encoding="utf-8", errors="replace")
    value = _rows_of_json(path, text) if path.suffix == ".json" else _checked_rows(path, text)
    return of_counts([numbers_of(value, str(path), axes=2)], str(path))


def _rows_of_json(path: Path, text: str) -> Any:
    try:
        value = parse_json(text)
    except ValueError as error:
        refuse(path, f"is no JSON ({error})", "write a list of counts per layer")
    return value.get("weight", value.get("counts")) if isinstance(value, dict) else value


def _checked_rows(path: Path, text: str) -> list[list[float]]:
    """The numbers of every line. Raises UserError with the first line that has other than counts, or too many."""
    rows = rows_of_csv(text)
    filled = [number for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    numbers = filled[len(filled) - len(rows) :]
    for number, row in zip(numbers, rows, strict=True):
        for cell in row:
            if not _is_count(cell):
                what = f"no table of counts: line {number}: {cell.strip()[:20]!r} is no count"
                refuse(path, what, "counts are finite numbers that are not negative")
        if len(row) != len(rows[0]):
            have = f"line {number} has {len(row)} counts, line {numbers[0]} has {len(rows[0])}"
            refuse(path, have, "write one for every expert of a layer")
    return [[float(cell) for cell in row] for row in rows]


def _is_count(cell: str) -> bool:
    try:
        return 0 <= float(cell) < math.inf
    except ValueError:
        return False


def rows_of_csv(text: str) -> list[list[str]]:
    """Cells of the lines that are not empty, without a first line of names."""
    rows = [re.split(r"[,;\t]", line.strip().rstrip(",;")) for line in text.splitlines() if line.strip()]
    return rows[1:] if rows and any(re.search("[A-Za-z_]", cell) for cell in rows[0]) else rows
