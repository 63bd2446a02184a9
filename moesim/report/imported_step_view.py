"""What `moesim import-step` shows: the step of another program, by operation.

A traced step stands beside its prediction, for `moesim validate --step`, too.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import RenderableType

from moesim.importing.calibration import Calibration
from moesim.importing.traced_step import TracedStep
from moesim.recorded.estimate import StepEstimate
from moesim.recorded.peak import StepPeak
from moesim.recorded.pricing import PricedOp
from moesim.report.facts import Fact
from moesim.report.terminal import fact_table, indented, number_table, section, show

_WIDTH = 140  # columns, also where there is no terminal


def print_estimate(
    estimate: StepEstimate,
    *,
    source: str,
    gpu: str,
    rows: int,
    corrected_by: str | None = None,
    scalable: tuple[float, tuple[str, ...]] | None = None,
    peak: StepPeak | None = None,
) -> None:
    """Print the step, its dearest operations and those that no table knows; `corrected_by` names the trace's step;
    `scalable`: as `scalable_share` has it. `peak`: of one rank alone.
    """
    line = estimate.timeline
    alone = ", of one rank without the others" if line.sent else ""
    lines = [
        ("step", _ms(estimate.step_s), "of one rank, with all of the following in its order"),
        *_of_hosts(estimate),
        ("kernels", _ms(estimate.kernels_s), f"{sum(op.count for op in estimate.ops)} operations{alone}"),
        ("gaps between them", _ms(estimate.gaps_s), ""),
        ("idle, host late", _ms(line.host_late_s), "the GPU waits for a launch"),
        ("  host", _ms(estimate.host_s), "to launch all; differs by machine: --host-factor"),
        *_of_ranks(estimate),
        *(
            (phase, _ms(seconds), f"{seconds / estimate.kernels_s:.1%} of the kernels")
            for phase, seconds in by_phase(estimate).items()
        ),
        ("matched", f"{matched_share(estimate):.1%}", "of the kernels' time; the rest is priced by its bytes"),
    ]
    if peak is not None:
        held = f"weights and inputs {peak.held / 1e9:.4g}, Adam {peak.states / 1e9:.4g} GB"
        lines.append(("memory", f"{peak.total / 1e9:.4g} GB", f"at its peak, {peak.phase}: {held}"))
    if scalable is not None:
        lines.append(("scalable", f"{scalable[0]:.1%}", "of it: every dimension matches a size of the step"))
    head: tuple[str, ...] = _HEAD
    correction = ""
    if corrected_by is not None:
        head, correction = (*_HEAD, "corrected by"), f", corrected by {corrected_by}"
    dearest = [(*_row(op, estimate), f"{op.factor:.3f}")[: len(head)] for op in estimate.ops[:rows]]
    unknown = sorted({op.name for op in estimate.ops if not op.matched})
    parts = [
        section(f"{source} on {gpu}{correction}", number_table(("", "", ""), lines)),
        section("dearest operations", number_table(head, dearest)),
    ]
    if unknown:
        parts.append(section(UNKNOWN, ", ".join(unknown)))
    if scalable is not None and scalable[1]:
        parts.append(section("keep a dimension at its recorded size", ", ".join(scalable[1])))
    taken = sorted({op.module or "outside of modules" for op in estimate.ops if op.assumed})
    if taken:
        parts.append(
            section(
                "conditions on data, taken to hold: what they leave out or run differs if they do not", ", ".join(taken)
            )
        )
    show(parts, width=_WIDTH)


TOLD = 0.02  # of the step, from which on the pace of hosts is told


def _of_hosts(estimate: StepEstimate) -> list[tuple[str, str, str]]:
    """How long the step takes at the paces of hosts, where that matters."""
    least, most = estimate.by_host_s
    if most - least < TOLD * estimate.step_s:
        return []
    return [("  by host", f"{1e3 * least:.4g} to {1e3 * most:.4g} ms", "as fast and slow hosts pace it")]


def _of_ranks(estimate: StepEstimate) -> list[tuple[str, str, str]]:
    """What other ranks add: collectives, copies into and out of their buffers, and that both slow each other."""
    line = estimate.timeline
    if not line.sent:
        return []
    names = sorted({each.name for each in line.sent})
    per_call = ", ".join(f"{sum(each.name == name for each in line.sent)} {name}" for name in names)
    total = sum(each.num_bytes for each in line.sent)
    return [
        ("collectives", _ms(sum(line.sent_s)), f"{per_call}, {total / 1e9:.3g} GB"),
        ("  exposed", _ms(sum(line.exposed_s)), "that no kernel hides"),
        ("  slowed kernels", _ms(line.slowed_s), "by collectives beside them"),
        ("  copies", _ms(line.copies_s), "into and out of buffers, on the stream that computes"),
    ]


UNKNOWN = "priced by their bytes alone"
_HEAD = ("", "phase", "module", "shapes", "times", "ms", "share", "rests on")


def _row(op: PricedOp, estimate: StepEstimate) -> Sequence[str]:
    total = op.count * op.seconds
    return (
        op.name,
        op.phase,
        op.module,
        op.shapes,
        str(op.count),
        f"{1e3 * total:.3g}",
        f"{total / estimate.kernels_s:.1%}",
        op.source,
    )


def by_phase(estimate: StepEstimate) -> dict[str, float]:
    """Seconds of kernels by phase."""
    found: dict[str, float] = {}
    for op in estimate.ops:
        found[op.phase] = found.get(op.phase, 0.0) + op.count * op.seconds
    return found


def matched_share(estimate: StepEstimate) -> float:
    """Share of the kernels' time in operations that the tables know."""
    return sum(op.count * op.seconds for op in estimate.ops if op.matched) / estimate.kernels_s


