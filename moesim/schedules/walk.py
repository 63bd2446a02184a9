"""How long a schedule takes when the seconds of its actions are known: a walk over every rank's list, without a clock.

The planner's screen and the closed forms use it; the simulator runs the same lists operation by operation.

Legend: P pipeline ranks, A actions of a rank.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.schedules.record import P2P, Action, Pass, Schedule

FloatArray = NDArray[np.float64]
Seconds = Callable[[int, Action], float]  # of an action of a pipeline rank


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


@dataclass(frozen=True, eq=False)
class Walk:
    """The actions of all ranks in an order in which each can run as soon as those before it have.

    The order depends on the schedule alone: it is found once, and each set of durations then only adds up. Per action:
    its rank, the action itself, the one before it on its rank (-1: none), those of the same rank and those of other
    ranks that send it what it needs.
    """

    schedule: Schedule
    ranks: Sequence[int]
    actions: Sequence[Action]
    before: Sequence[int]
    own: Sequence[tuple[int, ...]]
    sent: Sequence[tuple[int, ...]]

    @classmethod
    def of(cls, schedule: Schedule) -> "Walk":
        """The walk of a schedule. One whose ranks wait for each other is a bug: it is asserted against."""
        walk = cls(schedule, [], [], [], [], [])
        made: dict[P2P, int] = {}
        done, latest = [0] * schedule.num_ranks, [-1] * schedule.num_ranks
        waiting: dict[P2P, int] = {}
        runnable = deque(range(schedule.num_ranks))
        while runnable:
            rank = runnable.popleft()
            for action in schedule.actions[rank][done[rank] :]:
                needs = schedule.receives(rank, action)
                missing = next((p2p for p2p in needs if p2p not in made), None)
                if missing is not None:
                    waiting[missing] = rank
                    break
                walk._append(rank, action, before=latest[rank], needs=[(p2p, made[p2p]) for p2p in needs])
                latest[rank] = len(walk.actions) - 1
                done[rank] += 1
                for p2p in schedule.sends(rank, action):
                    made[p2p] = latest[rank]
                    if p2p in waiting:
                        runnable.append(waiting.pop(p2p))
        assert len(walk.actions) == sum(map(len, schedule.actions)), "ranks wait for each other"
        return walk

    def _append(self, rank: int, action: Action, *, before: int, needs: Sequence[tuple[P2P, int]]) -> None:
        columns: Any = self.ranks, self.actions, self.before, self.own, self.sent
        own = tuple(maker for p2p, maker in needs if p2p.source == rank)
        sent = tuple(maker for p2p, maker in needs if p2p.source != rank)
        for column, value in zip(columns, (rank, action, before, own, sent), strict=True):
            column.append(value)

    def times(self, seconds: Seconds, *, p2p_seconds: float = 0.0) -> tuple[list[float], list[float]]:
        """When each action starts and ends, in the order of the walk; seconds from the start of the step.

        What one rank sends another arrives `p2p_seconds` after the action that sends it.
        """
        starts: list[float] = []
        ends: list[float] = []
        for rank, action, before, own, sent in zip(
            self.ranks, self.actions, self.before, self.own, self.sent, strict=True
        ):
            start = ends[before] if before >= 0 else 0.0
            for source in own:
                start = max(start, ends[source])
            for source in sent:
                start = max(start, ends[source] + p2p_seconds)
            starts.append(start)
            ends.append(start + seconds(rank, action))
        return starts, ends

    def finish(self, seconds: Seconds, *, p2p_seconds: float = 0.0) -> list[float]:
        """When each rank has done all its actions."""
        last = [0.0] * self.schedule.num_ranks
        for rank, end in zip(self.ranks, self.times(seconds, p2p_seconds=p2p_seconds)[1], strict=True):
            last[rank] = end
        return last


def walk_schedule(schedule: Schedule, *, seconds: Seconds, p2p_seconds: float = 0.0) -> Timetable:
    """Every rank runs its actions in order, each as soon as what it needs has arrived; see `Walk.times`."""
    walk = Walk.of(schedule)
    starts, ends = walk.times(seconds, p2p_seconds=p2p_seconds)

    def by_rank(times: list[float]) -> tuple[FloatArray, ...]:
        rows: list[list[float]] = [[] for _ in schedule.actions]
        for rank, time in zip(walk.ranks, times, strict=True):
            rows[rank].append(time)
        return tuple(map(np.array, rows))

    return Timetable(start_PA=by_rank(starts), finish_PA=by_rank(ends))


def equal_seconds(*, forward: float, backward: float, weight: float, pair: float | None = None) -> Seconds:
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
