"""The collectives of a trace: what each took, what of it no other work hides, and the same by the fabric's models.

The prediction replays the step: the kernels of the stream that computes at their predicted seconds, in the order of
the trace, and each collective behind the kernel behind which it began there, or behind which it was launched where it
had to wait for the one before it. What waited for a collective in the trace waits for it in the replay; the optimizer
waits for all.
"""

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from moesim.importing.calibration import Collective
from moesim.importing.trace_file import DeviceWork
from moesim.importing.trace_links import LinkedTrace, TracedOp
from moesim.kernels import KernelModel
from moesim.kernels.estimate import Contention
from moesim.kernels.families import FAMILY_OF, MemoryBound
from moesim.network.collectives import (
    all_gather_seconds,
    all_reduce_seconds,
    all_to_all_seconds,
    reduce_scatter_seconds,
)
from moesim.network.nccl import ring_bytes
from moesim.program.scenario_fabric import node_fabric
from moesim.recorded.timeline import Sent, Work, timeline

ELEMENT_BYTES = {"Float": 4, "Double": 8, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2}
# Words in the names that torch's backend gives collectives -> the model, and what a rank sends over its whole buffer.
CALLS: dict[str, Any] = {
    "allreduce": (all_reduce_seconds, "all_reduce"),
    "allgather": (all_gather_seconds, "all_gather"),
    "all_gather": (all_gather_seconds, "all_gather"),
    "reduce_scatter": (reduce_scatter_seconds, "reduce_scatter"),
    "all_to_all": (all_to_all_seconds, "all_to_all"),
}
SOON = 2e-5  # seconds within which work is taken to have waited for what ended before it
NODE = 8  # ranks of one node at most; larger groups are shown and not predicted
# Words in the names of operations -> families of kernels that collectives slow alike.
FAMILY_WORDS = {"_grouped_mm": "grouped_gemm", "attention": "attention", "mm": "gemm"}


def family_of(name: str) -> str:
    """The family of an operation's kernels, as far as its name tells."""
    return next((family for word, family in FAMILY_WORDS.items() if word in name), FAMILY_OF[MemoryBound])


class _Message(NamedTuple):
    name: str
    phase: str
    bytes: int
    ranks: int


def _message(op: TracedOp) -> _Message:
    message = op.op.message
    assert message is not None
    elements = max(int(message.get("In msg nelems", 0)), int(message.get("Out msg nelems", 0)))
    size = ELEMENT_BYTES.get(str(message.get("dtype")), 1)
    name = str(message.get("Collective name", ""))
    return _Message(name, op.phase, size * elements, int(message.get("Group size", 0)))


def seconds_alone(links: LinkedTrace, contention: Contention) -> list[float]:
    """Of every operation that is no collective, what its kernels would take with no collective beside them."""
    sent = sorted(
        (work for each in links.ops if each.op.message is not None for work in each.work), key=lambda work: work.start
    )
    found = []
    for each in links.ops:
        if each.op.message is not None:
            continue
        beside = contention.beside_collective(family_of(each.op.name))
        shared = sum(work.end - work.start for work in each.work) - exposed_seconds(each.work, sent)
        found.append(each.seconds - shared * (1.0 - 1.0 / beside.compute))
    return found


def collectives_of(
    links: LinkedTrace, priced: Sequence[float], kernels: KernelModel, *, gpu: str
) -> tuple[tuple[Collective, ...], float]:
    """Equal ones once, dearest first; by how many seconds the models have kernels longer beside them.

    `priced`: seconds of every operation that is no collective, in order, with the gap behind it.
    """
    groups: dict[_Message, list[tuple[TracedOp, float | None, float]]] = defaultdict(list)
    sent = [each for each in links.ops if each.op.message is not None]
    predicted, slowed_s = _replayed(links, priced, kernels, gpu=gpu) if sent else ([], 0.0)
    for each, (seconds, exposed) in zip(sent, predicted, strict=True):
        groups[_message(each)].append((each, seconds, exposed))
    compute = [work for each in links.ops if each.op.message is None for work in each.work]
    compute.sort(key=lambda work: work.start)
    found = [
        Collective(
            name=message.name,
            phase=message.phase,
            bytes=message.bytes,
            ranks=message.ranks,
            count=len(each),
            measured_s=sum(one.seconds for one, _, _ in each),
            exposed_s=sum(exposed_seconds(one.work, compute) for one, _, _ in each),
            predicted_s=None if each[0][1] is None else sum(seconds or 0.0 for _, seconds, _ in each),
            predicted_exposed_s=None if each[0][1] is None else sum(exposed for _, _, exposed in each),
        )
        for message, each in groups.items()
    ]
    return tuple(sorted(found, key=lambda each: -each.measured_s)), slowed_s