def estimate_json(
    estimate: StepEstimate,
    *,
    source: str,
    gpu: str,
    corrected_by: str | None = None,
    peak: StepPeak | None = None,
) -> dict[str, Any]:
    """The estimate for a program, SI units; memory is None where the recording does not tell."""
    return {
        "peak_memory_bytes": None if peak is None else peak.total,
        "source": source,
        "gpu": gpu,
        "corrected_by": corrected_by,
        "step_time_s": estimate.step_s,
        "kernels_s": estimate.kernels_s,
        "gaps_s": estimate.gaps_s,
        "host_s": estimate.host_s,
        "host_late_s": estimate.timeline.host_late_s,
        "step_time_by_host_s": list(estimate.by_host_s),
        "collectives": [
            {
                "name": each.name,
                "phase": each.phase,
                "bytes": each.num_bytes,
                "ranks": each.ranks,
                "seconds": took,
                "exposed_s": exposed,
            }
            for each, took, exposed in zip(
                estimate.timeline.sent, estimate.timeline.sent_s, estimate.timeline.exposed_s, strict=True
            )
        ],
        "slowed_s": estimate.timeline.slowed_s,
        "copies_s": estimate.timeline.copies_s,
        "kernels_by_phase_s": by_phase(estimate),
        "matched_share": matched_share(estimate),
        "ops": [vars(op) for op in estimate.ops],
    }


_KINDS = ("", "phase", "kernels", "times", "measured, ms", "predicted, ms", "share", "factor", "spread", "applied")
_PARTS = ("", "measured, ms", "predicted, ms", "error", "share")
Parts = dict[tuple[str, str], tuple[float, float]]


