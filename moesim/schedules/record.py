"""A pipeline schedule as data: what every pipeline rank does, in order, who hands what to whom, and how long it takes.

Words. A *stage* is a run of consecutive layers, numbered along the model. A *chunk* is a stage held by a rank, numbered
on the rank: interleaved schedules give a rank several stages, bidirectional ones two. A *route* is the way of one
micro-batch through all stages, as (rank, chunk).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

Place = tuple[int, int]  # (pipeline rank, chunk)
Held = tuple[int, int]  # (micro-batch, chunk)


class Pass(StrEnum):
    """One direction of one micro-batch through one chunk."""

    FORWARD = "F"
    BACKWARD = "B"  # the full backward: both kinds of gradient
    INPUT = "I"  # the gradient of the input alone, for which the stage before waits
    WEIGHT = "W"  # the gradient of the weights, which nobody waits for


@dataclass(frozen=True, slots=True)
class Work:
    """A pass of `micro_batch` through `chunk` of the rank that does it."""

    kind: Pass
    micro_batch: int
    chunk: int = 0

    @property
    def gives_back(self) -> bool:
        """Whether its end is that of the micro-batch's activations: that of a full backward pass, or where it is split
        of the gradient of the weights, which reads the same inputs."""
        return self.kind in (Pass.BACKWARD, Pass.WEIGHT)

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}.{self.chunk}"


@dataclass(frozen=True, slots=True)
class Action:
    """What a rank does next: one pass, or a forward and a backward pass that overlap (two works).

    It begins when everything that its works need has arrived, and hands over what they give when it ends.
    """

    works: tuple[Work, ...]

    @property
    def is_pair(self) -> bool:
        """Whether a forward and a backward pass run overlapped."""
        return len(self.works) == 2

    def __str__(self) -> str:
        return "&".join(map(str, self.works))


@dataclass(frozen=True, slots=True)
class P2P:
    """The activation (or gradient) of a micro-batch that `stage` on rank `target` needs from rank `source`.

    Unique within a schedule, so that it can name the event on which a receiver waits. Both ranks may be the same one.
    """

    payload: Literal["activation", "gradient"]
    micro_batch: int
    stage: int
    source: int
    target: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Schedule:
    """The order of one optimizer step.

    stages_of_rank: the stage in each chunk of each rank. actions: in order, for each rank. routes: by micro-batch.
    """

    kind: str
    stages_of_rank: tuple[tuple[int, ...], ...]
    routes: tuple[tuple[Place, ...], ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.actions)

    @property
    def num_stages(self) -> int:
        """Stages of the model."""
        return len(self.routes[0])

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches of the step."""
        return len(self.routes)

    @property
    def num_replicas(self) -> int:
        """Copies of the model's parameters that the ranks hold together: 2 for a bidirectional schedule, else 1."""
        return sum(map(len, self.stages_of_rank)) // self.num_stages

    def stage(self, rank: int, work: Work) -> int:
        """The stage that a work of `rank` passes through."""
        return self.stages_of_rank[rank][work.chunk]

    def receives(self, rank: int, action: Action) -> tuple[P2P, ...]:
        """What must have arrived before `rank` begins `action`, that of the rank itself included.

        A forward pass needs the activation of the stage before, a backward pass (full or of the input) the gradient
        of the stage behind. The ends of the model need nothing.
        """
        return tuple(p2p for work in action.works for p2p in self._receives(rank, work))

    def sends(self, rank: int, action: Action) -> tuple[P2P, ...]:
        """What `rank` hands over when `action` ends."""
        return tuple(p2p for work in action.works for p2p in self._sends(rank, work))

    def _receives(self, rank: int, work: Work) -> Iterator[P2P]:
        stage, route = self.stage(rank, work), self.routes[work.micro_batch]
        if work.kind is Pass.FORWARD and stage > 0:
            yield P2P("activation", work.micro_batch, stage, route[stage - 1][0], rank)
        if work.kind in (Pass.BACKWARD, Pass.INPUT) and stage < self.num_stages - 1:
            yield P2P("gradient", work.micro_batch, stage, route[stage + 1][0], rank)

    def _sends(self, rank: int, work: Work) -> Iterator[P2P]:
        stage, route = self.stage(rank, work), self.routes[work.micro_batch]
        if work.kind is Pass.FORWARD and stage < self.num_stages - 1:
            yield P2P("activation", work.micro_batch, stage + 1, rank, route[stage + 1][0])
        if work.kind in (Pass.BACKWARD, Pass.INPUT) and stage > 0:
            yield P2P("gradient", work.micro_batch, stage - 1, rank, route[stage - 1][0])

    def held(self, rank: int) -> Iterator[frozenset[Held]]:
        """Of what a rank holds the activations while each of its actions runs."""
        held: frozenset[Held] = frozenset()
        for action in self.actions[rank]:
            held |= {(work.micro_batch, work.chunk) for work in action.works if work.kind is Pass.FORWARD}
            yield held
            held -= {(work.micro_batch, work.chunk) for work in action.works if work.gives_back}


Seconds = Callable[[int, Action], float]  # of an action of a pipeline rank


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
