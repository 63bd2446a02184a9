"""When the operations of a step run: the host launches them, one stream computes, another one sends.

The host launches in order and runs ahead of the GPU until it reads a number back. Operations run one behind the other,
each not before it is launched. Collectives of one communicator run one behind the other on a stream of their own, each
not before the operation ahead of it has ended; an operation may wait for some. What overlaps slows each other, by the
factors measured on two H100s (`moesim.kernels.Contention`).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from moesim.kernels.estimate import Beside, Contention, slowed_at, wait_of

STEPS = 3  # in a row, of which the last one counts: how far the host is ahead then repeats itself
SOON = 1e-12  # seconds that are none
READBACK_S = 15e-6  # of a number, beyond waiting for the GPU


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A collective: seconds alone on its links, bytes of a rank's larger buffer and those that it sends (`wire_bytes`),
    and a copy on a stream of its own before it.
    """

    name: str
    seconds: float
    num_bytes: float
    ranks: int
    wire_bytes: float
    copy_s: float = 0.0
    phase: str = "backward"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is launched at once: seconds on the GPU with the gap behind it, and of the host. `sends` start behind it; it
    begins when the collectives of the numbers `waits_for`, counted from the first of the step, are there.
    """

    seconds: float
    host_s: float
    family: str = ""
    reads_back: bool = False
    copies: bool = False  # into or out of the buffer of a collective
    waits_for: tuple[int, ...] = ()
    sends: tuple[Sent, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Seconds of one step among many: all, those in which the GPU waits for the host or for collectives, those by which
    kernels that run beside collectives are longer, those by which the host is ahead of the GPU at the end (0 where it
    waits for the GPU in a step), and of each collective, in order, what it took and what of it no operation hides.
    """

    step_s: float
    host_late_s: float = 0.0
    slowed_s: float = 0.0
    copies_s: float = 0.0
    host_ahead_s: float = 0.0
    sent: tuple[Sent, ...] = ()
    sent_s: tuple[float, ...] = ()
    exposed_s: tuple[float, ...] = ()


@dataclass
class _Running:
    number: int
    sent: Sent
    ready: float
    left: float
    wait: float | None = None
    began: float | None = None
    ended: float = 0.0
    exposed: float = 0.0


@dataclass
class _State:
    contention: Contention
    now: float = 0.0
    host: float = 0.0
    late: float = 0.0
    slowed: float = 0.0
    queue: deque[_Running] = field(default_factory=deque)
    done: dict[int, _Running] = field(default_factory=dict)
    factors: dict[str, Beside] = field(default_factory=dict)

    def beside(self, running: _Running, family: str) -> Beside:
        """The factors of a kernel's family and of this collective."""
        if family not in self.factors:
            self.factors[family] = self.contention.beside_collective(family)
        found = self.factors[family]
        rate = running.sent.wire_bytes / running.sent.seconds
        slower = float(slowed_at(found.transfer, rate=rate, measured_rate=self.contention.collective_rate))
        return found._replace(transfer=slower, wait=float(wait_of(found.wait, alone=running.sent.seconds)))

    def compute(self, family: str, left: float) -> None:
        """A kernel of `left` seconds alone, beside the collectives that are on their way."""
        while left > SOON:
            head = self.queue[0] if self.queue else None
            if head is None or head.ready > self.now:
                span = left if head is None else min(left, head.ready - self.now)
                self.now += span
                left -= span
            else:
                left = self._together(head, family, left, float("inf"))

    def idle(self, until: float) -> None:
        """Nothing but collectives runs up to a time."""
        while until - self.now > SOON:
            head = self.queue[0] if self.queue else None
            if head is None or head.ready > self.now:
                self.now = until if head is None else min(until, head.ready)
            else:
                self._together(head, None, 0.0, until)
        self.now = max(self.now, until)

    def _together(self, head: _Running, family: str | None, left: float, limit: float) -> float:
        """One stretch in which the first collective runs; what is left of the kernel then."""
        head.began = self.now if head.began is None else head.began
        beside = Beside(1.0) if family is None else self.beside(head, family)
        if head.wait is None:
            head.wait = beside.wait
        if head.wait > 0.0:
            span = min(head.wait, left) if family is not None else min(head.wait, limit - self.now)
            head.wait -= span
            self.now += span
            head.exposed += span if family is None else 0.0
            return left - span
        span = head.left * beside.transfer
        span = min(span, left * beside.compute) if family is not None else min(span, limit - self.now)
        head.left -= span / beside.transfer
        self.now += span
        if family is None:
            head.exposed += span
        else:
            self.slowed += span - span / beside.compute
        if head.left <= SOON:
            head.ended = self.now
            self.done[head.number] = self.queue.popleft()
        return left - span / beside.compute

    def wait_for(self, number: int) -> None:
        """Nothing runs until a collective is there."""
        while number not in self.done:
            head = self.queue[0]
            self.idle(head.ready)
            while self.queue and self.queue[0] is head:
                self._together(head, None, 0.0, float("inf"))


def timeline(works: Sequence[Work], contention: Contention) -> Timeline:
    """What one of many equal steps takes. An operation that waits for a collective that is not sent yet is an error."""
    state, begun, found = _State(contention), 0.0, None
    count = sum(len(work.sends) for work in works)
    for step in range(STEPS):
        late, slowed = state.late, state.slowed
        _one_step(state, works, first=step * count)
        mine = [state.done[number] for number in range(step * count, (step + 1) * count)]
        found = Timeline(
            step_s=state.now - begun,
            host_late_s=state.late - late,
            slowed_s=state.slowed - slowed,
            copies_s=sum(work.seconds for work in works if work.copies),
            host_ahead_s=0.0 if any(work.reads_back for work in works) else state.now - state.host,
            sent=tuple(each.sent for each in mine),
            sent_s=tuple(each.ended - (each.began or 0.0) for each in mine),
            exposed_s=tuple(each.exposed for each in mine),
        )
        begun = state.now
    assert found is not None
    return found


def _one_step(state: _State, works: Sequence[Work], *, first: int) -> None:
    number = first
    for work in works:
        state.host += work.host_s
        for each in work.waits_for:
            state.wait_for(first + each)
        if state.host > state.now:
            state.late += state.host - state.now
            state.idle(state.host)
        state.compute(work.family, work.seconds)
        for sent in work.sends:
            ready = max(state.now, state.host) + sent.copy_s
            state.queue.append(_Running(number=number, sent=sent, ready=ready, left=sent.seconds))
            number += 1
        if work.reads_back:
            state.host = max(state.host, state.now) + READBACK_S
    for each in range(first, number):
        state.wait_for(each)
