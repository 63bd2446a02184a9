"""A profiler's trace of one step, read as data: what of its events tells kernels, their operations and their modules.

torch.profiler writes a JSON object whose member `traceEvents` lists everything that happened; a file may have
gigabytes, most of them stack frames. It is read event by event, and memory holds what is kept. Times are seconds from
the first event that is kept in the file, which need not be the earliest.
"""

import gzip
import zlib
from codecs import getincrementaldecoder
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.strict_json import streamed_members

PIECE = 1 << 20
MOST_KEPT = 2_000_000  # events; about 1 GB of memory
AGAIN = "profile one training step with torch.profiler (record_shapes=True) and export_chrome_trace"
MODULE = "nn.Module: "


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Something on the host: an annotation, or a call of a module. thread: process and thread."""

    name: str
    thread: tuple[Any, Any]
    start: float
    end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuOp(Span):
    """An operation. sequence: the number that its backward pass has, too."""

    id: int
    sequence: int | None
    dims: tuple[Any, ...]
    types: tuple[str, ...]
    strides: tuple[Any, ...]
    concrete: tuple[Any, ...]
    message: Mapping[str, Any] | None  # of a collective


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceWork:
    """A kernel, a copy or a fill on the GPU; op_id: the operation that launched it, as far as the trace says."""

    name: str
    start: float
    end: float
    correlation: int | None
    op_id: int | None
    stream: int | str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch(Span):
    """A call of the CUDA runtime that starts work on the GPU or waits for it."""

    correlation: int | None
    op_id: int | None


@dataclass(frozen=True, kw_only=True)
class TraceEvents:
    """What was kept of a trace, each in the order of its start; gpu: the name of the device that the trace is from."""

    gpu: str | None
    ops: tuple[CpuOp, ...]
    device_work: tuple[DeviceWork, ...]
    launches: tuple[Launch, ...]
    annotations: tuple[Span, ...]
    modules: tuple[Span, ...]

    @cached_property
    def launch_of(self) -> Mapping[int | None, Launch]:
        """The launches by the numbers that their work has, too."""
        return {launch.correlation: launch for launch in self.launches if launch.correlation is not None}


def is_step_file(path: Path) -> bool:
    """Whether a file is one that `moesim import-step --out` wrote, by its first member."""
    try:
        return next((key for key, _ in streamed_members(_pieces(path), array="traceEvents")), "") == "schema_version"
    except (OSError, EOFError, zlib.error, ValueError):
        return False  # what it is else says its reader


def read_trace(path: Path) -> TraceEvents:
    """The events of a trace. Raises UserError, one line, for what is no trace of torch's profiler, or is cut off."""
    kept = _Kept(path)
    members: dict[str, Any] = {}
    try:
        for key, value in streamed_members(_pieces(path), array="traceEvents"):
            if key == "traceEvents":
                kept.add(value)
            else:
                members[key] = value
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or 'damaged gzip data'}; {AGAIN}") from None
    except (EOFError, zlib.error):
        raise UserError(f"{path} is cut off or damaged inside its gzip data; copy it again, or {AGAIN}") from None
    except ValueError as error:
        raise UserError(f"{path} is no whole JSON object: {error}; copy it again, or {AGAIN}") from None
    if "schema_version" in members:
        raise UserError(f"{path} is a recorded step, not a trace; look at it with --show {path}")
    if not kept.of_torch:
        seen = ", ".join(sorted(kept.categories)[:4]) or "none"
        raise UserError(f"{path} is no trace of torch's profiler (categories of its events: {seen}); {AGAIN}")
    return kept.events(_gpu_name(members.get("deviceProperties")))


