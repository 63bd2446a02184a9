"""One calibration: which shapes are still unmeasured, how long each family may take, and rows kept as they come.

Every process of a torchrun appends to its own file of JSON lines in `OUT.partial/`, so that an interrupt or a crash
keeps what was measured; a later session over the same OUT goes on from there.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from moesim.kernels.profile import Profile, load_profile_file, save_profile
from moesim.strict_json import json_text, parse_json

Row = dict[str, Any]
_MEASURED = frozenset(
    {"p20", "p50", "p80", "repeats", "clock_mhz", "watts", "flops_per_second"}
    | {"backend", "kernel", "rank", "session", "visit", "visits"}
)
_OVERLAP = frozenset({"compute_alone", "transfer_alone", "compute_beside", "transfer_beside"})


def row_key(row: Row) -> str:
    """The identity of a row: its family and shape, without what was measured."""
    facts = {name: value for name, value in row.items() if name not in _MEASURED and name not in _OVERLAP}
    return json_text(facts, sort_keys=True)


def _shape_key(row: Row) -> str:
    """As `row_key`, whether or not the row is held out of the fits: what is measured is the same."""
    return row_key({name: value for name, value in row.items() if name != "held_out"})


def partial_folder(out: Path) -> Path:
    """Where a calibration into `out` keeps its rows until they are merged; there only while one is unfinished."""
    return out.with_name(out.name + ".partial")


@dataclass
class Session:
    """The rows of one rank and the clock of the family that is being measured."""

    out: Path
    rank: int = 0
    clock: Callable[[], float] = time.monotonic
    report: Callable[[str], None] = print
    visit: int = 0
    done: dict[str, int] = field(default_factory=dict)  # visits per shape
    skipped: list[str] = field(default_factory=list)
    num_rows: int = 0
    _file: TextIO | None = None

    @property
    def partial(self) -> Path:
        """The folder of rows that are not merged yet."""
        return partial_folder(self.out)

    def open(self) -> None:
        """Find what earlier sessions measured, and start this rank's file."""
        if self.out.exists():
            for row in load_profile_file(self.out).rows:
                self._count(row, len(row.get("visits", [0])))
                if "kernel" in row:
                    self._count(kernel_name_row(row), 1)
        self.partial.mkdir(parents=True, exist_ok=True)
        for row in _partial_rows(self.partial):
            self._count(row, 1)
        self._file = self._fresh_file()

    def _fresh_file(self) -> TextIO:
        """A file of this session's own: the last line of an earlier one may be torn."""
        for number in itertools.count():
            try:
                return (self.partial / f"rank{self.rank}.{number}.jsonl").open("x", encoding="utf-8")
            except FileExistsError:
                continue
        raise AssertionError("counting does not end")

    def _count(self, row: Row, visits: int) -> None:
        key = _shape_key(row)
        self.done[key] = self.done.get(key, 0) + visits

    def wants(self, row: Row) -> bool:
        """Whether the shape still lacks the visit that is under way."""
        return self.done.get(_shape_key(row), 0) <= self.visit

    def close(self) -> None:
        """Close this rank's file; rows stay on disk. Where nothing was measured, nothing is left to go on with."""
        if self._file is None:
            return
        path = Path(self._file.name)
        self._file.close()
        self._file = None
        if not path.stat().st_size:
            path.unlink()
            with suppress(OSError):  # another rank's rows, or rows of an earlier session, are in it
                self.partial.rmdir()

    def add(self, row: Row) -> None:
        """Keep one measured row."""
        assert self._file is not None, "open the session first"
        self._file.write(json_text(row | {"rank": self.rank}) + "\n")
        self._file.flush()
        self._count(row, 1)
        self.num_rows += 1

    def skip(self, row: Row, reason: str) -> None:
        """Say that a shape could not be measured, and why."""
        line = f"skipped {row_key(row)}: {reason}"
        self.skipped.append(line)
        self.report(line)

    def within(self, rows: list[Row], seconds: float) -> Iterator[Row]:
        """The rows not measured yet, until `seconds` have passed since the first."""
        begin = self.clock()
        for row in rows:
            if not self.wants(row):
                continue
            if self.clock() - begin >= seconds:
                return
            yield row

    def merge(self, *, name: str, environment: dict[str, Any]) -> Profile:
        """Write every row of this and earlier sessions into OUT; the visits of a shape become one row."""
        earlier = load_profile_file(self.out) if self.out.exists() else Profile(name=name, sessions=[], rows=[])
        number = len(earlier.sessions)
        visits: dict[str, list[Row]] = {}
        for row in earlier.rows:
            visits.setdefault(row_key(row), []).append(row)
        for row in _partial_rows(self.partial):
            visits.setdefault(row_key(row), []).append(row | {"session": number})
        rows = _with_kernel_names([_merged(parts) for parts in visits.values()])
        profile = Profile(name=name, sessions=[*earlier.sessions, environment], rows=rows, fits=earlier.fits)
        save_profile(profile, self.out)
        for path in self.partial.glob("*.jsonl"):
            path.unlink()
        if self.partial.exists():
            self.partial.rmdir()
        return profile


def kernel_name_row(row: Row) -> Row:
    """The key of the row that names the kernel behind `row`."""
    return {"family": "kernel_name", "of": parse_json(row_key(row))}


def _with_kernel_names(rows: list[Row]) -> list[Row]:
    """The measured rows, each with its first kernel's name where a row of its own gives it."""
    names = {row_key(row["of"]): row["kernel"] for row in rows if row["family"] == "kernel_name"}
    measured = [row for row in rows if row["family"] != "kernel_name"]
    for row in measured:
        found = names.get(row_key(row))
        if found:
            row["kernel"] = found[0].split("(")[0][:60]
    return measured


def _merged(parts: list[Row]) -> Row:
    """One row of all visits of a shape: medians over them, and each visit's median in `visits`."""
    merged = {name: value for name, value in parts[0].items() if name not in ("rank", "visit")}
    if len(parts) == 1 or "p50" not in merged:
        return merged
    for name in ("p20", "p50", "p80", "clock_mhz", "watts"):
        values = [row[name] for row in parts if name in row]
        if values:
            merged[name] = float(f"{np.median(values):.5g}")
    merged["visits"] = [p50 for row in parts for p50 in row.get("visits", [row["p50"]])]
    merged["repeats"] = sum(row["repeats"] for row in parts)
    return merged


def _partial_rows(folder: Path) -> Iterator[Row]:
    """Rows of the JSON-lines files; a last line cut off by a crash is dropped."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row
