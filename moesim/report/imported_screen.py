"""What `moesim import-step` shows: the step of another program, by operation."""

from collections.abc import Sequence
from typing import Any, TextIO

from moesim.recorded.estimate import StepEstimate
from moesim.recorded.pricing import PricedOp
from moesim.report.screen import number_table, section, show


def print_estimate(
    estimate: StepEstimate,
    *,
    source: str,
    gpu: str,
    rows: int,
    corrected_by: str | None = None,
    scalable: tuple[float, tuple[str, ...]] | None = None,
    file: TextIO | None = None,
    width: int | None = None,
) -> None:
    """Print the step, its dearest operations and those that no table knows; `corrected_by` names the trace's step;
    `scalable`: as `scalable_share` has it.
    """
    line = estimate.timeline
    alone = ", of one rank without the others" if line.sent else ""
    lines = [
        ("step", f"{1e3 * estimate.step_s:.4g} ms", "of one rank, with all of the following in its order"),
        ("kernels", f"{1e3 * estimate.kernels_s:.4g} ms", f"{sum(op.count for op in estimate.ops)} operations{alone}"),
        ("gaps between them", f"{1e3 * estimate.gaps_s:.4g} ms", ""),
        ("idle, host late", f"{1e3 * line.host_late_s:.4g} ms", "the GPU waits for a launch"),
        ("  host", f"{1e3 * estimate.host_s:.4g} ms", "to launch all; differs by machine: --host-per-op"),
        *_of_ranks(estimate),
        *(
            (phase, f"{1e3 * seconds:.4g} ms", f"{seconds / estimate.kernels_s:.1%} of the kernels")
            for phase, seconds in by_phase(estimate).items()
        ),
        ("matched", f"{matched_share(estimate):.1%}", "of the kernels' time; the rest is priced by its bytes"),
    ]
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
    show(lambda options: parts, file=file, width=width or 140)


def _of_ranks(estimate: StepEstimate) -> list[tuple[str, str, str]]:
    """What other ranks add: collectives, copies into and out of their buffers, and that both slow each other."""
    line = estimate.timeline
    if not line.sent:
        return []
    names = sorted({each.name for each in line.sent})
    per_call = ", ".join(f"{sum(each.name == name for each in line.sent)} {name}" for name in names)
    total = sum(each.num_bytes for each in line.sent)
    return [
        ("collectives", f"{1e3 * sum(line.sent_s):.4g} ms", f"{per_call}, {total / 1e9:.3g} GB"),
        ("  exposed", f"{1e3 * sum(line.exposed_s):.4g} ms", "that no kernel hides"),
        ("  slowed kernels", f"{1e3 * line.slowed_s:.4g} ms", "by collectives beside them"),
        ("  copies", f"{1e3 * line.copies_s:.4g} ms", "into and out of buffers, on the stream that computes"),
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


def estimate_json(estimate: StepEstimate, *, source: str, gpu: str, corrected_by: str | None = None) -> dict[str, Any]:
    """The estimate for a program, SI units."""
    return {
        "source": source,
        "gpu": gpu,
        "corrected_by": corrected_by,
        "step_time_s": estimate.step_s,
        "kernels_s": estimate.kernels_s,
        "gaps_s": estimate.gaps_s,
        "host_s": estimate.host_s,
        "host_late_s": estimate.timeline.host_late_s,
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
