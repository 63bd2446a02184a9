"""How long a schedule takes when the seconds of its actions are known: a walk over every rank's list, without a clock.

The planner's fast screen; the simulator walks the same lists operation by operation. Legend: P pipeline ranks.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.schedules.record import Action, Handoff, Pass, Schedule

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Timetable:
    """When every action of every rank begins and ends, in its order; seconds from the start of the step."""

    start_PA: tuple[FloatArray, ...]
    finish_PA: tuple[FloatArray, ...]

    @property
    def seconds(self) -> float:
        """Until the last rank has ended."""
        return float(max(finish_A[-1] for finish_A in self.finish_PA))

    @property
    def bubble_P(self) -> FloatArray:
        """Seconds that each rank stands idle between 0 and the end of the last rank."""
        pairs = zip(self.start_PA, self.finish_PA, strict=True)
        return np.array([self.seconds - (finish_A - start_A).sum() for start_A, finish_A in pairs])


def walk_schedule(
    schedule: Schedule, *, seconds: Callable[[int, Action], float], handoff_seconds: float = 0.0
) -> Timetable:
    """Every rank runs its actions in order, each as soon as what it needs has arrived.

    `seconds(rank, action)` is the duration; a hand-off between different ranks arrives `handoff_seconds` after the
    action that sends it. A schedule whose ranks wait for each other is a bug: it is asserted against.
    """
    arrived: dict[Handoff, float] = {}
    starts: list[list[float]] = [[] for _ in schedule.actions]
    finishes: list[list[float]] = [[] for _ in schedule.actions]
    waiting: dict[Handoff, int] = {}
    runnable = deque(range(schedule.num_ranks))
    while runnable:
        rank = runnable.popleft()
        for action in schedule.actions[rank][len(finishes[rank]) :]:
            needs = schedule.receives(rank, action)
            missing = [handoff for handoff in needs if handoff not in arrived]
            if missing:
                waiting[missing[0]] = rank
                break
            clock = finishes[rank][-1] if finishes[rank] else 0.0
            start = max([clock, *(arrived[handoff] for handoff in needs)])
            finish = start + seconds(rank, action)
            starts[rank].append(start)
            finishes[rank].append(finish)
            for handoff in schedule.sends(rank, action):
                arrived[handoff] = finish + (handoff_seconds if handoff.target != rank else 0.0)
                if handoff in waiting:
                    runnable.append(waiting.pop(handoff))
    assert all(map(_complete, schedule.actions, finishes)), "ranks wait for each other"
    return Timetable(start_PA=tuple(map(np.array, starts)), finish_PA=tuple(map(np.array, finishes)))


def _complete(actions: tuple[Action, ...], finishes: list[float]) -> bool:
    return len(actions) == len(finishes)


def equal_seconds(
    *, forward: float, backward: float, weight: float, pair: float | None = None
) -> Callable[[int, Action], float]:
    """Durations alike on all chunks: `backward` is the full one and `weight` its part.

    `pair` is that of an overlapped pair, the sum of both passes when absent.
    """
    single = {
        Pass.FORWARD: forward,
        Pass.BACKWARD: backward,
        Pass.INPUT: backward - weight,
        Pass.WEIGHT: weight,
    }
    together = forward + backward if pair is None else pair

    def seconds(rank: int, action: Action) -> float:
        del rank
        return together if action.is_pair else single[action.works[0].kind]

    return seconds
