"""Experts with copies: rows are conserved, split as stated, and sent where a plain count says."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import networkx as nx
import numpy as np
import pytest

from moesim.errors import UserError
from moesim.parallel import TrafficSample, TrafficSampler
from moesim.parallel.expert_map import ExpertMap, balanced_weights, copy_gradient_bytes_DD
from moesim.parallel.memory.parameters import local_parameters
from moesim.parallel.memory.rows import routed_rows
from moesim.parallel.replacing import rank_loads
from moesim.parallel.traffic import held_copies
from moesim.scenario import Scenario
from moesim.seeding import stream
from moesim.trace import RoutingTrace, popularity_trace, uniform_trace
from moesim.trace.metrics import imbalance

Make = Callable[..., Scenario]

HOT = [11.0, 1, 1, 1, 5, 1, 1, 1] * 2 + [8.0, 1, 1, 1, 1, 1, 1, 1] * 2  # of 32 experts
UNEVEN = [[*range(4 * rank, 4 * rank + 4), *([0] if rank % 2 else [8, 0])] for rank in range(8)]
PLACEMENTS: tuple[dict[str, Any], ...] = (
    {"kind": "contiguous"},
    {"kind": "contiguous", "redundant_experts": 8},
    {"kind": "round_robin"},
    {"kind": "round_robin", "redundant_experts": 16, "split": "nearest"},
    {"kind": "eplb"},
    {"kind": "eplb", "redundant_experts": 16},
    {"kind": "eplb", "redundant_experts": 16, "split": "nearest"},
    {"kind": "eplb", "redundant_experts": 16, "policy": "global", "split": "nearest"},
    {"kind": "eplb", "redundant_experts": 16, "split": "weighted"},
    {
        "kind": "explicit",
        "slots": UNEVEN,
        "split": "weighted",
        "weights": [[i + 1.0 for i, _ in enumerate(r)] for r in UNEVEN],
    },
    {"kind": "by_speed", "redundant_experts": 8, "speeds": [1.0, 1, 1, 1, 0.5, 1, 1, 1]},
    {"kind": "search", "redundant_experts": 8, "tries": 50},
    {"kind": "explicit", "slots": UNEVEN},
)
CAPACITIES: tuple[dict[str, Any], ...] = (
    {"kind": "none"},
    {"kind": "expert", "factor": 1.5, "by": "score"},
    {"kind": "device", "factor": 1.2, "protected_share": 0.1},
)


def trace_of(scenario: Scenario, *, sequences: int = 96, layers: int = 2) -> RoutingTrace:
    shape = scenario.router_shape()
    return popularity_trace(shape, counts=HOT, num_layers=layers, num_sequences=sequences, sequence_length=32, seed=1)


def hot_scenario(make: Make, placement: dict[str, Any], **sections: Any) -> Scenario:
    return make(routing={"kind": "popularity", "counts": HOT}, placement=placement, **sections)


def drawn(scenario: Scenario, *, layers: int = 2) -> TrafficSample:
    return TrafficSampler(scenario, trace_of(scenario, layers=layers)).draw(stream(0, "x"))


@pytest.mark.parametrize("capacity", CAPACITIES, ids=lambda capacity: capacity["kind"])
@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_rows_and_copies_equal_a_plain_count(
    make_scenario: Make, placement: dict[str, Any], capacity: dict[str, Any]
) -> None:
    scenario = hot_scenario(make_scenario, placement, capacity=capacity)
    sample = drawn(scenario)
    for layer in (0, 3, 7):
        arrays, held = sample.arrays(0, layer), sample.map_of(layer)
        assert (arrays.rows_BRE.sum(axis=(1, 2)) + arrays.dropped_rows_B == arrays.routed_rows_B).all()
        assert (arrays.routed_rows_B == 8 * 2 * 32 * 4).all()  # ranks, sequences, tokens, top-k
        # A token goes to a rank once however many of its experts are there.
        rank_rows_BRD = held_copies(arrays, sample.placement, "per_expert")
        assert (arrays.rank_copies_BRD <= rank_rows_BRD).all()
        assert (
            arrays.node_copies_BRJ
            <= np.stack([arrays.rank_copies_BRD[..., :4].sum(-1), arrays.rank_copies_BRD[..., 4:].sum(-1)], -1)
        ).all()
        if held is not None:
            assert held.rows_of_experts(arrays.rows_BRE).sum() == arrays.rows_BRE.sum()
            assert (held.copies_E >= 1).all()
            assert sample.placement.num_experts == held.copies_E.sum()


def test_without_drops_every_placement_computes_the_same_rows_of_each_expert(make_scenario: Make) -> None:
    """Placements that hold nothing back simulate the same sequences, so layers of the trace have the same rows."""
    rows = []
    for placement in (*PLACEMENTS[:4], {"kind": "eplb", "redundant_experts": 16, "made_on": "same"}):
        sample = drawn(hot_scenario(make_scenario, placement, capacity={"kind": "none"}), layers=8)
        arrays, held = sample.arrays(0, 3), sample.map_of(3)
        rows.append(arrays.rows_BRE if held is None else held.rows_of_experts(arrays.rows_BRE))
    for other in rows[1:]:
        np.testing.assert_array_equal(rows[0], other)


def test_one_rank_at_a_time_by_hand(make_scenario: Make) -> None:
    """The slots that rows go to, chosen token by token in plain Python, give the counts of the arrays."""
    placement = {"kind": "eplb", "redundant_experts": 16, "split": "nearest"}
    scenario = hot_scenario(make_scenario, placement, capacity={"kind": "expert", "factor": 64.0, "by": "position"})
    sample = drawn(scenario, layers=8)  # a layer of the trace for each of the model's: nothing changes places
    held, arrays, pieces_BRU = sample.map_of(2), sample.arrays(0, 2), sample.pieces_BRU(0)
    assert held is not None
    ids_STK = sample.sampler.expert_ids_STK(2)
    slots_of = {expert: np.flatnonzero(held.expert_Z == expert).tolist() for expert in range(32)}
    rank_of = sample.placement.rank_of_expert_E
    for rank in (0, 5):
        rows, turns, reached = Counter[int](), Counter[int](), Counter[int]()
        for token in ids_STK[pieces_BRU[0, rank]].reshape(-1, 4):
            ranks = set()
            for expert in token.tolist():
                able = [slot for slot in slots_of[expert] if rank_of[slot] // 4 == rank // 4] or slots_of[expert]
                slot = able[(turns[expert] + rank) % len(able)]
                turns[expert] += 1
                rows[slot] += 1
                ranks.add(int(rank_of[slot]))
            reached.update(ranks)
        assert arrays.rows_BRE[0, rank].tolist() == [rows[slot] for slot in range(48)]
        assert arrays.rank_copies_BRD[0, rank].tolist() == [reached[other] for other in range(8)]


def test_even_copies_differ_by_one_row_of_a_block() -> None:
    held = ExpertMap(np.array([[0, 1], [0, 2], [0, 3]]), 4)
    ids_BTK = np.random.default_rng(0).integers(0, 4, size=(5, 33, 1)).astype(np.int16)
    ids_BTK[0, :3] = -1
    slots = held.choice("even", np.array([0, 0, 1])).slots(ids_BTK)
    assert ((slots == -1) == (ids_BTK == -1)).all() and slots.dtype == ids_BTK.dtype
    for block, chosen in zip(ids_BTK, slots, strict=True):
        assert (held.expert_Z[chosen[block >= 0]] == block[block >= 0]).all()
        counts = [int((chosen == slot).sum()) for slot in (0, 2, 4)]
        assert max(counts) - min(counts) <= 1


def test_weighted_copies_get_their_shares_in_every_stretch() -> None:
    weight_Z = np.array([3.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    held = ExpertMap(np.array([[0, 1], [0, 2], [0, 3]]), 4, weight_Z)
    slots = held.choice("weighted", np.array([0, 0, 1])).slots(np.zeros((4, 240, 1), dtype=np.int16))
    for chosen in slots[..., 0]:
        assert np.bincount(chosen, minlength=5).tolist() == [180, 0, 60, 0, 0]
        for start in range(0, 240, 20):  # no copy gets its rows in one run
            assert 4 <= int((chosen[start : start + 20] == 2).sum()) <= 6
    others = np.array([[[1], [2], [3]]], dtype=np.int16)
    assert held.choice("weighted", np.array([0, 0, 1])).slots(others).ravel().tolist() == [1, 3, 5]


@pytest.mark.parametrize("seed", range(4))
def test_balanced_weights_leave_the_busiest_rank_no_less(seed: int) -> None:
    """Equal to the least possible, by the flow from experts to ranks; and never above that of an even split."""
    rng = np.random.default_rng(seed)
    load_E = rng.zipf(1.4, 24).clip(max=500).astype(np.float64)
    copies = np.concatenate([np.arange(24), rng.integers(24, size=8)])
    held = ExpertMap(rng.permutation(copies).reshape(8, 4), 24)
    speed_D = rng.uniform(0.5, 1.5, 8) if seed % 2 else np.ones(8)
    weighted = replace(held, weight_Z=balanced_weights(held, load_E, speed_D=speed_D))
    done_D = rank_loads(weighted, load_E) / speed_D
    assert rank_loads(weighted, load_E).sum() == pytest.approx(load_E.sum())
    assert done_D.max() <= (rank_loads(held, load_E) / speed_D).max() + 1e-9
    graph = nx.DiGraph()
    for expert in range(24):
        graph.add_edge("in", ("expert", expert), capacity=load_E[expert])
        for rank in held.ranks_of(expert):
            graph.add_edge(("expert", expert), ("rank", rank))
    for rank in range(8):
        graph.add_edge(("rank", rank), "out", capacity=0.999 * done_D.max() * speed_D[rank])
    assert nx.maximum_flow_value(graph, "in", "out") < load_E.sum() * (1 - 1e-9)


def test_nearest_stays_on_the_node_where_it_can() -> None:
    held = ExpertMap(np.array([[0, 1], [0, 2], [0, 3], [4, 1]]), 5)
    choice = held.choice("nearest", np.array([0, 0, 1, 1]))
    ids_BTK = np.tile(np.arange(5, dtype=np.int16), 8).reshape(2, 20, 1)
    slots = choice.slots(ids_BTK, node_B=np.array([0, 1]))
    node_of_slot = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    both = {0, 1}  # experts with copies on both nodes
    for node in (0, 1):
        for expert, slot in zip(ids_BTK[node].ravel(), slots[node].ravel(), strict=True):
            assert held.expert_Z[slot] == expert
            assert expert not in both or node_of_slot[slot] == node
    assert set(slots[0][ids_BTK[0] == 0]) == {0, 2} and set(slots[1][ids_BTK[1] == 0]) == {4}
    assert held.ranks_of(0) == (0, 1, 2) and held.ranks_of(1) == (0, 3)


def test_experts_once_and_in_order_need_no_map(make_scenario: Make) -> None:
    assert drawn(hot_scenario(make_scenario, {"kind": "contiguous"})).map_of(0) is None
    explicit = {"kind": "explicit", "slots": [list(range(4 * rank, 4 * rank + 4)) for rank in range(8)]}
    assert drawn(hot_scenario(make_scenario, explicit)).map_of(0) is None


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_every_rank_holds_equally_many_slots_unless_listed(make_scenario: Make, placement: dict[str, Any]) -> None:
    scenario = hot_scenario(make_scenario, placement)
    table = drawn(scenario).placement.slot_experts_DP
    assert table.shape == (8, scenario.slots_per_rank)
    assert (table >= 0).all() or placement["kind"] == "explicit"


def test_eplb_balances_rows_that_it_has_not_seen(make_scenario: Make) -> None:
    """Placed by the first half of the trace, judged by the second: far below contiguous, and better with copies."""
    found = {}
    for name, placement in (
        ("contiguous", {"kind": "contiguous"}),
        ("eplb", {"kind": "eplb"}),
        ("copies", {"kind": "eplb", "redundant_experts": 16}),
        ("global", {"kind": "eplb", "redundant_experts": 16, "policy": "global"}),
    ):
        sample = drawn(hot_scenario(make_scenario, placement))
        found[name] = np.mean([imbalance(sample.slot_rows_BDP(0, layer).sum(axis=2)).mean() for layer in range(8)])
    assert found["copies"] < found["eplb"] < found["contiguous"]
    assert found["global"] < 1.15 < 1.5 < found["contiguous"]


def test_a_part_of_the_trace_places_and_another_one_is_simulated(make_scenario: Make) -> None:
    scenario = hot_scenario(make_scenario, {"kind": "eplb"})
    sampler = TrafficSampler(scenario, trace_of(scenario, sequences=97))
    assert (sampler.placing_sequences, sampler.sequences.num_sequences) == ((0, 48), 49)
    np.testing.assert_array_equal(sampler.sequences.final.expert_ids_LSTK, sampler.trace.final.expert_ids_LSTK[:, 48:])
    rows_LE = np.array([np.bincount(ids.ravel(), minlength=32) for ids in sampler.trace.final.expert_ids_LSTK[:, :48]])
    np.testing.assert_array_equal(sampler.placing_rows().load_LE, rows_LE)
    for placement, placing, simulated in (
        ({"kind": "eplb", "made_on": "same"}, (0, 97), 97),
        ({"kind": "eplb", "made_on": "same", "judged_on": "later"}, (48, 97), 49),
        ({"kind": "contiguous", "judged_on": "later"}, (0, 0), 49),
        ({"kind": "contiguous"}, (0, 0), 97),
    ):
        other = hot_scenario(make_scenario, placement)
        sampler = TrafficSampler(other, trace_of(other, sequences=97))
        assert (sampler.placing_sequences, sampler.sequences.num_sequences) == (placing, simulated)


def test_a_trace_of_one_sequence_has_no_halves(make_scenario: Make) -> None:
    scenario = hot_scenario(make_scenario, {"kind": "eplb"})
    with pytest.raises(UserError, match="the second half of the trace's sequences is simulated, but it holds one"):
        TrafficSampler(scenario, trace_of(scenario, sequences=1)).draw(stream(0, "x"))


def test_memory_holds_the_slots_and_the_rows_that_copies_get(make_scenario: Make) -> None:
    once, twice = (hot_scenario(make_scenario, {"kind": "eplb", "redundant_experts": number}) for number in (0, 32))
    expert = local_parameters(once, [0]).expert
    assert local_parameters(twice, [0]).expert == 2 * expert
    assert local_parameters(twice, [0]).dense == local_parameters(once, [0]).dense
    sample = drawn(twice)
    rows = routed_rows(twice, [sample])
    for layer in range(8):
        np.testing.assert_array_equal(rows.rows_SLBW[0, layer], sample.slot_rows_BDP(0, layer).sum(axis=2))


def test_gradients_of_copies_travel_between_their_ranks() -> None:
    """Three ranks hold expert 0, two hold expert 1: each sends its part to each other one, on one rank nothing."""
    held = ExpertMap(np.array([[0, 1], [0, 2], [0, 1], [3, 3]]), 4)
    bytes_DD = copy_gradient_bytes_DD([held, None, held], expert_bytes=12.0, num_ranks=4)
    assert bytes_DD.tolist() == [[0, 8, 20, 0], [8, 0, 8, 0], [20, 8, 0, 0], [0, 0, 0, 0]]
    assert not copy_gradient_bytes_DD([None], expert_bytes=12.0, num_ranks=4).any()


@pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
def test_layers_that_share_a_layer_of_the_trace_have_its_rows(make_scenario: Make, placement: dict[str, Any]) -> None:
    """Each expert of a model layer has the rows of the trace's expert, on whichever ranks the layer has moved it to."""
    scenario = hot_scenario(make_scenario, placement, capacity={"kind": "none"})
    sample = drawn(scenario)
    pieces_BRU = sample.pieces_BRU(0)
    for layer in (0, 1, 6):
        held = sample.map_of(layer)
        if held is None:
            continue
        ids = sample.sampler.expert_ids_STK(layer % 2)
        rows = [[np.bincount(ids[pieces].ravel(), minlength=32) for pieces in pieces_RU] for pieces_RU in pieces_BRU]
        np.testing.assert_array_equal(held.rows_of_experts(sample.arrays(0, layer).rows_BRE), rows)


