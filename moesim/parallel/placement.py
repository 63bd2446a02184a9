"""Where experts sit: slots of the ranks of one expert-parallel group.

Legend: D ranks of the group, P slots per rank, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moesim.scenario.cluster import Contiguous, Explicit, Placement, keeps_groups

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

    def splits_groups(self, num_groups: int) -> bool:
        """Whether the placement pulls a router group apart (see `keeps_groups`)."""
        return not keeps_groups(self.slot_experts_DP.tolist(), num_groups=num_groups)


def contiguous_placement(*, num_experts: int, num_ranks: int) -> ExpertPlacement:
    """Rank d holds experts d*E/D .. (d+1)*E/D - 1."""
    return ExpertPlacement(np.arange(num_experts, dtype=np.int64).reshape(num_ranks, num_experts // num_ranks))


def round_robin_placement(*, num_experts: int, num_ranks: int) -> ExpertPlacement:
    """Expert e sits on rank e mod D."""
    return ExpertPlacement(np.arange(num_experts, dtype=np.int64).reshape(num_experts // num_ranks, num_ranks).T.copy())


def explicit_placement(slots: Sequence[Sequence[int]], *, num_experts: int, num_ranks: int) -> ExpertPlacement:
    """`slots[d]` lists the experts of rank d; shorter ranks get empty slots."""
    assert len(slots) == num_ranks
    assert sorted(expert for experts in slots for expert in experts) == list(range(num_experts))
    slot_experts_DP = np.full((num_ranks, max(map(len, slots))), EMPTY_SLOT, dtype=np.int64)
    for rank, experts in enumerate(slots):
        slot_experts_DP[rank, : len(experts)] = experts
    return ExpertPlacement(slot_experts_DP)


def place_experts(placement: Placement, *, num_experts: int, num_ranks: int) -> ExpertPlacement:
    """The slots that the scenario's `placement` section describes, for one group of `num_ranks` ranks.

    The scenario's checks have refused lists that are not complete and experts that do not spread evenly.
    """
    if isinstance(placement, Explicit):
        return explicit_placement(placement.slots, num_experts=num_experts, num_ranks=num_ranks)
    assert num_experts % num_ranks == 0
    build = contiguous_placement if isinstance(placement, Contiguous) else round_robin_placement
    return build(num_experts=num_experts, num_ranks=num_ranks)
