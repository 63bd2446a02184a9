"""A pipeline schedule as data: what every pipeline rank does, in order, and who hands what to whom.

Words. A *stage* is a run of consecutive layers, numbered along the model. A *chunk* is a stage held by a rank, numbered
on the rank: interleaved schedules give a rank several stages, bidirectional ones two. A *route* is the way of one
micro-batch through all stages, as (rank, chunk).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Place = tuple[int, int]  # (pipeline rank, chunk)


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

    @cached_property
    def live_PAC(self) -> tuple[NDArray[np.int64], ...]:
        """Micro-batches whose activations each rank holds, [actions, chunks], while each of its actions runs.

        A forward pass adds one. The full backward gives it back at its end; where the backward is split, the gradient
        of the weights does, since it reads the same inputs.
        """
        return tuple(self._live(rank) for rank in range(self.num_ranks))

    def _live(self, rank: int) -> NDArray[np.int64]:
        actions = self.actions[rank]
        held = [0] * len(self.stages_of_rank[rank])
        live_AC = np.zeros((len(actions), len(held)), dtype=np.int64)
        for index, action in enumerate(actions):
            for work in action.works:
                held[work.chunk] += work.kind is Pass.FORWARD
            live_AC[index] = held
            for work in action.works:
                held[work.chunk] -= work.kind in (Pass.BACKWARD, Pass.WEIGHT)
        return live_AC

    @property
    def peak_live_P(self) -> NDArray[np.int64]:
        """Most activations (micro-batches times chunks) that each rank holds at once."""
        return np.array([live_AC.sum(axis=1).max() for live_AC in self.live_PAC])
