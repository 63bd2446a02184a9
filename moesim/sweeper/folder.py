"""The folder of a sweep, and sweep(study, folder), which simulates the points that the folder lacks.

study.json says what it holds, points.jsonl what is finished, one line for each as soon as it is there.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.files import claimed, is_leftover, write_atomically
from moesim.strict_json import json_text, parse_json
from moesim.study import Point, PointRecord, PointsFile, read_points, run_points
from moesim.study.points import POINTS_FILE
from moesim.study.pool import Watch
from moesim.sweeper.study import Study

STUDY_FILE = "study.json"


@dataclass(frozen=True)
class SweepFolder:
    """The folder of a sweep, whether it exists or not."""

    path: Path

    def check(self, study: Study) -> None:
        """Refuse a folder of something else. Raises UserError; call it before the long work begins."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; name a folder with --out")
        known = self.study_json()
        if known is None:
            names = sorted(found.name for found in self.path.iterdir()) if self.path.is_dir() else []
            if foreign := [name for name in names if not is_leftover(name)]:
                raise UserError(f"{self.path} holds {foreign[0]} and no sweep; choose another --out")
        elif known.get("kind") != "sweep" or (known.get("hash") != study.content_hash() and self.records()):
            what = f"the sweep {known.get('name')!r}"
            if known.get("name") == study.name:
                what = "this sweep as it was before the study, its base or an override changed"
            raise UserError(f"{self.path} holds {what}; choose another --out, or remove that folder")

    def study_json(self) -> dict[str, Any] | None:
        """The content of study.json; None where there is none. Raises UserError when it is damaged."""
        file = self.path / STUDY_FILE
        if not file.exists():
            return None
        try:
            data = parse_json(file.read_bytes())
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise UserError(f"{file} is damaged; choose another --out, or remove it")
        return data

    def records(self) -> dict[str, PointRecord]:
        """What is finished, id to record. Raises UserError for a damaged file."""
        return read_points(self.path / POINTS_FILE).by_id()

    @contextmanager
    def opened(self, study: Study) -> Iterator[PointsFile]:
        """The file of points, open for appending by this call alone; study.json is written first. Raises UserError."""
        with claimed(self.path):
            self.check(study)
            text = json_text(study.as_json(), indent=1) + "\n"
            file = self.path / STUDY_FILE
            if not file.exists() or file.read_text(encoding="utf-8") != text:
                write_atomically(file, text.encode())
            with PointsFile.opened(self.path / POINTS_FILE) as points:
                yield points


@dataclass(frozen=True, kw_only=True)
class SweepOutcome:
    """The records of all points by number. `new`: how many this call made; `torn`: a half-written line was redone."""

    records: tuple[PointRecord, ...]
    new: int
    torn: bool

    def count(self, status: str) -> int:
        """Points of a status."""
        return sum(record.status == status for record in self.records)

    @property
    def exit_code(self) -> int:
        """0: at least one point is done and none failed; 1: a point failed; 2: every point is infeasible."""
        if self.count("failed"):
            return 1
        return 0 if self.count("done") else 2


def sweep(
    study: Study,
    folder: SweepFolder,
    *,
    workers: int | None = None,
    cluster: str | None = None,
    retry: bool = False,
    cache_dir: Path | None = None,
    watch: Watch | None = None,
) -> SweepOutcome:
    """Simulate the points of `study` that have no record in `folder` yet (with `retry` also those that failed).

    The other arguments are those of `run_points`. Raises UserError for a folder of another sweep, a full disk and a
    cluster out of reach; KeyboardInterrupt keeps what is finished.
    """
    with folder.opened(study) as file:
        stored = read_points(folder.path / POINTS_FILE)
        known = stored.by_id()
        if retry:
            known = {key: record for key, record in known.items() if record.status != "failed"}
        new = [record for record in study.invalid_points if record.id not in known]
        for record in new:
            file.append(record)
        missing: Sequence[Point] = [point for point in study.points if point.id not in known]
        new += run_points(
            missing, on_record=file.append, workers=workers, cluster=cluster, cache_dir=cache_dir, watch=watch
        )
    known |= {record.id: record for record in new}
    records = sorted(known.values(), key=lambda record: record.number)
    return SweepOutcome(records=tuple(records), new=len(new), torn=file.torn)
