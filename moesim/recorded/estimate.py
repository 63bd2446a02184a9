"""What a recorded step takes: its operations priced, in their order, launched by a host, on one rank or on several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np

from moesim.errors import UserError
from moesim.kernels import KernelModel
from moesim.kernels.families import FAMILY_OF
from moesim.kernels.jitter import expected_most
from moesim.recorded.host import HOST, PACES, Host, says_little, weights_of
from moesim.recorded.layers import in_order
from moesim.recorded.pricing import (
    CHECK,
    GAP_S,
    Launch,
    PricedOp,
    checked_launch,
    priced,
    prices,
    seconds_of,
)
from moesim.recorded.sizes import matched, sizes_of
from moesim.recorded.spread import PLANS, Ranks, Spreading
from moesim.recorded.step_file import RecordedOp
from moesim.recorded.timeline import Timeline, Work, timeline

MOST_RUNS = 64  # of one operation in a layer that are launched one by one


class Corrections(Protocol):
    """What a trace of the same software says: factors on the price of operations, and the gap between kernels."""

    @property
    def gap_s(self) -> float:
        """Seconds between the kernels of one operation and of the next, while the host is ahead."""

    def factor(self, *, kind: str, family: str) -> float:
        """By which the price of an operation is multiplied."""


@dataclass(frozen=True, kw_only=True)
class StepEstimate:
    """Seconds of a step: its kernels, the gaps between them, what its host needs to launch them, and, with all of it in
    its order, what the step takes (`timeline`).
    """

    ops: tuple[PricedOp, ...]
    kernels_s: float
    gaps_s: float
    host_s: float
    timeline: Timeline
    at_pace: Callable[[float], Timeline] = field(
        repr=False, compare=False
    )  # of a host that is slower by a factor in all that it does

    @property
    def step_s(self) -> float:
        """Seconds of the step."""
        return self.timeline.step_s

    @cached_property
    def by_host_s(self) -> tuple[float, float]:
        """Seconds of the step at the fastest and at the slowest pace of hosts that was measured (`PACES`)."""
        least, most = (self.at_pace(pace).step_s for pace in PACES)
        return least, most


def step_estimate(
    ops: Sequence[RecordedOp],
    kernels: KernelModel,
    *,
    host: Host = HOST,
    corrections: Corrections | None = None,
    ranks: Ranks | None = None,
) -> StepEstimate:
    """The operations priced, dearest first, at the clock that the load of the step leaves under the power limit.

    `ranks`: over which the step's wrapper spreads it; the operations are those of one of them alone. Ranks meet in
    every step, so that the slowest of their hosts launches for all.
    """
    planned = PLANS[ranks.wrapper](ops, len(ranks.ranks)) if ranks is not None and ranks.wrapper in PLANS else None
    ops = ops if planned is None else planned.ops
    launches = list(map(checked_launch, ops))
    at_load = _at_load(ops, launches, kernels)
    if ranks is not None:
        host = host.times(slowest_host(at_load, ranks=len(ranks.ranks)))
    found = [priced(op, launch, at_load) for op, launch in zip(ops, launches, strict=True)]
    gap_s = GAP_S
    if corrections is not None:
        found, gap_s = [_corrected(op, corrections) for op in found], corrections.gap_s

    weights, usual = weights_of(ops), says_little(ops)

    def works(host: Host) -> list[Work]:
        def works_of(place: int, times: float) -> list[Work]:
            op, runs = ops[place], max(1, min(MOST_RUNS, round(times)))
            each = Work(
                seconds=(found[place].seconds + gap_s) * times / runs,
                host_s=host.seconds(op, weights=weights, usual=usual) * times / runs,
                family=FAMILY_OF[type(launches[place].kernels[0])],
                reads_back=op.name == CHECK and ("taken" in op.facts or op.measured_s is not None),  # else it is drawn
            )
            return [each] * runs

        if ranks is None:
            return [work for block in in_order(ops) for place, times in block.runs for work in works_of(place, times)]
        return Spreading(
            ops=ops, works_of=works_of, ranks=ranks, kernels=at_load, host=host, gap_s=gap_s, planned=planned
        ).works()

    done = works(host)
    return StepEstimate(
        ops=tuple(sorted(found, key=lambda each: -each.count * each.seconds)),
        kernels_s=sum(each.count * each.seconds for each in found),
        gaps_s=sum(op.count for op in ops) * gap_s,
        host_s=sum(work.host_s for work in done),
        timeline=timeline(done, kernels.contention),
        at_pace=lambda pace: timeline(works(host.paced(pace)), kernels.contention),
    )


def slowest_host(kernels: KernelModel, *, ranks: int) -> float:
    """How many times as long as on one rank the slowest of several hosts takes, in the mean.

    What wrappers do was measured on two ranks, with the slower of their hosts in it.
    """
    return 1.0 + kernels.jitter.host * expected_most(ranks)


def scalable_share(ops: Sequence[RecordedOp], kernels: KernelModel) -> tuple[float, tuple[str, ...]] | None:
    """Of the kernels' time, the share of operations whose every dimension matches a size of the step, and the names of
    the others. None where the step does not tell its sizes, so that it cannot be scaled.
    """
    try:
        sizes = sizes_of(ops, where="the step")
    except UserError:
        return None
    found = list(zip(matched(ops, sizes), prices(ops, at_step_load(ops, kernels)), strict=True))
    total = sum(price.count * price.seconds for _, price in found)
    known = sum(price.count * price.seconds for each, price in found if each.known)
    return known / total, tuple(sorted({each.op.name for each, _ in found if not each.known}))


def at_step_load(ops: Sequence[RecordedOp], kernels: KernelModel) -> KernelModel:
    """The kernels of a step of these operations, at the clock that their mean load leaves."""
    return _at_load(ops, list(map(checked_launch, ops)), kernels)


def _at_load(ops: Sequence[RecordedOp], launches: Sequence[Launch], kernels: KernelModel) -> KernelModel:
    launched = [(op.count, launch.kernels) for op, launch in zip(ops, launches, strict=True)]
    light = kernels.at_load(0.0)
    light_s = sum(count * seconds_of(each, light) for count, each in launched)
    flops = sum(count * float(np.sum(kernel.flops)) for count, each in launched for kernel in each)
    return kernels.at_load(flops / light_s)


def _corrected(op: PricedOp, corrections: Corrections) -> PricedOp:
    factor = corrections.factor(kind=op.kind, family=op.family)
    return replace(op, seconds=op.seconds * factor, factor=factor)
