"""A sweep's folder: study.json says what it holds, points.jsonl what is finished."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.files import claimed, is_leftover, write_atomically
from moesim.strict_json import json_text, parse_json
from moesim.study import PointRecord, PointsFile, read_points
from moesim.study.store import POINTS_FILE
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
