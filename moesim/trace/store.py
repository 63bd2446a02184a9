"""Traces on disk: one compressed file that cannot be read wrongly.

    line 1   moesim-trace <schema version>
    line 2   sha256 of all that follows, in hex
    line 3   header: JSON with router, provenance, steps and the arrays' names, types, shapes and lengths
    rest     the arrays one behind the other, each zlib-compressed; floats with their bytes shuffled

Arrays are stored in the smallest type that gives back exactly what memory holds (expert ids as uint8, floats as
float16 where that is exact).
"""

import hashlib
import math
import os
import stat
import weakref
import zlib
from collections.abc import Callable, Collection
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.errors import UserError
from moesim.files import write_atomically
from moesim.scenario.routing import RouterShape
from moesim.strict_json import json_text, parse_json
from moesim.trace.check import check_trace
from moesim.trace.record import RoutingTrace, StepCounts, TraceStep, TrainingCurves
from moesim.units import format_bytes

SCHEMA_VERSION = 1
_MAGIC = b"moesim-trace"
_ZLIB_LEVEL = 1  # higher levels cost ten times the time for 5 % of the size
_STEP_ARRAYS = ("expert_ids_LSTK", "affinities_LSTK", "gates_LSTK")
_MOST_RATIO = 1032  # of zlib: the most that a packed byte stands for
_ZLIB_FRAME = 2048
_MOST_AXES = 4
MOST_BYTES = 8 << 30  # of all arrays of a trace in memory, and of its file
_DTYPES = {"uint8", "int16", "int32", "float16", "float32", "float64"}

# Of every trace in memory that was read from a file what the file said: to write it again takes no packing. And the
# hashes of those that were asked for one.
_bodies: dict[int, bytes] = {}
_hashes: dict[int, str] = {}

Array = NDArray[Any]


def save_trace(trace: RoutingTrace, path: str | os.PathLike[str], *, replace: bool = True) -> None:
    """Write the trace; the file appears complete or not at all.

    Raises MachineError when it cannot be written, and without `replace` UserError where there is a file by now.
    """
    body = _bodies.get(id(trace)) or _packed_body(trace)
    digest = hashlib.sha256(body).hexdigest().encode()
    write_atomically(Path(path), b"%s %d\n%s\n" % (_MAGIC, SCHEMA_VERSION, digest) + body, replace=replace)


def _packed_body(trace: RoutingTrace) -> bytes:
    """Header line and arrays."""
    arrays = [_pack(array) for array in _arrays(trace).values()]
    packed = [zlib.compress(_shuffle(array), _ZLIB_LEVEL) for array in arrays]
    header = {
        "router": asdict(trace.router),
        "provenance": dict(trace.provenance),
        "steps": [step.step for step in trace.steps],
        "earlier": [each.step for each in trace.earlier],
        **({"phases": trace.num_phases} if trace.num_phases > 1 else {}),
        "arrays": [
            {"name": name, "dtype": str(array.dtype), "shape": list(array.shape), "bytes": len(blob)}
            for name, array, blob in zip(_arrays(trace), arrays, packed, strict=True)
        ],
    }
    return json_text(header, sort_keys=True).encode() + b"\n" + b"".join(packed)


def load_trace(path: str | os.PathLike[str]) -> RoutingTrace:
    """Read a trace and check its hash and invariants.

    Raises UserError, one line, for a file that is missing, is no trace, has another schema version, or is truncated,
    altered or inconsistent.
    """
    body = _checked_body(Path(path))
    try:
        trace = _parse(body)
        check_trace(trace)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, ValueError, zlib.error) as error:
        raise UserError(f"{path}: the trace's parts do not fit together ({error}); record it again") from error
    _remember(_bodies, trace, body)
    return trace


def is_trace_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as traces do, whatever follows; False for a folder and where nothing can be read."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def _remember(known: dict[int, Any], trace: RoutingTrace, value: str | bytes) -> None:
    """As long as the trace lives."""
    known[id(trace)] = value
    weakref.finalize(trace, known.pop, id(trace))


def trace_hash(trace: RoutingTrace) -> str:
    """sha256 (hex) of what the trace says: router, recorded steps, phases and curves, not of how it came about."""
    if id(trace) not in _hashes:
        _remember(_hashes, trace, _hash(trace))
    return _hashes[id(trace)]


