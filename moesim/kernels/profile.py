"""The profile: a data file of measured kernels and the machine they were measured on.

JSON, gzipped where the name ends in .gz:
    {"schema_version": 1, "name": "h200", "sessions": [{device, driver, torch, cuda, date, ...}],
     "rows": [{"family": "gemm", "m": ..., "k": ..., "n": ..., "dtype": "bf16", "direction": "forward",
               "p20": s, "p50": s, "p80": s, "repeats": n, "clock_mhz": ..., "watts": ..., "session": 0,
               "visits": [p50 of each visit, s], "kernel": name}, ...],
     "fits": {"gemm/bf16/forward": {"theta": [...], "clock": [...], "alpha": a}, ...}}

A profile of tables (`moesim.kernels.tables`) also has {"tables": {"base", "clock", "peak_shares", "families", ...}}.

A session is one call of the benchmarks; `visits` are apart in time and, with several GPUs, on different ones. `fits`
are the physical parameters of `moesim.kernels.kernel_classes`, kept because fitting takes longer than loading.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moesim.errors import UserError
from moesim.files import write_atomically
from moesim.strict_json import json_text, packed, parse_json, unpacked

SCHEMA_VERSION = 1
SHIPPED = Path(__file__).parent / "profiles"


@dataclass
class Profile:
    """Measured rows and the sessions that they come from; `tables` where those are published tables, not sessions."""

    name: str
    sessions: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    fits: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, Any] | None = None

    def family(self, name: str) -> list[dict[str, Any]]:
        """The rows of one family."""
        return [row for row in self.rows if row.get("family") == name]


def save_profile(profile: Profile, path: Path) -> None:
    """Write `profile`, one row a line; never leaves a half-written file in place of a whole one."""
    facts = {"schema_version": SCHEMA_VERSION, "name": profile.name, "sessions": profile.sessions, "fits": profile.fits}
    if profile.tables is not None:
        facts["tables"] = profile.tables
    head = json_text(facts, indent=1)
    rows = ",\n".join(json_text(row, separators=(",", ":")) for row in profile.rows)
    text = f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n'
    write_atomically(path, packed(text, path))


def load_profile_file(path: Path, *, shipped: bool = False) -> Profile:
    """Read a profile. Raises UserError when it is missing, damaged or of another schema version.

    `shipped`: of one that ships the tests have looked at every row, which takes as long as reading it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot read this profile ({reason}); `moesim calibrate --out` makes one") from None
    try:
        content = parse_json(unpacked(data))
    except ValueError as error:
        raise UserError(f"{path}: not a whole profile ({error}); make it again with `moesim calibrate`") from None
    if not isinstance(content, dict) or "schema_version" not in content:
        raise UserError(f"{path}: not a profile: no schema_version; make one with `moesim calibrate`")
    if content["schema_version"] != SCHEMA_VERSION:
        found = content["schema_version"]
        raise UserError(
            f"{path}: profile of schema version {found!r}, this moesim reads {SCHEMA_VERSION}; "
            "run `moesim calibrate` again"
        )
    name, sessions, rows, fits = (content.get(key) for key in ("name", "sessions", "rows", "fits"))
    if not isinstance(name, str) or not isinstance(sessions, list) or not isinstance(rows, list):
        raise UserError(f"{path}: profile without name, sessions or rows; make it again with `moesim calibrate`")
    if not all(isinstance(row, dict) and isinstance(row.get("family"), str) for row in rows):
        raise UserError(f"{path}: profile with a row that names no family; make it again with `moesim calibrate`")
    for index, row in enumerate(() if shipped else rows):
        for mistake in _mistakes_of_row(row, place=f"rows.{index}"):
            raise UserError(f"{path}: {mistake}; make it again with `moesim calibrate`")
    tables = content.get("tables")
    if tables is not None and not (isinstance(tables, dict) and {"base", "clock", "peak_shares"} <= tables.keys()):
        raise UserError(f"{path}: profile with damaged tables; make it again with `moesim calibrate --from-tables`")
    return Profile(name=name, sessions=sessions, rows=rows, fits=fits if isinstance(fits, dict) else {}, tables=tables)


class _Bounds(NamedTuple):
    least: float
    most: float


_SIZE = _Bounds(1, 1e13)
_LOAD = _Bounds(0, 1e13)
_SECONDS = _Bounds(1e-9, 1e4)
_TEXT = str
_GEMM = {"k": _SIZE, "n": _SIZE, "dtype": _TEXT, "direction": _TEXT}
_NEEDED: Mapping[str, Mapping[str, Any]] = {
    "host": {"part": _TEXT, "kind": _TEXT, "p50": _SECONDS},
    "gemm": {"m": _SIZE, **_GEMM, "p50": _SECONDS},
    "gemm_fp8": {"m": _SIZE, **_GEMM, "p50": _SECONDS},
    "grouped_gemm": {"rows_per_expert": [_LOAD], **_GEMM, "p50": _SECONDS},
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


def _mistakes_of_row(row: Mapping[str, Any], *, place: str) -> Iterator[str]:
    """What is wrong with a row, so that no model is fitted to numbers that nobody can have measured.

    One text each: `rows.3.m: must be a number between 1 and 1e+13, got -1`.
    """
    family = row.get("family")
    for key, wanted in _NEEDED.get(str(family), {}).items():
        if key not in row:
            yield f"{place}.{key}: missing in a row of {family}"
        else:
            yield from _mistakes(row[key], wanted, place=f"{place}.{key}")
    for key in ("of", "compute"):
        if isinstance(row.get(key), dict):
            yield from _mistakes_of_row({"p50": 1.0, **row[key]}, place=f"{place}.{key}")


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
