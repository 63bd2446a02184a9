"""Placements: every expert in one slot, which keep router groups together; permutations of experts per model layer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moesim.parallel import ExpertPlacement, place_experts
from moesim.parallel.counts import device_keep_mask, ranks_of_rows
from moesim.parallel.placement import Relabelling, draw_relabellings, identity_relabelling
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


def draw(placement: ExpertPlacement, groups: int, nodes: list[NDArray[np.int64]], num: int = 1) -> list[Relabelling]:
    generators = (np.random.default_rng(seed) for seed in range(num))
    return draw_relabellings(placement, num_groups=groups, nodes_of_ranks=nodes, generators=generators)


def moves_whole_blocks(labels_E: NDArray[np.int64], expert_from_E: NDArray[np.int64]) -> bool:
    """Whether two experts share a block exactly when those they come from do."""
    before = np.equal.outer(labels_E[expert_from_E], labels_E[expert_from_E])
    return bool((before == np.equal.outer(labels_E, labels_E)).all())


@st.composite
def plans(draw_: st.DrawFn) -> tuple[ExpertPlacement, int, list[NDArray[np.int64]]]:
    ranks = draw_(st.sampled_from([2, 4, 6, 8, 12]))
    per_rank = draw_(st.sampled_from([1, 2, 4]))
    divisors = [groups for groups in range(1, ranks * per_rank + 1) if ranks * per_rank % groups == 0]
    groups = draw_(st.sampled_from(divisors))
    layouts = draw_(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 4)), min_size=1, max_size=2))
    nodes = [(np.arange(ranks) + shift) // gpus for gpus, shift in layouts]
    placement = place_experts(Contiguous(), num_experts=ranks * per_rank, num_ranks=ranks)
    return placement, groups, [node - node[0] for node in nodes]


@settings(max_examples=50)
@given(plans())
def test_ranks_groups_and_nodes_move_as_a_whole(plan: tuple[ExpertPlacement, int, list[NDArray[np.int64]]]) -> None:
    placement, groups, nodes_of_ranks = plan
    group_of_expert = np.arange(placement.num_experts) // (placement.num_experts // groups)
    for relabelling in draw(placement, groups, nodes_of_ranks, num=3):
        expert_from = relabelling.expert_from_E
        assert sorted(expert_from.tolist()) == list(range(placement.num_experts))
        assert sorted(relabelling.rank_from_D.tolist()) == list(range(placement.num_ranks))
        assert moves_whole_blocks(placement.rank_of_expert_E, expert_from)
        assert moves_whole_blocks(group_of_expert, expert_from)
        np.testing.assert_array_equal(
            relabelling.rank_from_D[placement.rank_of_expert_E], placement.rank_of_expert_E[expert_from]
        )
        for node_of_rank in nodes_of_ranks:
            assert moves_whole_blocks(node_of_rank[placement.rank_of_expert_E], expert_from)
            node_from = relabelling.node_from_J(placement, node_of_rank)
            np.testing.assert_array_equal(node_from[node_of_rank], node_of_rank[relabelling.rank_from_D])


def test_every_place_can_be_reached_where_partitions_nest() -> None:
    placement = place_experts(Contiguous(), num_experts=16, num_ranks=8)
    relabellings = draw(placement, 4, [np.arange(8) // 4], num=200)
    for reached in (
        np.array([r.expert_from_E for r in relabellings]),
        np.array([r.rank_from_D for r in relabellings]),
    ):
        assert all(len(np.unique(column)) == reached.shape[1] for column in reached.T)


def test_crossing_partitions_stay_in_place() -> None:
    """Groups of 3 ranks and nodes of 4 cross: only within a common part (such as ranks 0-2) may ranks change places."""
    placement = place_experts(Contiguous(), num_experts=12, num_ranks=12)
    parts = np.array([0, 0, 0, 1, 2, 2, 3, 3, 4, 5, 5, 5])
    drawn = np.array([r.rank_from_D for r in draw(placement, 4, [np.arange(12) // 4], num=50)])
    assert (parts[drawn] == parts).all()
    assert len(np.unique(drawn[:, 0])) == 3


def test_ranks_with_more_slots_do_not_change_places_with_smaller_ones() -> None:
    placement = ExpertPlacement(np.array([[0, 1, 2], [3, -1, -1], [4, 5, 6], [7, -1, -1], [-1, -1, -1]]))
    for relabelling in draw(placement, 1, [np.zeros(5, dtype=np.int64)], num=20):
        assert set(relabelling.rank_from_D[[0, 2]].tolist()) == {0, 2}
        assert set(relabelling.rank_from_D[[1, 3]].tolist()) == {1, 3}
        assert relabelling.rank_from_D[4] == 4


def test_identity_keeps_everything() -> None:
    placement = place_experts(Contiguous(), num_experts=8, num_ranks=4)
    same = identity_relabelling(placement)
    assert same.expert_from_E.tolist() == list(range(8))
    assert same.node_from_J(placement, np.array([0, 0, 1, 1])).tolist() == [0, 1]


@pytest.mark.parametrize("factor", [0.6, 1.0])
def test_device_drops_commute_with_relabelling(factor: float) -> None:
    placement = place_experts(Contiguous(), num_experts=24, num_ranks=8)
    rng = np.random.default_rng(0)
    ids = np.argsort(-(rng.gumbel(size=(8, 50, 24)) - 0.1 * np.arange(24)), axis=-1)[..., :4].astype(np.int16)
    affinities = rng.integers(5, size=ids.shape).astype(np.float32)  # with ties
    protected = rng.random(8) < 0.3

    def keep(selected: NDArray[np.int16]) -> NDArray[np.bool_]:
        ranks = ranks_of_rows(selected, rank_of_expert_E=placement.rank_of_expert_E, num_ranks=8)
        return device_keep_mask(ranks, affinities, protected_S=protected, num_ranks=8, factor=factor)

    (relabelling,) = draw(placement, 8, [np.arange(8) // 4])
    new_number_of_E = np.argsort(relabelling.expert_from_E).astype(np.int16)
    assert not keep(ids).all()
    np.testing.assert_array_equal(keep(new_number_of_E[ids]), keep(ids))
