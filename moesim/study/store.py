"""points.jsonl: one line per finished point, appended at once. A crash can tear the last line and no other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moesim.errors import MachineError, UserError
from moesim.study.point import PointRecord

POINTS_FILE = "points.jsonl"


@dataclass(frozen=True)
class StoredPoints:
    """The records of a file in the order of writing, the last one of every id; `torn`: a half-written line was cut."""

    records: tuple[PointRecord, ...]
    torn: bool = False

    def by_id(self) -> dict[str, PointRecord]:
        """Id to record."""
        return {record.id: record for record in self.records}


def read_points(path: Path) -> StoredPoints:
    """The records in `path`; none where there is no file.

    A last line without its end is what a crash leaves behind: it is left out and `torn` says so. Raises UserError
    with the line for any other line that holds no record.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    torn = bool(lines) and not lines[-1].endswith(b"\n")
    records: dict[str, PointRecord] = {}
    for number, line in enumerate(lines[: len(lines) - torn], start=1):
        try:
            record = PointRecord.from_line(line)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}; remove this line and run again") from None
        records.pop(record.id, None)
        records[record.id] = record
    return StoredPoints(tuple(records.values()), torn)


class PointsFile:
    """points.jsonl, open for appending. Made by `PointsFile.opened`.

    `torn`: a line that a crash had left half-written was cut off.
    """

    def __init__(self, path: Path, descriptor: int, *, torn: bool) -> None:
        self.path = path
        self.torn = torn
        self._descriptor = descriptor

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator["PointsFile"]:
        """The file at `path`, made where it is missing; a torn last line is cut off first.

        Its folder must be claimed: two processes that append would cut off each other's lines.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            yield cls(path, descriptor, torn=_cut_torn_line(descriptor))
        finally:
            os.close(descriptor)

    def append(self, record: PointRecord) -> None:
        """Write the record with one write and wait until it is on the disk.

        Raises MachineError when it cannot be written; the file then ends where it ended before.
        """
        end = os.fstat(self._descriptor).st_size
        try:
            _write_whole(self._descriptor, record.to_line())
            os.fsync(self._descriptor)
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            raise MachineError(
                f"{self.path}: {error.strerror}; the points before are kept: make room and run the same command again"
            ) from error


def _write_whole(descriptor: int, data: bytes) -> None:
    written = os.write(descriptor, data)
    if written < len(data):  # a disk that fills up takes a part; writing the rest then says why
        os.write(descriptor, data[written:])


def _cut_torn_line(descriptor: int) -> bool:
    end = os.fstat(descriptor).st_size
    content = os.pread(descriptor, end, 0)
    whole = content.rfind(b"\n") + 1
    os.ftruncate(descriptor, whole)
    return whole < end
