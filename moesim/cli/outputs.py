"""What a verb leaves beside its screen: a page, which replaces nothing by accident, and CSV.

CSV has one row per thing and one column per number, named by its path in the JSON and with its unit: `cost.usd_total`
of a row is `["cost"]["usd_total"]` of the JSON. What has many values for one thing (a number per rank) is in the JSON
alone; a pair that bounds a range becomes two columns.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.cli.flags import check_writable
from moesim.errors import UserError
from moesim.strict_json import json_text


def add_page(parser: argparse.ArgumentParser, *, what: str, file: str) -> None:
    """--out for a page called `file` that shows `what`."""
    text = f"{what} as one HTML file that needs no network; runs/NAME/{file} by default, and none beside --json"
    parser.add_argument("--out", metavar="FILE.html", type=Path, help=text)


def place_of_page(args: argparse.Namespace, *, name: str, file: str) -> Path | None:
    """Where the page of the scenario `name` goes; None where none is asked for. Raises UserError."""
    if args.out is None and args.json:
        return None
    path: Path = args.out or Path("runs") / name / file
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file, such as {path / file}")
    check_writable(path)
    return path


def write_output(text: str, path: Path, *, force: bool) -> None:
    """Write a file, whole or not at all. Raises UserError where another file is in its place, unless `force`.

    A file of the same content is left alone: the same call twice is no mistake.
    """
    data = text.encode("utf-8")
    if path.exists() and not force:
        if path.read_bytes() == data:
            return
        raise UserError(f"{path} exists and differs; choose another --out, or --force to replace it")
    from moesim.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data, replace=force)


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a head and the rows, each flattened; a cell of a row that lacks the column stays empty."""
    flat = [dict(_cells(row)) for row in rows]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)


def texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a study chose for a point, each value in one cell: plain ones as they are, others as JSON."""
    plain = (str, int, float, bool, type(None))
    return {key: value if isinstance(value, plain) else json_text(value) for key, value in values.items()}


def _cells(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        if not any(str(key).isdecimal() for key in value):  # those are numbers per rank
            for key, child in value.items():
                yield from _cells(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        if path.endswith("_range_s") and len(value) == 2:
            yield from zip((f"{path}.low", f"{path}.high"), value, strict=True)
    elif isinstance(value, bool):
        yield path, str(value).lower()
    else:
        yield path, value
