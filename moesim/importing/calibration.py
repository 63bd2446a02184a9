"""What a trace says of a step's software and machine: its times, and factors on the price of each kind of operation.

Times: when the GPU works, waits for its host, or goes from one kernel to the next. A gap before a kernel that was
launched after the work before it had ended is the host's: the GPU idled because the host was late. Any other gap is the
GPU's own. The profiler itself slows the host: what its launches cost here is an upper bound.

A kind is an operation's name, phase and kernels. Its factor is the measured over the predicted seconds of all its runs.
One kind of one size is little evidence for another size, as transformers' steps show (docs/imported-steps.md): what is
applied is the factor of the kernel's whole family, and of the kind's deviation from it what exceeds NOISE. Kernels that
are bound by memory and whose tensors fit into the L2 cache say nothing of larger ones, nor of their family.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

from moesim.errors import UserError
from moesim.importing.trace_file import DeviceWork, Launch, TraceEvents
from moesim.kernels import CalibratedModel, KernelModel
from moesim.kernels.families import MemoryBound
from moesim.recorded.estimate import at_step_load
from moesim.recorded.pricing import FAMILIES, PricedOp, prices
from moesim.recorded.step_file import RecordedOp, parsed_ops, step_content

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
    launches = events.launch_of
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


def _gaps(work: Sequence[DeviceWork], launches: Mapping[int | None, Launch]) -> tuple[float, float, float, int]:
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


# How far, in logarithms, the factor of a kind at one size is from that at another. Chosen among 0.1 to 0.5 by the ten
# pairs of a trace and another step of its family in which neither step is one of the seven that gave no number.
NOISE = 0.3
L2_S = 19e-6  # 50 MB, the L2 cache of H100 and H200, at the 2.6 TB/s of elementwise kernels
CLOCK_RANGE = (0.5, 1.06)  # over the clock of sustained benchmarks; the highest is 1,980 MHz of H100 and H200
# Families whose times follow the clock, that routing does not touch and that a profile holds.
CLOCKED = ("gemm forward", "gemm dgrad", "gemm wgrad", "attention forward", "attention backward")
MEMORY = FAMILIES[MemoryBound]
LONG_S, OTHER = 1e-4, 1.5


@dataclass(frozen=True, kw_only=True)
class Correction:
    """One kind: how many runs, their seconds measured and predicted, the spread of the logarithm of their quotient."""

    kind: str
    family: str
    number: int
    measured_s: float
    predicted_s: float
    spread: float

    @property
    def factor(self) -> float:
        """Measured over predicted."""
        return self.measured_s / self.predicted_s

    @property
    def carries(self) -> bool:
        """Whether it holds at other sizes, too: not of kernels whose bytes stayed in the cache."""
        return self.family != MEMORY or self.predicted_s > L2_S * self.number


@dataclass(frozen=True, kw_only=True)
class Collective:
    """Equal collectives: bytes of one rank's larger buffer, how many ranks, seconds in all, and those not hidden; the
    same of the fabric's models, in the order and behind the waits of the trace. None: no model for its kind.
    """

    name: str
    phase: str
    bytes: int
    ranks: int
    count: int
    measured_s: float
    exposed_s: float
    predicted_s: float | None = None
    predicted_exposed_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a trace says of the software and the machine beyond its operations.

    device: as its driver calls it; gpu: whose kernel model the corrections are over. clock_mhz: at which the model
    prices the step's GEMMs as they were measured; modelled_clock_mhz: that of the model for such a step. slowed_s:
    by how much kernels are longer beside collectives, which is taken out of what they are measured at;
    predicted_slowed_s: the same by the models, in the order of the trace.
    """

    device: str
    gpu: str
    corrections: tuple[Correction, ...]
    collectives: tuple[Collective, ...]
    times: StepTimes
    clock_mhz: float | None
    modelled_clock_mhz: float | None
    unexplained_s: float
    slowed_s: float = 0.0
    predicted_slowed_s: float = 0.0

    @property
    def gap_s(self) -> float:
        """Seconds between kernels, of one operation."""
        return self.times.gap_per_op_s

    @cached_property
    def _of_kind(self) -> Mapping[str, float]:
        return {each.kind: each.factor for each in self.corrections if each.carries}

    @cached_property
    def _of_family(self) -> Mapping[str, float]:
        measured: dict[str, float] = defaultdict(float)
        predicted: dict[str, float] = defaultdict(float)
        for each in filter(attrgetter("carries"), self.corrections):
            measured[each.family] += each.measured_s
            predicted[each.family] += each.predicted_s
        return {family: measured[family] / predicted[family] for family in measured}

    def factor(self, *, kind: str, family: str) -> float:
        """For another step: the family's factor, and of the kind's deviation what exceeds NOISE; 1 if unknown."""
        common = self._of_family.get(family, 1.0)
        deviation = math.log(self._of_kind.get(kind, common) / common)
        return common * math.exp(deviation * max(0.0, 1.0 - (NOISE / deviation) ** 2)) if deviation else common

    def as_json(self) -> dict[str, Any]:
        """Plain data for the file of a step."""
        return asdict(self)


