"""Quantities at the edge: text with a unit in, SI base units (seconds, bytes, bytes/s) inside, readable text out."""

import math
import re

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_QUANTITY = re.compile(r"^\s*([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-zµ/]+)\s*$")


def _unit_table(kind: str) -> dict[str, float]:
    prefixes = _DECIMAL | _BINARY
    if kind == "bytes":
        return {f"{p}B": scale for p, scale in prefixes.items()}
    if kind == "bandwidth":
        table = {f"{p}B/s": scale for p, scale in prefixes.items()}
        table |= {f"{p}bps": scale / 8 for p, scale in _DECIMAL.items()}
        return (
            table
            | {f"{p}b/s": scale / 8 for p, scale in _DECIMAL.items()}
            | {f"{p}bit/s": s / 8 for p, s in _DECIMAL.items()}
        )
    assert kind == "seconds"
    return {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


_EXAMPLES = {"bytes": "141 GB or 64 MiB", "bandwidth": "400 Gbps or 450 GB/s", "seconds": "3.3 us"}
_TABLES = {kind: _unit_table(kind) for kind in _EXAMPLES}


def _parse(value: object, kind: str) -> float:
    if isinstance(value, bool) or not isinstance(value, str):
        raise ValueError(f"{value!r} has no unit; write a text such as {_EXAMPLES[kind]}")
    match = _QUANTITY.match(value)
    if match is None or match[2] not in _TABLES[kind]:
        raise ValueError(f"{value!r} is not a quantity in {kind}; write it as {_EXAMPLES[kind]}")
    number = float(match[1]) * _TABLES[kind][match[2]]
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{value!r} must be a finite number that is not negative")
    return number


def parse_bytes(value: object) -> float:
    """Bytes of a text such as "141 GB" or "64 MiB". Raises ValueError for a missing or wrong unit."""
    return _parse(value, "bytes")


def parse_bandwidth(value: object) -> float:
    """Bytes per second of a text such as "400 Gbps" or "450 GB/s". Raises ValueError for a missing or wrong unit."""
    return _parse(value, "bandwidth")


def parse_seconds(value: object) -> float:
    """Seconds of a text such as "3.3 us". Raises ValueError for a missing or wrong unit."""
    return _parse(value, "seconds")


def _scaled(value: float, unit: str, digits: int) -> str:
    for prefix in ("P", "T", "G", "M", "k"):
        if abs(value) >= _DECIMAL[prefix]:
            return f"{value / _DECIMAL[prefix]:.{digits}g} {prefix}{unit}"
    return f"{value:.{digits}g} {unit}"


def format_bytes(value: float, *, digits: int = 4) -> str:
    """Decimal bytes, e.g. "1.5 GB"."""
    return _scaled(value, "B", digits)


def format_bandwidth(value: float, *, digits: int = 4) -> str:
    """Decimal bytes per second, e.g. "450 GB/s"."""
    return _scaled(value, "B/s", digits)


def format_seconds(value: float, *, digits: int = 4) -> str:
    """Seconds, e.g. "12.3 ms"."""
    for unit in ("s", "ms", "us"):
        if abs(value) >= _TABLES["seconds"][unit]:
            return f"{value / _TABLES['seconds'][unit]:.{digits}g} {unit}"
    return f"{value / 1e-9:.{digits}g} ns" if value else "0 s"
