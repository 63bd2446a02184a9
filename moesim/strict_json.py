"""Strict JSON (RFC 8259), the only place that writes or reads it: a number is finite, or it is an error.

Python's own writer puts the words NaN and Infinity into files that no other reader takes.
"""

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
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


def parse_json(text: str | bytes, *, constants: bool = False) -> Any:
    """The value that JSON text holds. Raises ValueError for what is not strict JSON, nesting beyond reason included.

    `constants`: Infinity and NaN, which others write, are texts of these names.
    """
    try:
        return json.loads(text, parse_constant=str if constants else _refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


_BEHIND_A_VALUE = tuple(" \t\r\n,:]}")
LARGEST_VALUE = 1 << 25  # characters of one value of a stream


def streamed_members(pieces: Iterable[str], *, array: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of the members of one large JSON object, which comes in pieces; the items of its member `array` come
    one by one, each with that key, so that memory holds one value and one piece. Numbers that are not finite are None.

    Raises ValueError for what is no JSON object, is cut off, or has a value of more than LARGEST_VALUE characters.

    >>> list(streamed_members(['{"a": 1, "b": [', '{}, 2]}'], array="b"))
    [('a', 1), ('b', {}), ('b', 2)]
    """
    text = _Stream(pieces)
    text.take("{")
    while text.next() != "}":
        key = text.value()
        if not isinstance(key, str):
            raise ValueError("a key of an object is a text")
        text.take(":")
        if key == array and text.next() == "[":
            text.take("[")
            while text.next() != "]":
                yield key, text.value()
                text.separator("]")
            text.take("]")
        else:
            yield key, text.value()
        text.separator("}")


class _Stream:
    """Text that comes in pieces, and how far it was read."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._pieces, self._text, self._at = iter(pieces), "", 0
        self._decode = json.JSONDecoder(parse_constant=lambda _: None).raw_decode

    def _more(self) -> bool:
        piece = next(self._pieces, "")
        self._text, self._at = self._text[self._at :] + piece, 0
        return piece != ""

    def next(self) -> str:
        """The next character that is no space; it stays."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                raise ValueError("it ends in the middle")

    def take(self, expected: str) -> None:
        """Step over one character."""
        found = self.next()
        if found != expected:
            raise ValueError(f"{found!r} stands where {expected!r} must")
        self._at += 1

    def separator(self, end: str) -> None:
        """Step over a comma, where no end comes."""
        if self.next() != end:
            self.take(",")

    def value(self) -> Any:
        """The next value, whole."""
        self.next()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except ValueError as error:
                if len(self._text) - self._at > LARGEST_VALUE or not self._more():
                    raise ValueError(str(error)) from None
                continue
            after = self._text[end : end + 1]
            if after in _BEHIND_A_VALUE or not self._more():  # else a number that goes on in the next piece
                self._at = end
                return value


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
