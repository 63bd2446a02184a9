"""A recorded step as a file: strict JSON (gzipped where its name ends in .gz), equal operations kept once."""

import gzip
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.files import write_atomically
from moesim.recorded.widths import parsed
from moesim.strict_json import json_text, parse_json

SCHEMA_VERSION = 1
KEYS = {"name", "phase", "module", "count", "reads", "writes", "facts"}
OPTIONAL = {"measured_s", "layer", "layers", "widths"}
ALIGNMENT = 16
ALIGNED = "aligned_bytes"  # a fact of GEMMs in 16 bits, see gemm_facts
# Facts of an operation: shapes of the weights whose gradients are whole behind it, in their order; how many views and
# empty tensors the host has made since the operation before it. GRADIENT_WIDTHS: what the dimensions of those weights
# are; MODEL_SIZES, of the optimizer: the numbers of all names in widths.
GRADIENTS, VIEWS = "gradients", "views"
# What else the host has done since the operation before: in the forward pass modules called and instructions of Python,
# in the backward pass nodes of autograd.
MODULES, PYTHON, NODES = "modules", "python", "nodes"
# AGAIN, of the backward pass: activation checkpointing repeats an operation of the forward pass.
AGAIN = "again"
GRADIENT_WIDTHS, MODEL_SIZES = "gradient_widths", "model_sizes"
# Of the optimizer: bytes of tensors that were there before the step (held), of the most at once in the forward and in
# the backward pass, and of what is left behind that (made).
PEAK = "peak_bytes"
PHASES = ("forward", "backward", "optimizer")
Seen = tuple[tuple[int, ...], str, int]  # shape, dtype as torch names it, bytes read or written


@dataclass(frozen=True, kw_only=True)
class RecordedOp:
    """One operation: its aten name without overload, the tensors that it reads and writes, and where it ran.

    Views launch nothing and are not recorded. `writes` are results, or what is changed in place. `count`: how often it
    runs with the same shapes in the same module (layer numbers as *). measured_s: the mean seconds of its kernels,
    where a trace tells. layer: the kind of layer that it works for, "" outside of the layers and None where the file
    does not say; layers: how many layers of that kind the step has. widths: of each tensor, first those that it reads,
    what its dimensions are in sizes of the model (`moesim.recorded.widths`), "" of others; None where the file does not
    say.
    """

    name: str
    phase: str
    module: str
    reads: tuple[Seen, ...]
    writes: tuple[Seen, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    count: float = 1
    measured_s: float | None = None
    layer: str | None = None
    layers: int = 1
    widths: tuple[tuple[str, ...], ...] | None = None

    @property
    def works(self) -> str:
        """The pass whose work it is: forward, also where the backward pass repeats it."""
        return "forward" if self.facts.get(AGAIN) else self.phase

    def as_json(self) -> dict[str, Any]:
        """As an object of the file."""
        sides = {"reads": self.reads, "writes": self.writes}
        tensors = {
            side: [{"shape": list(shape), "dtype": dtype, "bytes": size} for shape, dtype, size in seen]
            for side, seen in sides.items()
        }
        head = {"name": self.name, "phase": self.phase, "module": self.module, "count": self.count}
        measured = {} if self.measured_s is None else {"measured_s": self.measured_s}
        placed = {} if self.layer is None else {"layer": self.layer, "layers": self.layers}
        told = {} if self.widths is None else {"widths": list(map(list, self.widths))}
        return head | tensors | {"facts": dict(self.facts)} | measured | placed | told


def gemm_facts(
    shapes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]], *, element_bytes: int
) -> dict[str, Any]:
    """Of a GEMM in 16 bits, the bytes at whose multiples rows of some matrix begin, where those are fewer than 16:
    libraries have no fast kernels for it.
    """
    steps = [
        stride * element_bytes
        for shape, each in zip(shapes, strides, strict=False)
        for size, stride in zip(shape, each, strict=False)
        if size > 1 and stride > 1
    ]
    aligned = math.gcd(ALIGNMENT, *steps)
    return {ALIGNED: aligned} if element_bytes == 2 and aligned < ALIGNMENT else {}


