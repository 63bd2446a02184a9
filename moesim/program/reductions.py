"""Collectives on gradients and parameters among ranks of several groups, once per step.

Legend: S routing samples, W ranks of the world.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesim.results.spans import Collective, Part

FloatArray = NDArray[np.float64]
Members = tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class Reduction:
    """One collective among each of `members` (lists of global ranks): nobody is done before the last has come.

    `buckets` is how many parts it is cut into that may begin while the last backward pass still makes gradients; 0: it
    begins when all gradients are there. `stage`: whose gradients they are; -1: of no single stage.
    `rests_on`: where its seconds come from. `part`: gradients, or the parameters that the optimizer has updated.
    `sent_bytes`: what each rank puts on the wire, 0 where nobody asks.
    """

    name: str
    members: Members
    seconds: float
    source: str
    buckets: int = 0
    stage: int = -1
    collective: Collective = Collective.ALL_REDUCE
    part: Part = Part.GRADIENTS
    rests_on: str = ""
    sent_bytes: float = 0.0

    @cached_property
    def ranks(self) -> frozenset[int]:
        """All ranks that take part."""
        return frozenset(int(rank) for ranks in self.members for rank in ranks)


def last_arrivals(members: Members, ready_SW: FloatArray) -> FloatArray:
    """[S, W]: when the last member of each rank's collective is there."""
    last_SW = ready_SW.copy()
    for ranks in members:
        last_SW[:, ranks] = ready_SW[:, ranks].max(axis=1, keepdims=True)
    return last_SW