def _hash(trace: RoutingTrace) -> str:
    digest = hashlib.sha256(json_text(asdict(trace.router), sort_keys=True).encode())
    digest.update(json_text([step.step for step in trace.steps]).encode())
    if trace.num_phases > 1:
        digest.update(f"phases {trace.num_phases}".encode())
    for name, array in _arrays(trace).items():
        packed = _pack(array)
        digest.update(f"{name} {packed.dtype} {packed.shape}".encode())
        digest.update(np.ascontiguousarray(packed).data)
    return digest.hexdigest()


def _checked_body(path: Path) -> bytes:
    """What follows the hash, if it fits the hash."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UserError(f"{path}: this is not a file; name a routing trace, or make one with `moesim trace`")
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path}: larger than the {format_bytes(MOST_BYTES)} that a trace may have")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read the trace ({error.strerror}); make one with `moesim trace`") from error
    first, _, rest = content[:200].partition(b"\n")
    magic, _, version = first.partition(b" ")
    if magic != _MAGIC:
        raise UserError(f"{path}: this is not a routing trace; make one with `moesim trace`")
    if version != b"%d" % SCHEMA_VERSION:
        raise UserError(
            f"{path}: the trace has schema version {version.decode(errors='replace')}, this moesim reads "
            f"{SCHEMA_VERSION}; record it again with `moesim trace`"
        )
    digest, separator, _ = rest.partition(b"\n")
    body = content[len(first) + 1 + len(digest) + len(separator) :]
    if not separator or hashlib.sha256(body).hexdigest().encode() != digest:
        raise UserError(f"{path}: the trace is truncated or altered (its hash differs); record it again")
    return body


def header_and_arrays(
    body: bytes, unpack: "Callable[[bytes, str, np.dtype[Any], tuple[int, ...]], Array]", *, dtypes: Collection[str]
) -> tuple[dict[str, Any], dict[str, Array]]:
    """A JSON header in one line and, by name, the compressed arrays behind it that its `arrays` lists.

    `unpack` makes an array of compressed bytes, a name, a type and a shape. Raises ValueError for other types, for
    arrays of more than `MOST_BYTES` together, and for a list that does not fit the bytes behind the header; all of that
    before anything is unpacked.
    """
    end = body.index(b"\n")
    header = parse_json(body[:end])
    listed = header.get("arrays") if isinstance(header, dict) else None
    if not isinstance(listed, list):
        raise ValueError("the header lists no arrays")
    _check_listed(listed, dtypes=dtypes, packed_bytes=len(body) - end - 1)
    arrays: dict[str, Array] = {}
    start = end + 1
    for entry in listed:
        packed = body[start : start + entry["bytes"]]
        arrays[entry["name"]] = unpack(packed, entry["name"], np.dtype(entry["dtype"]), tuple(entry["shape"]))
        start += entry["bytes"]
    return header, arrays


def _check_listed(listed: list[Any], *, dtypes: Collection[str], packed_bytes: int) -> None:
    """Raises ValueError unless the entries name arrays once each, of known types and of sizes that fit."""
    names: set[str] = set()
    unpacked = 0
    for entry in listed:
        if not isinstance(entry, dict) or set(entry) != {"name", "dtype", "shape", "bytes"}:
            raise ValueError("the header has an array without name, type, shape and length")
        name, shape = entry["name"], entry["shape"]
        if not isinstance(name, str) or name in names:
            raise ValueError("the header has an array without a name of its own")
        names.add(name)
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in dtypes:
            raise ValueError(f"the array {name[:40]!a} has an unknown type")
        if not isinstance(shape, list) or len(shape) > _MOST_AXES or not all(map(_is_size, [*shape, entry["bytes"]])):
            raise ValueError(f"the array {name[:40]!a} has a shape or a length that is none")
        unpacked += math.prod(shape) * np.dtype(entry["dtype"]).itemsize
    if unpacked > MOST_BYTES:
        raise ValueError(f"the arrays claim {format_bytes(unpacked)}; a trace holds at most {format_bytes(MOST_BYTES)}")
    if sum(entry["bytes"] for entry in listed) != packed_bytes:
        raise ValueError("the lengths of the arrays do not add up to the file's")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse(body: bytes) -> RoutingTrace:
    """The trace of a header line and the compressed arrays behind it."""
    header, arrays = header_and_arrays(body, _unpack, dtypes=_DTYPES)
    steps, earlier = header["steps"], header.get("earlier", [])  # traces of before have none
    if not isinstance(steps, list) or not isinstance(earlier, list):
        raise ValueError("the header's steps are no lists")
    curves = [curve.name for curve in fields(TrainingCurves)]
    wanted = {f"{index}.{name}" for index in range(len(steps)) for name in _STEP_ARRAYS}
    wanted |= {f"earlier.{index}" for index in range(len(earlier))} | {f"curves.{name}" for name in curves}
    if wanted != set(arrays):
        odd = min(wanted ^ set(arrays))
        raise ValueError(f"the array {odd[:40]!a} is {'missing' if odd in wanted else 'none of a trace'}")
    return RoutingTrace(
        router=_router(header["router"]),
        steps=tuple(
            TraceStep(step=step, **{name: arrays[f"{index}.{name}"] for name in _STEP_ARRAYS})
            for index, step in enumerate(steps)
        ),
        earlier=tuple(
            StepCounts(step=step, counts_LSE=arrays[f"earlier.{index}"]) for index, step in enumerate(earlier)
        ),
        curves=TrainingCurves(**{name: arrays[f"curves.{name}"] for name in curves}),
        provenance=header["provenance"],
        num_phases=header.get("phases", 1),
    )


def _router(found: object) -> RouterShape:
    names = {each.name for each in fields(RouterShape)}
    if not isinstance(found, dict) or set(found) != names:
        raise ValueError(f"the header's router has not the keys {', '.join(sorted(names))}")
    return RouterShape(**found)


def _arrays(trace: RoutingTrace) -> dict[str, Array]:
    """Every array of the trace by its name in the file."""
    arrays = {f"{i}.{name}": getattr(step, name) for i, step in enumerate(trace.steps) for name in _STEP_ARRAYS}
    arrays |= {f"earlier.{index}": each.counts_LSE.astype(np.int32) for index, each in enumerate(trace.earlier)}
    curves = {f"curves.{curve.name}": np.asarray(getattr(trace.curves, curve.name)) for curve in fields(trace.curves)}
    return arrays | {name: array.astype(np.float64) for name, array in curves.items()}


def _pack(array: Array) -> Array:
    """The array in the smallest type that holds its values exactly; -1 of int16 becomes 255 of uint8."""
    if array.dtype == np.int16:
        fits = not array.size or (array.min() >= -1 and array.max() < 255)
        return array.astype(np.uint8) if fits else array
    if array.dtype == np.float32:
        for part in (array.flat[:64], array):  # few values tell of most arrays that they do not fit
            with np.errstate(over="ignore"):
                half = part.astype(np.float16)
            if not np.array_equal(half.astype(np.float32), part):
                return array
        return half
    return array


def _unpack(packed: bytes, name: str, dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> Array:
    size = math.prod(shape) * dtype.itemsize
    if size > _MOST_RATIO * len(packed) + _ZLIB_FRAME:
        raise ValueError(f"{name[:40]!a} claims more than {len(packed)} packed bytes can hold")
    packer = zlib.decompressobj()
    content = packer.decompress(packed, size + 1)  # never more than was claimed
    if len(content) != size or not packer.eof or packer.unused_data:
        raise ValueError(f"{name[:40]!a} does not fill its shape")
    planes = np.frombuffer(content, dtype=np.uint8).reshape(dtype.itemsize, -1)
    interleaved = np.empty(planes.shape[::-1], dtype=np.uint8)
    for byte, plane in enumerate(planes):
        interleaved[:, byte] = plane
    array = interleaved.view(dtype).reshape(shape)
    if name.startswith("curves."):
        return array
    if dtype == np.uint8:
        ids = array.astype(np.int16)
        ids[array == 255] = -1
        return ids
    return array.astype(np.float32) if dtype == np.float16 else array


def _shuffle(array: Array) -> bytes:
    """The first bytes of all values, then the second bytes and so on: they compress better apart."""
    return np.ascontiguousarray(array).reshape(-1, 1).view(np.uint8).T.tobytes()
