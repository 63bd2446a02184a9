"""From the kernels of a trace to the operations that launched them: phase, module and seconds of each.

A kernel names its launch by a correlation number, a launch its innermost operation by an id. An operation of torch
calls others; the outermost one that the price list knows counts, as it does for a step recorded without a GPU.
Operations of the backward pass run inside of the engine's calls, and carry the sequence number of the forward operation
whose gradient they are: it gives them their module. Layers of a trace without a stack are the block of forward
operations that repeats itself.

Legend: N outermost operations of the first forward pass.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.importing.trace_file import MODULE, CpuOp, DeviceWork, Launch, Span, TraceEvents

LONGEST_BLOCK = 3000  # operations of a layer
LEAST_SHARE = 1 / 3  # of the operations, in layers; what repeats itself less is no stack of them


def repeated_blocks(signs: Sequence[Hashable]) -> list[int | None]:
    """Of each operation the number of its layer, [N]; None outside of the longest part that repeats one block.

    >>> repeated_blocks(["embed", "norm", "mm", "norm", "mm", "norm", "head"])
    [None, 0, 0, 1, 1, None, None]
    """
    numbers: dict[Hashable, int] = {}
    ids_N = np.array([numbers.setdefault(sign, len(numbers)) for sign in signs], dtype=np.int64)
    begin, period, length = _longest(ids_N)
    if length < LEAST_SHARE * len(signs):
        return [None] * len(signs)
    layers: list[int | None] = [None] * len(signs)
    for at in range(begin, begin + length - length % period if period else 0):
        layers[at] = (at - begin) // period
    return layers


def _longest(ids_N: NDArray[np.int64]) -> tuple[int, int, int]:
    """Where the part begins that repeats a block the longest, the block's length, and the part's; zeros for none."""
    best, matched = (0, 0, 0), 0
    for period in range(1, min(len(ids_N) // 2, LONGEST_BLOCK) + 1):
        same = np.concatenate([[False], ids_N[:-period] == ids_N[period:], [False]])
        edges = np.flatnonzero(np.diff(same.astype(np.int8)))
        runs = edges[1::2] - edges[::2]
        if len(runs) and runs.max() >= period and runs.max() > matched:
            longest = int(runs.argmax())
            matched = int(runs[longest])
            best = int(edges[2 * longest]), period, matched + period
    return best


LAYER = "layer"
ENGINE = "autograd::engine::evaluate_function"
OPTIMIZER_STEP = "Optimizer.step#"
PROFILER_STEP = "ProfilerStep#"
UNFUSED_ATTENTION = "aten::_scaled_dot_product_attention_math"


@dataclass(frozen=True, kw_only=True)
class TracedOp:
    """One run of an operation that launched work, and the operations that it calls, both in order."""

    op: CpuOp
    phase: str
    module: str
    work: tuple[DeviceWork, ...]
    inner: tuple[CpuOp, ...]

    @property
    def seconds(self) -> float:
        """Of its kernels."""
        return sum(each.end - each.start for each in self.work)

    @property
    def kernel(self) -> str:
        """The name of the longest one."""
        return max(self.work, key=lambda each: each.end - each.start).name


@dataclass(frozen=True, kw_only=True)
class LinkedTrace:
    """The operations of a trace in the order of their start, and the work that no operation explains."""

    ops: tuple[TracedOp, ...]
    unexplained: tuple[DeviceWork, ...]


class OpTree:
    """Which operation calls which, in which phase and module each runs."""

    def __init__(self, events: TraceEvents) -> None:
        self.ops = events.ops
        self.parents = _parents(events.ops)
        self.by_id = {op.id: index for index, op in enumerate(events.ops) if op.id >= 0}
        self.phases = self._phases(events.annotations)
        self.modules = self._modules(events.modules)
        self._inner: dict[int, list[int]] = defaultdict(list)
        for index, parent in enumerate(self.parents):
            if parent >= 0:
                self._inner[parent].append(index)
        self._starts: dict[Any, tuple[list[float], list[int]]] = defaultdict(lambda: ([], []))
        for index, op in enumerate(events.ops):
            starts, indices = self._starts[op.thread]
            starts.append(op.start)
            indices.append(index)

    def _phases(self, annotations: Sequence[Span]) -> list[str]:
        inside = [op.name.startswith(ENGINE) for op in self.ops]
        for index, parent in enumerate(self.parents):
            inside[index] |= parent >= 0 and inside[parent]
        ended = max((op.end for op, backward in zip(self.ops, inside, strict=True) if backward), default=float("inf"))
        steps = [span for span in annotations if span.name.startswith(OPTIMIZER_STEP)]

        def phase(op: CpuOp, backward: bool) -> str:
            if any(span.start <= op.start < span.end and span.thread == op.thread for span in steps):
                return "optimizer"
            return "backward" if backward else "optimizer" if op.start >= ended else "forward"

        return [phase(op, backward) for op, backward in zip(self.ops, inside, strict=True)]

    def _modules(self, calls: Sequence[Span]) -> list[str]:
        """Of every operation: where it runs, or the operation whose gradient it makes."""
        places = _innermost(calls, self.ops) if calls else self._layers()
        of_sequence: dict[int, str] = {}
        for op, phase, place in zip(self.ops, self.phases, places, strict=True):
            if phase == "forward" and op.sequence is not None:
                of_sequence[op.sequence] = place  # the last one with this number has made the node
        for index, (op, phase) in enumerate(zip(self.ops, self.phases, strict=True)):
            if phase != "backward" or places[index]:
                continue
            parent = self.parents[index]
            inherited = places[parent] if parent >= 0 else ""
            places[index] = of_sequence.get(-1 if op.sequence is None else op.sequence, inherited) or inherited
        return places

    def _layers(self) -> list[str]:
        """Of every operation of the first forward pass the number of its layer, without a stack."""
        places = [""] * len(self.ops)
        first = next((index for index, phase in enumerate(self.phases) if phase == "backward"), len(self.ops))
        outer = [index for index in range(first) if self.parents[index] < 0 and self.phases[index] == "forward"]
        layers = repeated_blocks([(self.ops[index].name, self.ops[index].dims) for index in outer])
        for index, layer in zip(outer, layers, strict=True):
            places[index] = "" if layer is None else f"{LAYER}.{layer}"
        for index, parent in enumerate(self.parents[:first]):
            if parent >= 0 and self.phases[index] == "forward":
                places[index] = places[parent]
        return places

    def chain(self, index: int) -> Iterator[int]:
        """The operation and those that it is called by, from the inside."""
        while index >= 0:
            yield index
            index = self.parents[index]

    def enclosing(self, launch: Launch) -> int:
        """The innermost operation that runs on the thread of a launch when it starts; -1 where none does."""
        starts, indices = self._starts.get(launch.thread, ([], []))
        at = bisect_right(starts, launch.start) - 1
        if at < 0:
            return -1
        return next((index for index in self.chain(indices[at]) if self.ops[index].end >= launch.start), -1)

    def inner(self, index: int) -> Iterator[CpuOp]:
        """All that an operation calls, in order."""
        for child in self._inner.get(index, ()):
            yield self.ops[child]
            yield from self.inner(child)


def _parents(ops: Sequence[CpuOp]) -> list[int]:
    stacks: dict[Any, list[int]] = defaultdict(list)
    parents = []
    for index, op in enumerate(ops):
        stack = stacks[op.thread]
        while stack and ops[stack[-1]].end <= op.start:
            stack.pop()
        parents.append(stack[-1] if stack else -1)
        stack.append(index)
    return parents


def _innermost(calls: Sequence[Span], ops: Sequence[CpuOp]) -> list[str]:
    """Of every operation the path of classes of the modules around it; an instance's number is a part of its own."""
    stacks: dict[Any, list[Span]] = defaultdict(list)
    places, at = [], 0
    for op in ops:
        while at < len(calls) and calls[at].start <= op.start:
            stack = stacks[calls[at].thread]
            while stack and stack[-1].end <= calls[at].start:
                stack.pop()
            stack.append(calls[at])
            at += 1
        stack = stacks[op.thread]
        while stack and stack[-1].end <= op.start:
            stack.pop()
        places.append(".".join(".".join(call.name.removeprefix(MODULE).rsplit("_", 1)) for call in stack))
    return places


