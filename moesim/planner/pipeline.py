"""How long a pipeline takes when the seconds of its passes are known; walks are kept from layout to layout.

With equal micro-batches the steady state repeats, so long schedules are extended from two short ones.
"""

from functools import lru_cache

from moesim.scenario import PipelineSchedule
from moesim.schedules import Action, Seconds, Walk, build_schedule

FILLED = 2  # micro-batches per pipeline rank that fill any pipeline: further ones hold no more activations


@lru_cache(maxsize=256)
def prepare_walk(kind: str, num_ranks: int, num_micro_batches: int, virtual: int) -> Walk:
    """The walk of one schedule."""
    return Walk.of(build_schedule(kind, num_ranks=num_ranks, num_micro_batches=num_micro_batches, virtual=virtual))


def _kept(seconds: Seconds) -> Seconds:
    """The same seconds, asked for once per rank and kinds of passes: micro-batches are equal."""
    known: dict[tuple[int, tuple[object, ...]], float] = {}

    def kept(rank: int, action: Action) -> float:
        key = rank, tuple((work.kind, work.chunk) for work in action.works)
        if key not in known:
            known[key] = seconds(rank, action)
        return known[key]

    return kept


def short_micro_batches(schedule: PipelineSchedule, *, pipeline: int, num_micro_batches: int) -> int:
    """Micro-batches from which on a step of this schedule holds no more activations (some hold all of them)."""
    facts = schedule.facts
    return num_micro_batches if facts.holds_all else min(num_micro_batches, max(FILLED, facts.least_rounds) * pipeline)


def pipeline_finish(
    schedule: PipelineSchedule, *, pipeline: int, num_micro_batches: int, seconds: Seconds, p2p_seconds: float
) -> list[float]:
    """When each pipeline rank has done its last action, seconds from the start of the step."""

    kept = _kept(seconds)

    def finish(micro_batches: int) -> list[float]:
        walk = prepare_walk(schedule.kind, pipeline, micro_batches, schedule.virtual)
        return walk.finish(kept, p2p_seconds=p2p_seconds)

    short, long = (count * pipeline for count in schedule.facts.settles)
    if num_micro_batches <= long:
        return finish(num_micro_batches)
    pairs = zip(finish(short), finish(long), strict=True)
    times = (num_micro_batches - long) / (long - short)
    return [until + times * (until - early) for early, until in pairs]
