"""How long a pipeline takes when the seconds of its passes are known: the same walk as `walk_schedule`, prepared.

The order in which actions can run depends on the schedule alone; it is found once, and each layout then only adds up.
With equal micro-batches the steady state repeats, so long schedules are extended from two short ones.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from moesim.scenario import PipelineSchedule
from moesim.schedules import Action, Handoff, Schedule, build_schedule

FILLED = 2  # micro-batches per pipeline rank that fill any pipeline: further ones hold no more activations

Seconds = Callable[[int, Action], float]  # of an action of a pipeline rank


@dataclass(frozen=True, eq=False)
class PreparedWalk:
    """The actions of all ranks in an order in which each can run as soon as those before it have.

    Per action: its rank, the action itself, the one before it on its rank (-1: none), those of the same rank and those
    of other ranks whose hand-offs it needs.
    """

    schedule: Schedule
    ranks: Sequence[int]
    actions: Sequence[Action]
    before: Sequence[int]
    own: Sequence[tuple[int, ...]]
    sent: Sequence[tuple[int, ...]]

    def finish(self, seconds: Seconds, *, handoff_seconds: float = 0.0) -> list[float]:
        """When each rank has done all its actions, seconds from the start of the step."""
        known: dict[tuple[int, tuple[object, ...]], float] = {}
        ends: list[float] = []
        last = [0.0] * self.schedule.num_ranks
        for index, (rank, action) in enumerate(zip(self.ranks, self.actions, strict=True)):
            key = rank, tuple((work.kind, work.chunk) for work in action.works)
            if key not in known:
                known[key] = seconds(rank, action)
            start = ends[self.before[index]] if self.before[index] >= 0 else 0.0
            for source in self.own[index]:
                start = max(start, ends[source])
            for source in self.sent[index]:
                start = max(start, ends[source] + handoff_seconds)
            ends.append(start + known[key])
            last[rank] = ends[-1]
        return last


@lru_cache(maxsize=256)
def prepare_walk(kind: str, num_ranks: int, num_micro_batches: int, virtual: int) -> PreparedWalk:
    """The walk of one schedule."""
    schedule = build_schedule(kind, num_ranks=num_ranks, num_micro_batches=num_micro_batches, virtual=virtual)
    made: dict[Handoff, int] = {}
    ranks: list[int] = []
    actions: list[Action] = []
    before: list[int] = []
    own: list[tuple[int, ...]] = []
    sent: list[tuple[int, ...]] = []
    done = [0] * num_ranks
    latest = [-1] * num_ranks
    waiting: dict[Handoff, int] = {}
    runnable = deque(range(num_ranks))
    while runnable:
        rank = runnable.popleft()
        for action in schedule.actions[rank][done[rank] :]:
            needs = schedule.receives(rank, action)
            missing = next((handoff for handoff in needs if handoff not in made), None)
            if missing is not None:
                waiting[missing] = rank
                break
            ranks.append(rank)
            actions.append(action)
            before.append(latest[rank])
            own.append(tuple(made[handoff] for handoff in needs if handoff.source == rank))
            sent.append(tuple(made[handoff] for handoff in needs if handoff.source != rank))
            latest[rank] = len(actions) - 1
            done[rank] += 1
            for handoff in schedule.sends(rank, action):
                made[handoff] = latest[rank]
                if handoff in waiting:
                    runnable.append(waiting.pop(handoff))
    assert len(actions) == sum(map(len, schedule.actions)), "ranks wait for each other"
    return PreparedWalk(schedule, ranks, actions, before, own, sent)


def short_micro_batches(schedule: PipelineSchedule, *, pipeline: int, num_micro_batches: int) -> int:
    """Micro-batches from which on a step of this schedule holds no more activations (some hold all of them)."""
    facts = schedule.facts
    return num_micro_batches if facts.holds_all else min(num_micro_batches, max(FILLED, facts.least_rounds) * pipeline)


def pipeline_finish(
    schedule: PipelineSchedule, *, pipeline: int, num_micro_batches: int, seconds: Seconds, handoff_seconds: float
) -> list[float]:
    """When each pipeline rank has done its last action, seconds from the start of the step."""

    def finish(micro_batches: int) -> list[float]:
        walk = prepare_walk(schedule.kind, pipeline, micro_batches, schedule.virtual)
        return walk.finish(seconds, handoff_seconds=handoff_seconds)

    short, long = (count * pipeline for count in schedule.facts.settles)
    if num_micro_batches <= long:
        return finish(num_micro_batches)
    pairs = zip(finish(short), finish(long), strict=True)
    times = (num_micro_batches - long) / (long - short)
    return [until + times * (until - early) for early, until in pairs]