def linked(events: TraceEvents, tree: OpTree, *, knows: Callable[[str], bool]) -> LinkedTrace:
    """Every kernel with the outermost operation around its launch that `knows`, or with the innermost one."""
    works: dict[int, list[DeviceWork]] = defaultdict(list)
    unexplained = []
    for work in events.device_work:
        index = _launched_by(work, events.launch_of, tree)
        if index < 0:
            unexplained.append(work)
            continue
        works[_counted(index, tree, knows)].append(work)
    ops = tuple(
        TracedOp(
            op=tree.ops[index],
            phase=tree.phases[index],
            module=tree.modules[index],
            work=tuple(each),
            inner=tuple(tree.inner(index)),
        )
        for index, each in sorted(works.items())
    )
    return LinkedTrace(ops=ops, unexplained=tuple(unexplained))


def _launched_by(work: DeviceWork, launches: Mapping[int | None, Launch], tree: OpTree) -> int:
    launch = launches.get(work.correlation)
    for op_id in (launch.op_id if launch else None, work.op_id):
        if op_id is not None and op_id in tree.by_id:
            return tree.by_id[op_id]
    return tree.enclosing(launch) if launch else -1


def _counted(index: int, tree: OpTree, knows: Callable[[str], bool]) -> int:
    found = shaped = -1
    for each in tree.chain(index):
        name = tree.ops[each].name
        if tree.ops[each].message is not None:
            return each
        if name == UNFUSED_ATTENTION:
            break
        if knows(name) and (found < 0 or tree.ops[found].name != name):  # a DTensor's calls itself on what a rank holds
            found = each
        if shaped < 0 and tree.ops[each].dims:
            shaped = each
    return found if found >= 0 else shaped if shaped >= 0 else index
