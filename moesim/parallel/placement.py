"""Where experts sit: slots of the ranks of one expert-parallel group.

Legend: D ranks of the group, P slots per rank, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesim.scenario.placement import Placement

EMPTY_SLOT = -1


@dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """The experts of one layer on the ranks of one group.

    slot_experts_DP: int64, the expert in slot p of rank d, -1 for an empty slot; every expert sits in one slot.
    """

    slot_experts_DP: NDArray[np.int64]

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return int(self.slot_experts_DP.shape[0])

    @property
    def num_slots(self) -> int:
        """Slots per rank, the largest of the ranks."""
        return int(self.slot_experts_DP.shape[1])

    @cached_property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return int((self.slot_experts_DP != EMPTY_SLOT).sum())

    @cached_property
    def rank_of_expert_E(self) -> NDArray[np.int64]:
        """Rank (within the group) that holds each expert."""
        rank_of_expert_E = np.full(self.num_experts, -1, dtype=np.int64)
        rank_d, slot_p = np.nonzero(self.slot_experts_DP != EMPTY_SLOT)
        rank_of_expert_E[self.slot_experts_DP[rank_d, slot_p]] = rank_d
        assert (rank_of_expert_E >= 0).all(), "every expert has a slot"
        return rank_of_expert_E


def place_lists(slots: Sequence[Sequence[int]]) -> ExpertPlacement:
    """`slots[d]` lists the experts of rank d, each once; shorter ranks get empty slots."""
    placed = ExpertPlacement(slot_table(slots))
    assert sorted(expert for experts in slots for expert in experts) == list(range(placed.num_experts))
    return placed


def slot_table(slots: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Lists of experts as an array [D, P], with -1 behind those of shorter ranks."""
    slot_experts_DP = np.full((len(slots), max(map(len, slots))), EMPTY_SLOT, dtype=np.int64)
    for rank, experts in enumerate(slots):
        slot_experts_DP[rank, : len(experts)] = experts
    return slot_experts_DP


def place_experts(placement: Placement, *, num_experts: int, num_ranks: int) -> ExpertPlacement:
    """The slots that the scenario's `placement` section describes, for one group of `num_ranks` ranks.

    For placements in which every expert has one slot, the same in all layers; others are maps (`ExpertMap`).
    """
    slots = placement.fixed_slots(num_experts=num_experts, num_ranks=num_ranks)
    assert slots is not None, "layers differ"
    return place_lists(slots)