def _pieces(path: Path) -> Iterator[str]:
    decoder = getincrementaldecoder("utf-8")(errors="replace")
    with path.open("rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        data = gzip.GzipFile(fileobj=plain) if packed else plain
        while piece := data.read(PIECE):
            yield decoder.decode(piece)


def _gpu_name(properties: Any) -> str | None:
    match properties:
        case [{"name": str(name)}, *_]:
            return name
    return None


class _Kept:
    """Takes events one by one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._base: float | None = None
        self._ops: list[CpuOp] = []
        self._work: list[DeviceWork] = []
        self._launches: list[Launch] = []
        self._annotations: list[Span] = []
        self._modules: list[Span] = []
        self._same: dict[str, Any] = {}
        self._number = 0
        self.categories: set[str] = set()
        self.of_torch = False

    def add(self, event: Any) -> None:
        """Keep what is needed of an event. Raises UserError where an event of torch's profiler is malformed."""
        if not isinstance(event, dict):
            return
        category = str(event.get("cat", "")).lower()
        if category and len(self.categories) < 100:
            self.categories.add(category)
        if event.get("ph") != "X":
            return
        try:
            kept = self._keep(category, event)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self._path}: an event {str(event.get('name'))[:60]!r} is malformed ({error}); {AGAIN}"
            ) from None
        self._number += kept
        if self._number > MOST_KEPT:
            raise UserError(
                f"{self._path} holds more than {MOST_KEPT:,} operations, too many for one step; profile one alone "
                "(torch.profiler.schedule(wait=1, warmup=1, active=1)), with fewer micro-batches or layers"
            )

    def _keep(self, category: str, event: dict[str, Any]) -> bool:
        match category:
            case "cpu_op":
                self.of_torch = True
                self._ops.append(self._op(event))
            case "kernel" | "gpu_memcpy" | "gpu_memset":
                self._work.append(self._device_work(event))
            case "cuda_runtime" | "cuda_driver":
                args = event.get("args", {})
                self._launches.append(
                    Launch(
                        **self._where(event),
                        correlation=_scalar(args.get("correlation")),
                        op_id=_scalar(args.get("External id")),
                    )
                )
            case "user_annotation":
                self.of_torch = True
                self._annotations.append(Span(**self._where(event)))
            case "python_function" if event["name"].startswith(MODULE):
                self._modules.append(Span(**self._where(event)))
            case _:
                return False
        return True

    def _where(self, event: dict[str, Any]) -> dict[str, Any]:
        start, duration = float(event["ts"]), float(event.get("dur", 0.0))
        base = self._base = start if self._base is None else self._base
        return {
            "name": self._once(str(event["name"])),
            "thread": self._once((_scalar(event.get("pid")), _scalar(event.get("tid")))),
            "start": 1e-6 * (start - base),
            "end": 1e-6 * (start + duration - base),
        }

    def _op(self, event: dict[str, Any]) -> CpuOp:
        args = event.get("args", {})
        message = {key: args[key] for key in MESSAGE if key in args}
        return CpuOp(
            **self._where(event),
            id=int(args.get("External id", -1)),
            sequence=_scalar(args.get("Sequence number")),
            dims=self._once(_sizes(args.get("Input Dims", []))),
            types=self._once(tuple(map(str, args.get("Input type", [])))),
            strides=self._once(_sizes(args.get("Input Strides", []))),
            concrete=self._once(tuple(map(str, args.get("Concrete Inputs", [])))),
            message=message or None,
        )

    def _device_work(self, event: dict[str, Any]) -> DeviceWork:
        where, args = self._where(event), event.get("args", {})
        return DeviceWork(
            name=where["name"],
            start=where["start"],
            end=where["end"],
            correlation=_scalar(args.get("correlation")),
            op_id=_scalar(args.get("External id")),
            stream=_scalar(args.get("stream")),
        )

    def _once(self, value: Any) -> Any:
        """The same object for equal values: a step repeats its layers."""
        return self._same.setdefault(repr(value), value)

    def events(self, gpu: str | None) -> TraceEvents:
        """All that was kept, in the order of its start, outer operations before inner ones."""

        def ordered(found: list[Any]) -> tuple[Any, ...]:
            return tuple(sorted(found, key=lambda each: (each.start, -each.end)))

        return TraceEvents(
            gpu=gpu,
            ops=ordered(self._ops),
            device_work=ordered(self._work),
            launches=ordered(self._launches),
            annotations=ordered(self._annotations),
            modules=ordered(self._modules),
        )


# What an operation says of a collective, as `record_param_comms` writes it.
MESSAGE = (
    "Collective name",
    "dtype",
    "In msg nelems",
    "Out msg nelems",
    "Group size",
    "Process Group Name",
    "Process Group Description",
)


def _scalar(value: Any) -> Any:
    """A number or a text, by which events are matched. Raises TypeError for anything else."""
    if value is not None and not isinstance(value, int | str):
        raise TypeError(f"{str(value)[:40]} is neither a number nor a text")
    return value


def _sizes(found: Any) -> tuple[Any, ...]:
    """Of every argument its sizes, of a list those of each tensor; none for what is no tensor. Raises TypeError."""
    return tuple(_shape(each) if not _nested(each) else tuple(map(_shape, each)) for each in _list(found))


def _nested(found: Any) -> bool:
    return isinstance(found, list) and any(isinstance(each, list) for each in found)


def _shape(found: Any) -> tuple[int, ...]:
    if not all(type(size) is int and abs(size) < 1 << 62 for size in _list(found)):
        raise TypeError(f"{str(found)[:40]} are no sizes")
    return tuple(found)


def _list(found: Any) -> list[Any]:
    if found == "":  # how older versions write an argument that is no tensor
        return []
    if not isinstance(found, list):
        raise TypeError(f"{str(found)[:40]} is no list")
    return found
