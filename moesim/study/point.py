"""A point of a study and the record of its simulation: one scenario, the values that tell it from the others."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moesim.errors import UserError
from moesim.routing.replay import routing_digest
from moesim.scenario import Scenario
from moesim.strict_json import json_text, parse_json

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
