"""Strict JSON (RFC 8259), the only place that writes or reads it: a number is finite, or it is an error.

Python's own writer puts the words NaN and Infinity into files that no other reader takes.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from moesim.errors import UserError


def json_text(
    value: Any,
    *,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = True,
) -> str:
    """`value` as JSON text. Raises UserError naming the first number that is infinite or not a number.

    >>> json_text({"step_s": 0.5})
    '{"step_s": 0.5}'
    """
    try:
        return json.dumps(
            value,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
            ensure_ascii=ensure_ascii,
            allow_nan=False,
        )
    except ValueError:
        place, number = next(_not_finite(value, ""), ("", math.nan))
    raise UserError(
        f"{place or 'a result'} is {number}, which is no result and is not written: a quantity of the input lies "
        "outside all that is physical; look for an extreme number there"
    )


def parse_json(text: str | bytes) -> Any:
    """The value that JSON text holds. Raises ValueError for what is not strict JSON, nesting beyond reason included."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def packed(text: str, path: Path) -> bytes:
    """What `path` is to hold of the text: gzipped where its name ends in .gz, the same bytes for the same text."""
    data = text.encode()
    return gzip.compress(data, mtime=0) if path.suffix == ".gz" else data


def unpacked(data: bytes) -> bytes:
    """The text of a file as `packed` gave it. Raises ValueError where gzipped data are damaged."""
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(str(error)) from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:40]} is out of range")
    return number


def _not_finite(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """Dotted place and value of every number in plain values that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        yield place, value
    elif isinstance(value, Mapping):
        for key, child in value.items():
            yield from _not_finite(child, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for index, child in enumerate(value):
            yield from _not_finite(child, f"{place}.{index}" if place else str(index))
