"""A point of a study and the record of its simulation: one scenario, the values that tell it from the others.

points.jsonl has one line per finished point, appended at once; a crash can tear the last line and no other. The mean of
repeated values and its 90 % interval are one rule for the tables of sweeps and for plots, and so is a Pareto front.
"""

import hashlib
import math
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moesim.errors import MachineError, UserError
from moesim.routing.request import routing_digest
from moesim.scenario import Scenario
from moesim.strict_json import json_text, parse_json

# 95 % quantiles of Student's t for 1, 2, ... degrees of freedom; any table of statistics has them
T_95 = (
    6.3138, 2.9200, 2.3534, 2.1318, 2.0150, 1.9432, 1.8946, 1.8595, 1.8331, 1.8125, 1.7959, 1.7823, 1.7709, 1.7613,
    1.7531, 1.7459, 1.7396, 1.7341, 1.7291, 1.7247, 1.7207, 1.7171, 1.7139, 1.7109, 1.7081, 1.7056, 1.7033, 1.7011,
    1.6991, 1.6973,
)  # fmt: skip
NORMAL_95 = 1.644854


def student_t_95(freedom: int) -> float:
    """95 % quantile of Student's t, hence half the width of a 90 % interval in standard errors.

    Beyond the table the expansion in 1 / freedom around the normal quantile z (Abramowitz and Stegun, 26.7.5).
    """
    if freedom <= len(T_95):
        return T_95[freedom - 1]
    z = NORMAL_95
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def half_width_90(values: Sequence[float]) -> float:
    """Half the 90 % interval of the mean of at least two independent values, t s / sqrt(n); in their unit."""
    assert len(values) >= 2, "a single value has no interval"
    return student_t_95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def pareto_front(points: Sequence[tuple[float, float]], *, better: tuple[int, int]) -> list[int]:
    """Indices of the points that no other one beats: at least as good in both and better in one, ascending in x.

    `better` is +1 where more is better and -1 where less is. Of equal points the first one is kept.
    """
    order = sorted(range(len(points)), key=lambda i: (-better[0] * points[i][0], -better[1] * points[i][1], i))
    front: list[int] = []
    for index in order:
        if not front or better[1] * points[index][1] > better[1] * points[front[-1]][1]:
            front.append(index)
    return sorted(front, key=lambda i: points[i][0])


Status = Literal["done", "failed", "infeasible"]
STATUSES: tuple[Status, ...] = ("done", "failed", "infeasible")


def content_hash(data: Any) -> str:
    """SHA-256 (hex) of JSON values; the order of keys plays no part."""
    return hashlib.sha256(json_text(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def scenario_id(scenario: Scenario) -> str:
    """16 hexadecimal digits of the SHA-256 of the resolved scenario and of what its `routing.file` holds.

    Equal scenarios have equal ids until the recording that they replay is another one.
    """
    settings, recording = scenario.model_dump(mode="json"), routing_digest(scenario.routing)
    return content_hash(settings if recording is None else {"scenario": settings, "recording": recording})[:16]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One scenario to simulate. `values`: what the study chose for it, dotted key to plain value."""

    id: str
    number: int
    values: Mapping[str, Any]
    scenario: Scenario
    scenario_file: str | None = None

    @classmethod
    def of(
        cls, scenario: Scenario, *, number: int, values: Mapping[str, Any], scenario_file: str | None = None
    ) -> "Point":
        """The point of a scenario, with the id that follows from it."""
        return cls(
            id=scenario_id(scenario), number=number, values=values, scenario=scenario, scenario_file=scenario_file
        )

    def record(
        self,
        status: Status,
        *,
        pid: int,
        seconds: float = 0.0,
        reason: str | None = None,
        result: dict[str, Any] | None = None,
    ) -> "PointRecord":
        """What is written down about this point; `pid` is the process that worked on it, `seconds` its wall time."""
        return PointRecord(
            id=self.id,
            number=self.number,
            values=dict(self.values),
            status=status,
            reason=reason,
            pid=pid,
            seconds=seconds,
            result=result,
            scenario_file=self.scenario_file,
        )


@dataclass(frozen=True, kw_only=True)
class PointRecord:
    """One line of points.jsonl. `result` is what result.json of a run holds; None unless the point is done."""

    id: str
    number: int
    values: dict[str, Any]
    status: Status
    reason: str | None
    pid: int
    seconds: float
    result: dict[str, Any] | None
    scenario_file: str | None = None

    def to_line(self) -> bytes:
        """The record as one line of JSON, its end of line included."""
        return (json_text(asdict(self), separators=(",", ":")) + "\n").encode()

    @classmethod
    def from_line(cls, line: bytes) -> "PointRecord":
        """The record in a line. Raises UserError saying what is wrong with it."""
        try:
            data = parse_json(line)
        except ValueError:
            raise UserError("not JSON") from None
        fields = set(cls.__dataclass_fields__)
        if not isinstance(data, dict) or set(data) != fields:
            raise UserError("not the record of a point")
        if data["status"] not in STATUSES or (data["status"] == "done") != isinstance(data["result"], dict):
            raise UserError(f"a record with the status {data['status']!r} and no matching result")
        return cls(**data)

    def metric(self, path: str) -> Any:
        """What the result holds at a dotted path such as `imbalance.expert`; None where it has no such value."""
        value: Any = self.result
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        return value


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
