"""What every row of a profile must hold, so that no kernel model is fitted to numbers that nobody can have measured."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class _Bounds(NamedTuple):
    least: float
    most: float


_SIZE = _Bounds(1, 1e13)
_LOAD = _Bounds(0, 1e13)
_SECONDS = _Bounds(1e-9, 1e4)
_TEXT = str
_PRODUCT = {"k": _SIZE, "n": _SIZE, "dtype": _TEXT, "direction": _TEXT}
_NEEDED: Mapping[str, Mapping[str, Any]] = {
    "host": {"part": _TEXT, "kind": _TEXT, "p50": _SECONDS},
    "gemm": {"m": _SIZE, **_PRODUCT, "p50": _SECONDS},
    "gemm_fp8": {"m": _SIZE, **_PRODUCT, "p50": _SECONDS},
    "grouped_gemm": {"rows_per_expert": [_LOAD], **_PRODUCT, "p50": _SECONDS},
    "attention": {
        **dict.fromkeys(("batch", "sequence", "heads", "kv_heads", "head_dim", "value_dim"), _SIZE),
        "causal": bool, "direction": _TEXT, "p50": _SECONDS,
    },
    "memory_bound": {"kind": _TEXT, "rows": _SIZE, "width": _SIZE, "bytes": _SIZE, "p50": _SECONDS},
    "sustained": {"of": dict, "p50": _SECONDS, "flops_per_second": _Bounds(1e6, 1e20)},
    "collective": {"kind": _TEXT, "bytes": _SIZE, "ranks": _SIZE, "p50": _SECONDS},
    "contention": {
        "compute": dict, "bytes": _SIZE,
        **dict.fromkeys(("compute_alone", "compute_beside", "transfer_alone", "transfer_beside"), _SECONDS),
    },
}  # fmt: skip
_NAMES = {str: "a text", bool: "true or false", dict: "the sizes of a kernel"}


def mistakes_of_row(row: Mapping[str, Any], *, place: str) -> Iterator[str]:
    """What is wrong with a row, one text each: `rows.3.m: must be a number between 1 and 1e+13, got -1`."""
    family = row.get("family")
    for key, wanted in _NEEDED.get(str(family), {}).items():
        if key not in row:
            yield f"{place}.{key}: missing in a row of {family}"
        else:
            yield from _mistakes(row[key], wanted, place=f"{place}.{key}")
    for key in ("of", "compute"):
        if isinstance(row.get(key), dict):
            yield from mistakes_of_row({"p50": 1.0, **row[key]}, place=f"{place}.{key}")


def _mistakes(value: Any, wanted: Any, *, place: str) -> Iterator[str]:
    if isinstance(wanted, list):
        if not isinstance(value, list) or not value:
            yield f"{place}: must be a list of numbers, got {value!r}"
            return
        least, most = wanted[0]
        if all(type(item) in (int, float) and least <= item <= most for item in value):
            return
        for index, item in enumerate(value):
            yield from _mistakes(item, wanted[0], place=f"{place}.{index}")
    elif isinstance(wanted, _Bounds):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not wanted.least <= value <= wanted.most:
            yield f"{place}: must be a number between {wanted.least:g} and {wanted.most:g}, got {value!r}"
    elif not isinstance(value, wanted):
        yield f"{place}: must be {_NAMES[wanted]}, got {value!r}"
