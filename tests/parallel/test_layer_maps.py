"""Placing anew while a router trains: loads add up, every expert comes from a rank that had it, nothing else moves."""

from dataclasses import replace

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.parallel.expert_map import ExpertMap
from moesim.parallel.replacing import (
    check_interval,
    loads_ago,
    moves_DD,
    rank_loads,
    recorded_ages,
    recorded_loads,
    renumbered,
)
from moesim.scenario import RouterShape
from moesim.trace import RoutingTrace, StepCounts, uniform_trace

NODES = np.array([0, 0, 1, 1])


def shuffled(seed: int, *, experts: int = 12, slots: int = 5) -> ExpertMap:
    rng = np.random.default_rng(seed)
    held = np.concatenate([np.arange(experts), rng.integers(experts, size=4 * slots - experts)])
    return ExpertMap(rng.permutation(held).reshape(4, slots), experts)


def test_loads_of_ranks_add_up() -> None:
    load_E = np.random.default_rng(0).random(12)
    held = ExpertMap(np.array([[0, 1], [0, 2], [0, 0]]), 3)
    assert rank_loads(held, np.array([8.0, 3.0, 1.0])).tolist() == [5.0, 3.0, 4.0]
    for seed in range(5):
        assert rank_loads(shuffled(seed), load_E).sum() == pytest.approx(load_E.sum())


def test_nothing_moves_to_where_it_is() -> None:
    held = shuffled(1)
    assert not moves_DD(held, held, NODES).any()
    turned = ExpertMap(held.slot_experts_DP[:, ::-1].copy(), 12)  # the same experts in other slots of their ranks
    assert not moves_DD(held, turned, NODES).any()


@pytest.mark.parametrize("seed", range(6))
def test_each_rank_gets_what_it_lacks_from_those_that_had_it(seed: int) -> None:
    before, after = shuffled(seed), shuffled(seed + 100)
    moves = moves_DD(before, after, NODES)
    assert moves.sum(axis=0).tolist() == (after.holds_DE & ~before.holds_DE).sum(axis=1).tolist()
    assert not np.diag(moves).any()
    # What crosses nodes had no holder on the node that gets it.
    for node in (0, 1):
        inside = node == NODES
        lacking = after.holds_DE[inside] & ~before.holds_DE[inside] & ~before.holds_DE[inside].any(axis=0)
        assert moves[~inside][:, inside].sum() == lacking.sum()


def test_of_holders_alike_the_one_with_least_to_send_sends() -> None:
    before = ExpertMap(np.array([[0, 1], [0, 1], [2, 2], [3, 3]]), 4)
    after = ExpertMap(np.array([[0, 1], [0, 1], [0, 2], [1, 3]]), 4)
    assert moves_DD(before, after, np.zeros(4, dtype=np.int64)).sum(axis=1).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("seed", range(6))
def test_renumbering_keeps_nodes_and_moves_no_more(seed: int) -> None:
    before, after = shuffled(seed), shuffled(seed + 100)
    new = renumbered(before, after, NODES)
    for node in (0, 1):
        held = [sorted(map(sorted, each.slot_experts_DP[node == NODES].tolist())) for each in (after, new)]
        assert held[0] == held[1]
    turned = ExpertMap(before.slot_experts_DP[[1, 0, 3, 2]], 12)  # the same on other ranks of the node
    assert not moves_DD(before, renumbered(before, turned, NODES), NODES).any()


def test_renumbering_saves_moves_on_average() -> None:
    def moved(after: ExpertMap, before: ExpertMap) -> int:
        return int(moves_DD(before, after, NODES).sum())

    cases = [(shuffled(seed), shuffled(seed + 100)) for seed in range(20)]
    with_it = sum(moved(renumbered(before, after, NODES), before) for before, after in cases)
    assert with_it < sum(moved(after, before) for before, after in cases)


def test_loads_come_from_every_recorded_step() -> None:
    shape = RouterShape(kind="uniform", num_experts=8, top_k=2)
    trace = uniform_trace(shape, num_layers=2, num_sequences=4, sequence_length=16, seed=0)
    (load_LE,) = recorded_loads(trace).values()
    assert load_LE.shape == (2, 8) and load_LE.sum(axis=1).tolist() == [128, 128]


def drifting(*, steps: tuple[int, ...] = (0, 40, 100), seed: int = 0) -> RoutingTrace:
    """A trace of 8 experts whose rows were others at the earlier steps."""
    shape = RouterShape(kind="uniform", num_experts=8, top_k=2)
    trace = uniform_trace(shape, num_layers=2, num_sequences=4, sequence_length=16, seed=0)
    rng = np.random.default_rng(seed)
    earlier = tuple(
        StepCounts(step=step, counts_LSE=rng.multinomial(128, rng.dirichlet(np.ones(8)), size=(2, 1)).astype(np.int32))
        for step in steps[:-1]
    )
    return replace(trace, steps=(replace(trace.final, step=steps[-1]),), earlier=earlier)


def test_rows_go_back_to_what_was_recorded_then() -> None:
    trace = drifting()
    recorded = recorded_loads(trace)
    assert recorded_ages(trace) == [0, 60, 100]
    for step in recorded:
        np.testing.assert_allclose(loads_ago(trace, recorded[100], steps_ago=100 - step), recorded[step], atol=1e-9)
    half_way = loads_ago(trace, recorded[100], steps_ago=80)
    np.testing.assert_allclose(half_way, (recorded[0] + recorded[40]) / 2)
    part_LE = recorded[100] / 4
    np.testing.assert_allclose(loads_ago(trace, part_LE, steps_ago=60), recorded[40] / 4)  # a part drifts as the whole


def test_what_is_a_parts_own_stays_as_loads_drift() -> None:
    trace = drifting()
    now, then = recorded_loads(trace)[100], recorded_loads(trace)[40]
    own_LE = now / 2 + 40.0 * (np.arange(8) == 3)
    share = own_LE.sum() / now.sum()
    np.testing.assert_allclose(loads_ago(trace, own_LE, steps_ago=60), np.maximum(own_LE + share * (then - now), 0.0))
    assert (loads_ago(trace, own_LE, steps_ago=60)[:, 3] > then[:, 3] * share).all()


def test_an_interval_beyond_the_recording_is_refused() -> None:
    check_interval(drifting(), 100)
    with pytest.raises(UserError, match="from training step 0 to 100; use at most 100"):
        check_interval(drifting(), 101)
    alone = replace(drifting(), earlier=())
    with pytest.raises(UserError, match="one recorded step"):
        check_interval(alone, 1)