def print_traced(step: TracedStep, estimate: StepEstimate, *, rows: int) -> None:
    """Print the times of a trace, the factor of every kind of operation, and its collectives.

    `estimate`: of the same operations, uncorrected.
    """
    calibration = step.calibration
    total = sum(each.measured_s for each in calibration.corrections)
    kinds = [
        (
            *each.kind.split(" ", 2),
            str(each.number),
            f"{1e3 * each.measured_s:.3g}",
            f"{1e3 * each.predicted_s:.3g}",
            f"{each.measured_s / total:.1%}",
            f"{each.factor:.3f}",
            f"{each.spread:.0%}",
            f"{calibration.factor(kind=each.kind, family=each.family):.3f}",
        )
        for each in calibration.corrections[:rows]
    ]
    parts: list[RenderableType] = [
        section(f"{step.source} on {calibration.device} ({calibration.gpu})", fact_table(_times(step, estimate))),
        section("kinds of operations, predicted at the clock of the trace", number_table(_KINDS, kinds)),
    ]
    left = len(calibration.corrections) - len(kinds)
    if left > 0:
        parts.append(indented(f"and {left} more kinds: --rows {len(calibration.corrections)} prints all"))
    parts += _collectives(calibration)
    unknown = sorted({op.name for op in estimate.ops if not op.matched})
    if unknown:
        parts.append(section(UNKNOWN, ", ".join(unknown)))
    show(parts, width=_WIDTH)


def _times(step: TracedStep, estimate: StepEstimate) -> list[Fact]:
    calibration, times = step.calibration, step.calibration.times
    measured = sum(each.measured_s for each in calibration.corrections)
    predicted = sum(each.predicted_s for each in calibration.corrections)
    lines = [
        ("step in the trace", _ms(times.span_s), "from its first kernel to the end of its last; the profiler slows it"),
        ("operations' kernels", _ms(measured), f"{times.ops} operations, {times.kernels} kernels and copies"),
        ("  predicted", _ms(predicted), f"measured / predicted {measured / predicted:.3f}"),
        ("gaps between kernels", _ms(times.gaps_s), f"{1e6 * times.gap_per_op_s:.2f} us an operation; host ahead"),
        ("idle, host late", _ms(times.late_s), "the GPU waited for a launch; under the profiler"),
        ("host", _ms(times.host_s), f"{1e6 * times.host_per_op_s:.0f} us an operation; with the profiler's own work"),
        ("  waits for the GPU", _ms(times.waits_s), "not counted in it"),
    ]
    if calibration.clock_mhz is not None:
        lines.append(("clock", f"{calibration.clock_mhz:.0f} MHz", "at which long GEMMs are priced as measured"))
    if calibration.modelled_clock_mhz is not None:
        lines.append(("  of the model", f"{calibration.modelled_clock_mhz:.0f} MHz", "for a step of this load"))
    share = matched_share(estimate)
    lines.append(("matched", f"{share:.1%}", "of the predicted time; the rest is priced by its bytes"))
    if calibration.unexplained_s:
        lines.append(("no operation", _ms(calibration.unexplained_s), "of kernels that nothing in the trace launched"))
    return [Fact(*line) for line in lines]


def _collectives(calibration: Calibration) -> list[RenderableType]:
    if not calibration.collectives:
        return []
    head = ("", "phase", "ranks", "MB", "times", "measured, ms", "predicted, ms", "exposed, ms", "predicted, ms")
    rows = [
        (
            each.name,
            each.phase,
            str(each.ranks),
            f"{each.bytes / 1e6:.4g}",
            str(each.count),
            f"{1e3 * each.measured_s:.3g}",
            _ms_or_none(each.predicted_s),
            f"{1e3 * each.exposed_s:.3g}",
            _ms_or_none(each.predicted_exposed_s),
        )
        for each in calibration.collectives
    ]
    return [section("collectives; measured ones include waiting for other ranks", number_table(head, rows))]


def _ms_or_none(seconds: float | None) -> str:
    return "no model" if seconds is None else f"{1e3 * seconds:.3g}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.4g} ms"


def parts_of(step: TracedStep, estimate: StepEstimate) -> Parts:
    """Measured and predicted seconds of kernels by phase and family; `estimate`: of the operations of `step`."""
    measured: dict[tuple[str, str], float] = defaultdict(float)
    predicted: dict[tuple[str, str], float] = defaultdict(float)
    for op in estimate.ops:
        key = op.phase, op.family
        predicted[key] += op.count * op.seconds
        measured[key] += op.count * (op.measured_s or 0.0)
    return {key: (measured[key], predicted[key]) for key in sorted(predicted, key=lambda key: -measured[key])}


