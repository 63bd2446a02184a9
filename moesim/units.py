"""Quantities at the edge: text with a unit in, SI base units (seconds, bytes, bytes/s) inside, readable text out."""

import math
import re

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_QUANTITY = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([A-Za-zµμ/]+)\s*")


def _unit_table(kind: str) -> dict[str, float]:
    prefixes = _DECIMAL | _BINARY
    if kind == "bytes":
        return {f"{prefix}B": scale for prefix, scale in prefixes.items()}
    if kind == "bandwidth":
        table = {f"{prefix}B/s": scale for prefix, scale in prefixes.items()}
        for bits in ("bps", "b/s", "bit/s"):
            table |= {f"{prefix}{bits}": scale / 8 for prefix, scale in _DECIMAL.items()}
        return table
    if kind == "flop_rate":
        return {f"{prefix}{unit}": scale for prefix, scale in _DECIMAL.items() for unit in ("FLOP/s", "FLOPS", "FLOPs")}
    if kind == "frequency":
        return {f"{prefix}Hz": scale for prefix, scale in _DECIMAL.items()}
    assert kind == "duration"
    return {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9} | {
        "min": 60.0,
        "h": 3600.0,
        "d": 86400.0,
    }


_KINDS = {  # what a quantity is called, and two of them
    "bytes": ("an amount of bytes", "141 GB or 64 MiB"),
    "bandwidth": ("a bandwidth", "400 Gbps or 450 GB/s"),
    "duration": ("a duration", "3.3 us"),
    "flop_rate": ("a rate", "148 TFLOP/s"),
    "frequency": ("a frequency", "1500 MHz"),
}
_TABLES = {kind: _unit_table(kind) for kind in _KINDS}


def _parse(value: object, kind: str) -> float:
    name, example = _KINDS[kind]
    if not isinstance(value, str):
        shown = "a flag" if isinstance(value, bool) else str(value)
        raise ValueError(f"{shown} has no unit; write {name} such as {example}")
    match = _QUANTITY.fullmatch(value)
    if match is None or match[2] not in _TABLES[kind]:
        raise ValueError(f'"{value}" is not {name}; write it as {example}')
    number = float(match[1]) * _TABLES[kind][match[2]]
    if number < 0:
        raise ValueError(f'"{value}" is negative; write it as {example}')
    if not math.isfinite(number):
        raise ValueError(f'"{value}" is not finite; write it as {example}')
    return number


def parse_bytes(value: object) -> float:
    """Bytes of a text such as "141 GB" or "64 MiB". Raises ValueError for a missing or wrong unit."""
    return _parse(value, "bytes")


def parse_bandwidth(value: object) -> float:
    """Bytes per second of a text such as "400 Gbps" or "450 GB/s". Raises ValueError for a missing or wrong unit."""
    return _parse(value, "bandwidth")


def parse_seconds(value: object) -> float:
    """Seconds of a text such as "3.3 us". Raises ValueError for a missing or wrong unit."""
    return _parse(value, "duration")


def parse_flop_rate(value: object) -> float:
    """FLOP per second of a text such as "148 TFLOP/s". Raises ValueError for a missing or wrong unit."""
    return _parse(value, "flop_rate")


def parse_hertz(value: object) -> float:
    """Hertz of a text such as "1500 MHz". Raises ValueError for a missing or wrong unit."""
    return _parse(value, "frequency")


def _rounded(value: float, digits: int) -> float:
    """`value` to `digits` significant digits: rounding comes before the choice of prefix, so 999,999 is "1 M"."""
    return float(f"{value:.{digits}g}")


def _scaled(value: float, unit: str, digits: int) -> str:
    value = _rounded(value, digits)
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


def format_flop_rate(value: float, *, digits: int = 4) -> str:
    """Decimal FLOP per second, e.g. "148 TFLOP/s"."""
    return _scaled(value, "FLOP/s", digits)


def format_hertz(value: float, *, digits: int = 4) -> str:
    """Hertz, e.g. "1.5 GHz"."""
    return _scaled(value, "Hz", digits)


def format_seconds(value: float, *, digits: int = 4) -> str:
    """Seconds, e.g. "12.3 ms"."""
    if value == 0:
        return "0 s"
    value = _rounded(value, digits)
    for unit in ("s", "ms", "us"):
        if abs(value) >= _TABLES["duration"][unit]:
            return f"{value / _TABLES['duration'][unit]:.{digits}g} {unit}"
    return f"{value / 1e-9:.{digits}g} ns"


def shortened(text: str, width: int) -> str:
    """`text`, or its beginning and dots where it has more than `width` characters."""
    return text if len(text) <= width else f"{text[: width - 3]}..."