def test_groups_stay_on_nodes_where_they_divide_among_them(make_scenario: Make) -> None:
    """A token's experts lie in at most 3 of 8 groups: on a node each they reach 3 nodes, placed globally more."""
    reached = {}
    router = {"kind": "deepseek_v2", "groups": 8, "group_limit": 3}
    for policy in ("auto", "global"):
        scenario = make_scenario(
            routing={"kind": "uniform", "router": router},
            placement={"kind": "eplb", "redundant_experts": 32, "policy": policy},
            cluster={"gpu": "h800", "nodes": 8, "gpus_per_node": 2},
            parallelism={"data": 16, "expert": 16},
            workload={"sequence_length": 32, "micro_batch": 2, "global_batch": 64},
        )
        trace = uniform_trace(scenario.router_shape(), num_layers=2, num_sequences=96, sequence_length=32, seed=3)
        sampler = TrafficSampler(scenario, trace)
        arrays = sampler.draw(stream(0, "x")).arrays(0, 0)
        reached[policy] = arrays.node_copies_BRJ.sum() / (2 * 32 * 16 * len(arrays.rows_BRE))
        assert sampler.maps is not None
        for held in sampler.maps.maps:
            group_MX = held.slot_experts_DP.reshape(8, -1) // 4  # of the slots of each node
            whole = all(len(set(groups)) == 1 for groups in group_MX.tolist())
            assert whole == (policy == "auto")
    assert reached["auto"] <= 3 < reached["global"]
