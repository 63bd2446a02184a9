"""Placements: every expert in one slot, and which of them keep router groups together."""

import numpy as np
import pytest

from moesim.parallel import place_experts
from moesim.scenario import Contiguous, Explicit, RoundRobin


def test_contiguous_and_round_robin() -> None:
    contiguous = place_experts(Contiguous(), num_experts=6, num_ranks=3)
    assert contiguous.slot_experts_DP.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert contiguous.rank_of_expert_E.tolist() == [0, 0, 1, 1, 2, 2]
    turns = place_experts(RoundRobin(kind="round_robin"), num_experts=6, num_ranks=3)
    assert turns.slot_experts_DP.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert turns.rank_of_expert_E.tolist() == [0, 1, 2, 0, 1, 2]


def test_explicit_lists_may_differ_in_length() -> None:
    placement = place_experts(Explicit(kind="explicit", slots=((2,), (0, 3, 1))), num_experts=4, num_ranks=2)
    assert placement.slot_experts_DP.tolist() == [[2, -1, -1], [0, 3, 1]]
    assert placement.rank_of_expert_E.tolist() == [1, 1, 0, 1]
    assert (placement.num_ranks, placement.num_slots, placement.num_experts) == (2, 3, 4)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_contiguous_placement_keeps_groups_together(groups: int) -> None:
    assert not place_experts(Contiguous(), num_experts=16, num_ranks=4).splits_groups(groups)


def test_round_robin_and_odd_lists_split_groups() -> None:
    assert place_experts(RoundRobin(kind="round_robin"), num_experts=16, num_ranks=4).splits_groups(4)
    slots = ((0, 1, 2), (3, 4, 5))
    assert place_experts(Explicit(kind="explicit", slots=slots), num_experts=6, num_ranks=2).splits_groups(3)
    assert not place_experts(Explicit(kind="explicit", slots=slots), num_experts=6, num_ranks=2).splits_groups(2)
    ranks = np.array([[0, 4], [1, 5], [2, 6], [3, 7]])
    whole = Explicit(kind="explicit", slots=tuple(map(tuple, ranks.tolist())))
    assert not place_experts(whole, num_experts=8, num_ranks=4).splits_groups(1)