def _sent(message: _Message, kernels: KernelModel, *, gpu: str) -> Sent | None:
    call = next((call for word, call in CALLS.items() if word in message.name), None)
    if call is None or not 1 < message.ranks <= NODE or not message.bytes:
        return None
    seconds_of, kind = call
    fabric = node_fabric(kernels, gpu=gpu, ranks=message.ranks)
    seconds = seconds_of(fabric, list(range(message.ranks)), float(message.bytes)).seconds
    wire = ring_bytes(kind, message.bytes, ranks=message.ranks)
    return Sent(
        name=message.name, seconds=seconds, num_bytes=message.bytes, ranks=message.ranks, wire_bytes=wire,
        phase=message.phase,
    )  # fmt: skip


def _replayed(
    links: LinkedTrace, priced: Sequence[float], kernels: KernelModel, *, gpu: str
) -> tuple[list[tuple[float | None, float]], float]:
    """Seconds and exposed seconds of every collective in the order of the trace; None without a model."""
    streams = Counter(work.stream for each in links.ops if each.op.message is None for work in each.work)
    main = streams.most_common(1)[0][0] if streams else None
    seconds = iter(priced)
    works: list[Work] = []
    starts: list[float] = []  # in the trace, of the works
    runs: list[tuple[int, TracedOp]] = []
    of_messages: dict[_Message, Sent | None] = {}
    for each in links.ops:
        if each.op.message is not None:
            runs.append((len(works), each))
            continue
        took = next(seconds)
        if each.work[0].stream == main:
            works.append(Work(seconds=took, host_s=0.0, family=family_of(each.op.name)))
            starts.append(each.work[0].start)
    known: list[int] = []
    begun_behind: dict[int, list[Sent]] = defaultdict(list)
    until = 0.0
    for number, (launched, each) in enumerate(runs):
        message = _message(each)
        if message not in of_messages:
            of_messages[message] = _sent(message, kernels, gpu=gpu)
        one = of_messages[message]
        queued = each.work[0].start - until < SOON
        until = each.work[-1].end
        if one is None:
            continue
        place = launched if queued else max(0, min(launched, bisect_left(starts, each.work[0].start)))
        place = max(place, max(begun_behind, default=0))
        begun_behind[place].append(one)
        waiting = _waiting(links, each, starts, launched, main)
        if waiting is not None and waiting > place - 1 and waiting < len(works):
            works[waiting] = replace(works[waiting], waits_for=(*works[waiting].waits_for, len(known)))
        known.append(number)
    ordered: list[Work] = [Work(seconds=0.0, host_s=0.0, sends=tuple(begun_behind.get(0, ())))]
    for at, work in enumerate(works, start=1):
        ordered.append(replace(work, sends=tuple(begun_behind.get(at, ()))))
    last = next((at for at, each in enumerate(_own(links, main)) if each.phase == "optimizer"), None)
    if last is not None:
        ordered[last + 1] = replace(ordered[last + 1], waits_for=tuple(range(_sent_before(ordered, last + 1))))
    line = timeline(ordered, kernels.contention)
    found: list[tuple[float | None, float]] = [(None, 0.0)] * len(runs)
    for number, took, exposed in zip(known, line.sent_s, line.exposed_s, strict=True):
        found[number] = took, exposed
    return found, line.slowed_s


def _own(links: LinkedTrace, main: Any) -> list[TracedOp]:
    return [each for each in links.ops if each.op.message is None and each.work[0].stream == main]


def _sent_before(works: Sequence[Work], place: int) -> int:
    return sum(len(work.sends) for work in works[:place])


def _waiting(links: LinkedTrace, sent: TracedOp, starts: Sequence[float], launched: int, main: Any) -> int | None:
    """The work on the main stream that began as soon as the collective had ended, while that stream did nothing."""
    ended = sent.work[-1].end
    own = _own(links, main)
    first = bisect_left(starts, ended, lo=min(launched, len(starts)))
    if first >= len(starts) or starts[first] - ended > SOON:
        return None
    before = own[first - 1].work[-1].end if first else 0.0
    return first if ended - before > SOON else None


def exposed_seconds(of: Sequence[DeviceWork], others: Sequence[DeviceWork]) -> float:
    """Seconds of some work during which no other work runs; both in the order of their start."""
    exposed, at = 0.0, 0
    for each in of:
        free_from = each.start
        while at < len(others) and others[at].end <= each.start:
            at += 1
        for other in others[at:]:
            if other.start >= each.end:
                break
            exposed += max(0.0, other.start - free_from)
            free_from = max(free_from, other.end)
        exposed += max(0.0, each.end - free_from)
    return exposed
