"""The time of a traced step: when its GPU works, waits for its host, or goes from one kernel to the next.

A gap before a kernel that was launched after the work before it had ended is the host's: the GPU idled because the host
was late. Any other gap is the GPU's own. The profiler itself slows the host: what its launches cost here is an upper
bound.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moesim.importing.trace_file import DeviceWork, Launch, TraceEvents

KERNEL_GAP_S = 1.6e-6  # before a kernel, median of nine traces on H100s, 1.50 to 1.63 (docs/imported-steps.md)
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds of a traced step. span: from its first kernel's start to its last one's end; busy: while any kernel runs.

    gaps: between kernels, while the host was ahead; late: while the GPU idled because it was not. host: from the first
    operation to the last launch, without waits for the GPU, with the profiler's own work. ahead: kernels of `kernels`
    for which the host was ahead, 0 where a file does not say.
    """

    span_s: float
    busy_s: float
    gaps_s: float
    late_s: float
    host_s: float
    waits_s: float
    ops: int
    kernels: int
    ahead: int = 0

    @property
    def gap_per_op_s(self) -> float:
        """What falls to one operation: gaps of its kernels, as long as those before which the host was ahead."""
        each = self.gaps_s / self.ahead if self.ahead else KERNEL_GAP_S
        return each * self.kernels / self.ops

    @property
    def host_per_op_s(self) -> float:
        """What the host needed for one operation, under the profiler."""
        return self.host_s / self.ops

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, SI units."""
        return asdict(self)


def step_times(events: TraceEvents, *, ops: int) -> StepTimes:
    """The times of a trace with device work; `ops`: how many of its operations launched work."""
    launches: dict[int | None, Launch] = {
        launch.correlation: launch for launch in events.launches if launch.correlation is not None
    }
    gaps, late, busy, ahead = _gaps(events.device_work, launches)
    working = [launches[work.correlation] for work in events.device_work if work.correlation in launches]
    last = max((launch.end for launch in working), default=0.0)
    begin = min((op.start for op in events.ops), default=last)
    waits = sum(each.end - each.start for each in events.launches if each.name in WAITS and each.end <= last)
    return StepTimes(
        span_s=max(work.end for work in events.device_work) - events.device_work[0].start,
        busy_s=busy,
        gaps_s=gaps,
        late_s=late,
        host_s=max(last - begin - waits, 0.0),
        waits_s=waits,
        ops=max(ops, 1),
        kernels=len(events.device_work),
        ahead=ahead,
    )


def _gaps(work: Sequence[DeviceWork], launches: dict[int | None, Launch]) -> tuple[float, float, float, int]:
    """Seconds of gaps that are the GPU's, of those that are the host's, and of work on any stream; how much work had no
    gap of the host's before it.
    """
    gaps = late = busy = 0.0
    ahead = len(work)
    until = work[0].start
    for each in work:
        if each.start > until:
            launch = launches.get(each.correlation)
            if launch is None or launch.end > until:
                late += each.start - until
                ahead -= 1
            else:
                gaps += each.start - until
        busy += max(0.0, each.end - max(each.start, until))
        until = max(until, each.end)
    return gaps, late, busy, ahead


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
