"""The reader of plain counts: how often experts were chosen, as CSV or JSON."""

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
    value = _rows_of_json(path, text) if path.suffix == ".json" else rows_of_csv(text)
    return of_counts([numbers_of(value, str(path), axes=2)], str(path))


def _rows_of_json(path: Path, text: str) -> Any:
    try:
        value = parse_json(text)
    except ValueError as error:
        refuse(path, f"is no JSON ({error})", "write a list of counts per layer")
    return value.get("weight", value.get("counts")) if isinstance(value, dict) else value


def rows_of_csv(text: str) -> list[list[str]]:
    """Cells of the lines that are not empty, without a first line of names."""
    rows = [re.split(r"[,;\t]", line.strip().rstrip(",;")) for line in text.splitlines() if line.strip()]
    return rows[1:] if rows and any(re.search("[A-Za-z_]", cell) for cell in rows[0]) else rows
