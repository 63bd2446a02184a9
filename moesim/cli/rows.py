"""CSV beside JSON: one row per thing, one column per number, named by its path in the JSON and with its unit.

`cost.usd_total` of a row is `["cost"]["usd_total"]` of the JSON. What has many values for one thing (a number per rank)
is in the JSON alone; a pair that bounds a range becomes two columns.
"""

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from moesim.strict_json import json_text


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
