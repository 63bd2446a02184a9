"""Placements: every expert in one slot, and which of them keep router groups together."""

import pytest

from moesim.parallel import place_experts
from moesim.scenario import Contiguous, Explicit, Placement, RoundRobin
from moesim.scenario.placement import keeps_groups


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


def lists(placement: Placement, *, experts: int, ranks: int) -> list[list[int]]:
    slots = placement.fixed_slots(num_experts=experts, num_ranks=ranks)
    assert slots is not None
    return slots


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_contiguous_placement_keeps_groups_together(groups: int) -> None:
    assert keeps_groups(lists(Contiguous(), experts=16, ranks=4), num_groups=groups)


def test_round_robin_and_odd_lists_split_groups() -> None:
    assert not keeps_groups(lists(RoundRobin(kind="round_robin"), experts=16, ranks=4), num_groups=4)
    assert not keeps_groups([[0, 1, 2], [3, 4, 5]], num_groups=3)
    assert keeps_groups([[0, 1, 2], [3, 4, 5]], num_groups=2)
    assert keeps_groups([[0, 4], [1, 5], [2, 6], [3, 7]], num_groups=1)


def test_copies_follow_behind_the_experts() -> None:
    contiguous = lists(Contiguous(redundant_experts=4), experts=8, ranks=4)
    assert contiguous == [[0, 1, 2], [3, 4, 5], [6, 7, 0], [1, 2, 3]]
    turns = lists(RoundRobin(kind="round_robin", redundant_experts=4), experts=8, ranks=4)
    assert turns == [[0, 4, 3], [1, 5, 0], [2, 6, 1], [3, 7, 2]]  # no copy beside its expert
    uneven = lists(RoundRobin(kind="round_robin", redundant_experts=2), experts=6, ranks=4)
    assert uneven == [[0, 4], [1, 5], [2, 0], [3, 1]]