def print_comparison(step: TracedStep, estimate: StepEstimate, *, gpu: str, corrected_by: str | None) -> None:
    """Print a traced step beside its prediction: phases, the kinds of kernels in each, gaps, the step."""
    parts, times = parts_of(step, estimate), step.calibration.times
    total = sum(measured for measured, _ in parts.values())
    rows: list[Sequence[str]] = []
    for phase in ("forward", "backward", "optimizer"):
        inside = {family: each for (where, family), each in parts.items() if where == phase}
        if not inside:
            continue
        measured, predicted = (sum(each[side] for each in inside.values()) for side in (0, 1))
        rows.append(_beside(phase, measured, predicted, total))
        rows += [_beside(f"  {family}", *each, total) for family, each in inside.items()]
    rows.append(_beside("kernels", total, estimate.kernels_s, total))
    rows.append(_beside("gaps between kernels", times.gaps_s, estimate.gaps_s, total))
    rows.append(_beside("idle, host late", times.late_s, estimate.timeline.host_late_s, total))
    sent, predicted_s = step.calibration.collectives, estimate.step_s
    if sent:
        exposed = sum(each.exposed_s for each in sent), sum(each.predicted_exposed_s or 0.0 for each in sent)
        slowed = step.calibration.slowed_s, step.calibration.predicted_slowed_s
        rows.append(_beside("collectives, exposed", *exposed, total))
        rows.append(_beside("kernels, slowed by them", *slowed, total))
        predicted_s += exposed[1] + slowed[1]
    rows.append(_beside("step", times.span_s, predicted_s, total))
    ways = f"the kernel models of {gpu}, {f'corrected by {corrected_by}' if corrected_by else 'not corrected'}"
    shown: list[RenderableType] = [
        section(f"{step.source} on {step.calibration.device}, beside {ways}", number_table(_PARTS, rows)),
        section("kinds of operations that are furthest off", number_table(_PARTS, _furthest(estimate, total))),
    ]
    shown += _collectives(step.calibration)
    show(shown, width=_WIDTH)


def _furthest(estimate: StepEstimate, total: float, *, rows: int = 8) -> list[tuple[str, ...]]:
    """The kinds whose predicted seconds differ most from what was measured."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for op in estimate.ops:
        sums[op.kind][0] += op.count * (op.measured_s or 0.0)
        sums[op.kind][1] += op.count * op.seconds
    dearest = sorted(sums.items(), key=lambda item: -abs(item[1][1] - item[1][0]))
    return [_beside(kind, measured, predicted, total) for kind, (measured, predicted) in dearest[:rows]]


def _beside(name: str, measured: float, predicted: float, total: float) -> tuple[str, ...]:
    error = f"{predicted / measured - 1:+.1%}" if measured else ""
    return name, f"{1e3 * measured:.4g}", f"{1e3 * predicted:.4g}", error, f"{measured / total:.1%}"


def traced_json(step: TracedStep, estimate: StepEstimate) -> dict[str, Any]:
    """A traced step for a program, SI units."""
    calibration = step.calibration
    kinds = [
        asdict(each) | {"factor": each.factor, "applied": calibration.factor(kind=each.kind, family=each.family)}
        for each in calibration.corrections
    ]
    return {
        "source": step.source,
        **calibration.as_json(),
        "corrections": kinds,
        "parts": [
            {"phase": phase, "family": family, "measured_s": measured, "predicted_s": predicted}
            for (phase, family), (measured, predicted) in parts_of(step, estimate).items()
        ],
        "predicted": {
            "step_time_s": estimate.step_s,
            "kernels_s": estimate.kernels_s,
            "gaps_s": estimate.gaps_s,
            "host_s": estimate.host_s,
        },
        "ops": [asdict(op) for op in estimate.ops],
    }