def layout_facts(shapes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Of an elementwise operation, whether its largest operands lie in memory other than as their result does, or
    differently among themselves: kernels then take number by number instead of several at once.
    """
    each = [
        (tuple(shape), tuple(step for size, step in zip(shape, stride, strict=False) if size > 1))
        for shape, stride in zip(shapes, strides, strict=False)
    ]
    largest = max((math.prod(shape) for shape, _ in each), default=0)
    ways = {(tuple(size for size in shape if size > 1), steps) for shape, steps in each if math.prod(shape) == largest}
    if largest < 2 or any(len(sizes) != len(steps) for sizes, steps in ways):
        return {}
    dense = all(
        math.prod(sizes) == 1 + sum((number - 1) * step for number, step in zip(sizes, steps, strict=True))
        for sizes, steps in ways
    )
    return {} if len(ways) == 1 and dense else {"strided": True}


def pieces_facts(shapes: Sequence[Sequence[int]], strides: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Of tensors that are joined, whether some of them lies with gaps or in another order."""
    for shape, stride in zip(shapes, strides, strict=False):
        step = 1
        for size, each in zip(reversed(shape), reversed(stride), strict=False):
            if size > 1 and each != step:
                return {"strided": True}
            step *= size
    return {}


def scan_facts(shape: Sequence[int], dim: int) -> dict[str, Any]:
    """Of a running sum, its steps where it goes along another dimension than the last."""
    return {"steps": shape[dim]} if shape and dim % len(shape) != len(shape) - 1 else {}


def merged(ops: Sequence[RecordedOp]) -> list[RecordedOp]:
    """Equal operations of a phase once, with their number, in the order of the first; what was measured is averaged."""
    counts: dict[str, float] = {}
    sums: dict[str, float] = {}
    first: dict[str, RecordedOp] = {}
    for op in ops:
        op = replace(op, module=_pattern(op.module)) if op.count == 1 else op
        key = json_text(replace(op, count=1, measured_s=None).as_json())
        first.setdefault(key, op)
        counts[key] = counts.get(key, 0) + op.count
        if op.measured_s is not None:
            sums[key] = sums.get(key, 0.0) + op.count * op.measured_s
    return [
        replace(op, count=counts[key], measured_s=sums[key] / counts[key] if key in sums else None)
        for key, op in first.items()
    ]


def _pattern(module: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def save_step(
    path: Path, ops: Sequence[RecordedOp], *, source: str, calibration: Mapping[str, Any] | None = None
) -> None:
    """Write the step; `source` says what was recorded, `calibration` what a trace says of it beyond its operations."""
    content = {"schema_version": SCHEMA_VERSION, "source": source, "ops": [op.as_json() for op in ops]}
    if calibration is not None:
        content["calibration"] = calibration
    data = json_text(content, indent=1).encode()
    write_atomically(path, gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def load_step(path: Path) -> tuple[str, list[RecordedOp]]:
    """The source and the operations of a file. Raises UserError, one line, for what is no such file."""
    content = step_content(path)
    return str(content.get("source", "")), parsed_ops(content.get("ops"), where=str(path))


def step_content(path: Path) -> dict[str, Any]:
    """The JSON object of a file of a step. Raises UserError, one line, for what is no such file."""
    try:
        data = path.read_bytes()
        content = parse_json(gzip.decompress(data) if path.suffix == ".gz" else data)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or 'not gzipped'}") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is no recorded step: {error}") from None
    if isinstance(content, dict) and "traceEvents" in content:
        raise UserError(
            f"{path} is a trace of torch's profiler; make a step of it: moesim import-step {path} --out FILE"
        )
    if not isinstance(content, dict) or content.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{path} is no recorded step of version {SCHEMA_VERSION}; make it again with moesim import-step"
        )
    return content


def parsed_ops(found: Any, *, where: str) -> list[RecordedOp]:
    """Operations from their JSON. Raises UserError naming the first that is malformed."""
    if not isinstance(found, list) or not found:
        raise UserError(f"{where} has no operations; make it again with moesim import-step")
    return [_parsed(entry, where=f"{where}: ops[{number}]") for number, entry in enumerate(found)]


def _parsed(entry: Any, *, where: str) -> RecordedOp:
    if not isinstance(entry, dict) or entry.keys() - OPTIONAL != KEYS:
        raise UserError(f"{where} is malformed: its keys must be {', '.join(sorted(KEYS))}")
    try:
        op = RecordedOp(
            name=entry["name"],
            phase=entry["phase"],
            module=entry["module"],
            reads=_tensors(entry["reads"]),
            writes=_tensors(entry["writes"]),
            facts=dict(entry["facts"]),
            count=entry["count"],
            measured_s=None if entry.get("measured_s") is None else float(entry["measured_s"]),
            layer=entry.get("layer"),
            layers=entry.get("layers", 1),
            widths=_widths(entry),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} is malformed: {error}") from None
    if op.measured_s is not None and not 0 <= op.measured_s < math.inf:
        raise UserError(f"{where} is malformed: measured_s is no time in seconds")
    texts = all(isinstance(text, str) for text in (op.name, op.module, op.layer or ""))
    if type(op.layers) is not int or op.layers < 1:
        raise UserError(f"{where} is malformed: layers is no number of layers")
    if op.phase not in PHASES or type(op.count) is not int or op.count < 1 or not texts:
        raise UserError(f"{where} is malformed: phase must be one of {', '.join(PHASES)} and count at least 1")
    return op


def _widths(entry: Any) -> tuple[tuple[str, ...], ...] | None:
    given = entry.get("widths")
    if given is None:
        return None
    tensors = [*entry["reads"], *entry["writes"]]
    if len(given) != len(tensors):
        raise ValueError("widths are a list for each tensor")
    for texts, tensor in zip(given, tensors, strict=True):
        if len(texts) != len(tensor["shape"]):
            raise ValueError("widths are a text for each dimension")
        for text in filter(None, texts):
            parsed(text)
    return tuple(map(tuple, given))


def _tensors(found: Any) -> tuple[Seen, ...]:
    seen = []
    for tensor in found:
        shape, size = tuple(tensor["shape"]), tensor["bytes"]
        if not all(type(number) is int and number >= 0 for number in (*shape, size)):
            raise ValueError("shapes and bytes are whole numbers that are not negative")
        seen.append((shape, str(tensor["dtype"]), size))
    return tuple(seen)