def corrections_of(ops: Sequence[RecordedOp], priced: Sequence[PricedOp]) -> tuple[Correction, ...]:
    """One correction for each kind among measured operations, which `priced` has in the same order; dearest first."""
    kinds: dict[str, list[tuple[RecordedOp, PricedOp]]] = defaultdict(list)
    for op, price in zip(ops, priced, strict=True):
        kinds[price.kind].append((op, price))
    found = [_correction(kind, each) for kind, each in kinds.items()]
    return tuple(sorted(found, key=lambda each: -each.measured_s))


def _correction(kind: str, runs: Sequence[tuple[RecordedOp, PricedOp]]) -> Correction:
    measured = [op.count * (op.measured_s or 0.0) for op, _ in runs]
    predicted = [op.count * price.seconds for op, price in runs]
    factor = sum(measured) / sum(predicted)
    squares = (
        each * math.log(max(each, 1e-9) / price / factor) ** 2 for each, price in zip(measured, predicted, strict=True)
    )
    return Correction(
        kind=kind,
        family=runs[0][1].family,
        number=round(sum(op.count for op, _ in runs)),
        measured_s=sum(measured),
        predicted_s=sum(predicted),
        spread=math.sqrt(sum(squares) / sum(measured)) if sum(measured) else 0.0,
    )


def model_of_trace(ops: Sequence[RecordedOp], kernels: KernelModel) -> tuple[KernelModel, float | None, float | None]:
    """The kernels of a traced step at the clock at which its long GEMMs take as long as measured; that clock, and
    the one that the model would give such a step. A model without clocks answers for the load of the step.
    """
    usual = at_step_load(ops, kernels)
    free = kernels.at_load(0.0)
    if not isinstance(usual, CalibratedModel) or not isinstance(free, CalibratedModel):
        return usual, None, None
    long = [
        op
        for op, price in zip(ops, prices(ops, usual), strict=True)
        if price.family in CLOCKED and (op.measured_s or 0.0) > LONG_S
    ]
    long = _alike(long, usual)
    measured = _measured(long)
    if not long or free.step_clock_mhz is None:
        return usual, None, usual.step_clock_mhz
    low, high = (factor * free.step_clock_mhz for factor in CLOCK_RANGE)
    for _ in range(20):
        middle = math.sqrt(low * high)
        slow = sum(price.count * price.seconds for price in prices(long, usual.in_step(middle))) > measured
        low, high = (middle, high) if slow else (low, middle)
    return usual.in_step(low), low, usual.step_clock_mhz


def _alike(ops: Sequence[RecordedOp], model: KernelModel) -> list[RecordedOp]:
    """Without those that take much longer or shorter than the others by the model: other kernels, no other clock."""
    ratios = [(op.measured_s or 0.0) / price.seconds for op, price in zip(ops, prices(ops, model), strict=True)]
    middle = sorted(ratios)[len(ratios) // 2] if ratios else 1.0
    return [op for op, ratio in zip(ops, ratios, strict=True) if middle / OTHER < ratio < middle * OTHER]


def _measured(ops: Iterable[RecordedOp]) -> float:
    return sum(op.count * (op.measured_s or 0.0) for op in ops)


def load_calibration(path: Path) -> tuple[str, list[RecordedOp], Calibration]:
    """Source, operations and calibration of a step that came from a trace.

    Raises UserError, one line, for another file or a malformed one.
    """
    content = step_content(path)
    if "calibration" not in content:
        raise UserError(
            f"{path} was recorded without a GPU and has no measured times; make one of a trace: "
            "moesim import-step TRACE.json --out STEP.json"
        )
    ops = parsed_ops(content.get("ops"), where=str(path))
    try:
        calibration = parsed_calibration(content["calibration"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: calibration is malformed ({error}); make it again from the trace") from None
    if not _measured(ops) > 0:
        raise UserError(f"{path}: no operation has measured seconds; make it again from the trace")
    return str(content.get("source", "")), ops, calibration


def parsed_calibration(found: Mapping[str, Any]) -> Calibration:
    """As `as_json` gave it. Raises AttributeError, KeyError, TypeError or ValueError for anything else."""
    corrections = tuple(Correction(**each) for each in found["corrections"])
    times = StepTimes(**found["times"])
    if not all(isinstance(text, str) for each in corrections for text in (each.kind, each.family)):
        raise ValueError("kinds are texts")
    numbers = [number for each in corrections for number in (each.measured_s, each.predicted_s, each.spread + 1.0)]
    if not corrections or not all(number > 0 for number in [*numbers, times.ops, times.span_s]):
        raise ValueError("times must be positive")
    rest = {key: found[key] for key in ("device", "gpu", "clock_mhz", "modelled_clock_mhz", "unexplained_s")}
    rest |= {key: found.get(key, 0.0) for key in ("slowed_s", "predicted_slowed_s")}
    collectives = tuple(Collective(**each) for each in found["collectives"])
    told = [*asdict(times).values(), rest["unexplained_s"], rest["clock_mhz"] or 0.0, rest["modelled_clock_mhz"] or 0.0]
    told += [number for each in collectives for number in (each.measured_s, each.exposed_s, each.bytes, each.count)]
    if not all(math.isfinite(number) for number in told):
        raise ValueError("a time is not finite")
    return Calibration(
        corrections=corrections,
        collectives=collectives,
        times=times,
        **rest,
    )
