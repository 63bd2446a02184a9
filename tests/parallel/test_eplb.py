"""EPLB: equal to the published example, to a plain reference on random cases, and quick."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.parallel.eplb import balance_experts

# The worked example of github.com/deepseek-ai/EPLB (README, commit d52c72d): 2 layers of 12 experts.
EXAMPLE = [
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]
PLACED = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


def test_published_example() -> None:
    placed = balance_experts(np.array(EXAMPLE), num_slots=16, num_groups=4, num_nodes=2, num_ranks=8)
    assert placed.tolist() == PLACED


def reference(load: list[np.float32], *, slots: int, groups: int, nodes: int, ranks: int) -> list[int]:
    """One layer in plain Python, item by item: the expert of every slot. Sums of 32-bit floats, as published."""
    if groups % nodes:
        groups = nodes = 1
    size = len(load) // groups
    group_load = [np.float32(sum(load[g * size : (g + 1) * size])) for g in range(groups)]
    out: list[int] = []
    for members in pack(group_load, nodes):
        experts = [g * size + offset for g in members for offset in range(size)]
        copies = list(experts)
        while len(copies) < slots // nodes:
            count = Counter(copies)
            copies.append(max(experts, key=lambda expert: load[expert] / np.float32(count[expert])))
        count = Counter(copies)
        for rank in pack([load[expert] / np.float32(count[expert]) for expert in copies], ranks // nodes):
            out += [copies[item] for item in rank]
    return out


def pack(weights: list[np.float32], packs: int) -> list[list[int]]:
    """The items of every pack, in the order in which they came."""
    room = len(weights) // packs
    if room == 1:
        return [[item] for item in range(packs)]
    held: list[list[int]] = [[] for _ in range(packs)]
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        able = [pack for pack in held if len(pack) < room]
        min(able, key=lambda pack: sum(weights[other] for other in pack)).append(item)
    return held


CASES = st.tuples(
    st.sampled_from([1, 2, 4]),  # nodes
    st.sampled_from([1, 2, 3, 4]),  # ranks per node
    st.sampled_from([1, 2, 3, 4, 8]),  # groups
    st.integers(1, 4),  # experts of a group
    st.integers(0, 4),  # slots per rank more than needed
    st.integers(0, 2**31),
)


@settings(max_examples=150)
@given(CASES)
def test_equal_to_a_plain_reference(case: tuple[int, ...]) -> None:
    nodes, per_node, groups, size, more, seed = case
    ranks, experts = nodes * per_node, groups * size
    slots = (-(-experts // ranks) + more) * ranks
    load_LE = np.random.default_rng(seed).integers(
        0, 40 if more % 2 else 100_000, size=(3, experts)
    )  # with ties, or few
    placed = balance_experts(load_LE, num_slots=slots, num_groups=groups, num_nodes=nodes, num_ranks=ranks)
    sizes = {"slots": slots, "groups": groups, "nodes": nodes, "ranks": ranks}
    assert placed.tolist() == [reference(list(row.astype(np.float32)), **sizes) for row in load_LE]


@settings(max_examples=60)
@given(CASES)
def test_every_expert_has_a_copy_and_the_heaviest_slot_is_no_heavier_than_with_fewer_copies(
    case: tuple[int, ...],
) -> None:
    nodes, per_node, groups, size, more, seed = case
    ranks, experts = nodes * per_node, groups * size
    slots = (-(-experts // ranks) + more) * ranks
    load_E = np.random.default_rng(seed).integers(0, 1000, size=experts)
    heaviest = []
    for number in (slots, slots + ranks):
        placed = balance_experts(load_E[None], num_slots=number, num_groups=groups, num_nodes=nodes, num_ranks=ranks)[0]
        count_E = np.bincount(placed, minlength=experts)
        assert len(placed) == number and (count_E >= 1).all()
        heaviest.append((load_E / count_E).max())
    assert heaviest[1] <= heaviest[0]


def test_equal_loads_keep_the_order_of_indices() -> None:
    """Ties go to the smaller index, in sorting and in packing, also where nothing was routed at all."""
    for load in (0, 5):
        placed = balance_experts(np.full((1, 8), load), num_slots=8, num_groups=1, num_nodes=1, num_ranks=4)
        # Equal weights go around the ranks; weights of nothing leave every rank as light as the first with room.
        assert placed.tolist() == [[0, 4, 1, 5, 2, 6, 3, 7] if load else [0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.benchmark
def test_58_layers_of_256_experts_are_quick() -> None:
    load_LE = np.random.default_rng(0).zipf(1.5, size=(58, 256)) % 10_000
    started = time.process_time()
    balance_experts(load_LE, num_slots=320, num_groups=8, num_nodes=8, num_ranks=64)
    seconds = time.process_time() - started
    print(f"58 x 256 experts, 320 slots on 64 ranks: {seconds:.3f} s of CPU")
    assert seconds < 0.2
