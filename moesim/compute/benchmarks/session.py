"""One calibration: which shapes are still unmeasured, how long each family may take, and rows kept as they come.

Every process of a torchrun appends to its own file of JSON lines in `OUT.partial/`, so that an interrupt or a crash
keeps what was measured; a later session over the same OUT goes on from there.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from moesim.compute.profile import Profile, load_profile_file, save_profile

Row = dict[str, Any]
_MEASURED = frozenset({"p20", "p50", "p80", "repeats", "sm_mhz", "watts", "backend", "rank", "session", "other_p50"})
_OVERLAP = frozenset({"compute_alone", "transfer_alone", "compute_beside", "transfer_beside"})


def row_key(row: Row) -> str:
    """The identity of a row: its family and shape, without what was measured."""
    facts = {name: value for name, value in row.items() if name not in _MEASURED and name not in _OVERLAP}
    return json.dumps(facts, sort_keys=True)


@dataclass
class Session:
    """The rows of one rank and the clock of the family that is being measured."""

    out: Path
    rank: int = 0
    clock: Callable[[], float] = time.monotonic
    report: Callable[[str], None] = print
    done: set[str] = field(default_factory=set)
    skipped: list[str] = field(default_factory=list)
    num_rows: int = 0
    _file: TextIO | None = None

    @property
    def partial(self) -> Path:
        """The folder of rows that are not merged yet."""
        return self.out.with_name(self.out.name + ".partial")

    def open(self) -> None:
        """Find what earlier sessions measured, and start this rank's file."""
        self.partial.mkdir(parents=True, exist_ok=True)
        if self.out.exists():
            self.done |= {row_key(row) for row in load_profile_file(self.out).rows}
        self.done |= {row_key(row) for row in _partial_rows(self.partial)}
        self._file = (self.partial / f"rank{self.rank}.{os.getpid()}.jsonl").open("a", encoding="utf-8")

    def close(self) -> None:
        """Close this rank's file; rows stay on disk."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def add(self, row: Row) -> None:
        """Keep one measured row."""
        assert self._file is not None, "open the session first"
        self._file.write(json.dumps(row | {"rank": self.rank}) + "\n")
        self._file.flush()
        self.done.add(row_key(row))
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
            if row_key(row) in self.done:
                continue
            if self.clock() - begin >= seconds:
                return
            yield row

    def merge(self, *, name: str, environment: dict[str, Any]) -> Profile:
        """Write every row of this and earlier sessions into OUT; a shape measured by several ranks becomes one row."""
        earlier = load_profile_file(self.out) if self.out.exists() else Profile(name=name, sessions=[], rows=[])
        rows = {row_key(row): row for row in earlier.rows}
        number = len(earlier.sessions)
        for row in _partial_rows(self.partial):
            kept = rows.setdefault(row_key(row), row | {"session": number})
            if kept.get("rank") != row["rank"] and "p50" in row:
                kept["other_p50"] = row["p50"]
        profile = Profile(name=name, sessions=[*earlier.sessions, environment], rows=list(rows.values()))
        save_profile(profile, self.out)
        for path in self.partial.glob("*.jsonl"):
            path.unlink()
        self.partial.rmdir()
        return profile


def _partial_rows(folder: Path) -> Iterator[Row]:
    """Rows of the JSON-lines files; a last line cut off by a crash is dropped."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield row
