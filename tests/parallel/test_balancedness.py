"""Routing of which only mean / max of the rank rows is known: every layer and micro-batch of every layout has it."""

import itertools

import numpy as np
import pytest

from moesim.errors import ConflictError
from moesim.parallel import TrafficSampler
from moesim.run import obtain_trace, simulate
from moesim.scenario import Scenario, dump_scenario, load_scenario_text, scenario_from_mapping
from moesim.scenario.routing import lowest_balancedness
from moesim.seeding import stream
from moesim.trace import check_trace, trace_hash
from moesim.trace.check import has_duplicates
from moesim.trace.metrics import distinct_domains

pytestmark = pytest.mark.usefixtures("few_tokens")

TOLERANCE = 0.01  # of the stated value, with a thousand rows per rank: what docs/routing.md states


def make(value: float, *, ranks: int, experts: int = 64, top_k: int = 6, **changes: object) -> Scenario:
    data = {
        "name": "stated",
        "model": {"preset": "deepseek-moe-16b", "experts": experts, "top_k": top_k, "layers": 3},
        "routing": {"kind": "balancedness", "value": value},
        "cluster": {"gpu": "h200", "nodes": max(1, ranks // 8), "gpus_per_node": min(8, ranks)},
        "parallelism": {"data": ranks, "expert": ranks},
        "workload": {"sequence_length": 1024, "micro_batch": 1, "global_batch": 2 * ranks},
        "compute": {"profile": "roofline"},
        "uncertainty": {"samples": 1},
    }
    return scenario_from_mapping(data, [f"{key}={value}" for key, value in changes.items()])


def rank_rows_LBD(scenario: Scenario, *, group: int = 0) -> np.ndarray:
    """Rows of every rank of a group in every MoE layer and micro-batch of one sample."""
    sampler = TrafficSampler(scenario, obtain_trace(scenario))
    sample = sampler.draw(stream(1, "test"))
    layers = range(scenario.model.moe_layers)
    return np.stack([sample.slot_rows_BDP(group, layer).sum(axis=2) for layer in layers])


def balancedness_LB(scenario: Scenario, *, group: int = 0) -> np.ndarray:
    rows_LBD = rank_rows_LBD(scenario, group=group)
    return rows_LBD.mean(axis=2) / rows_LBD.max(axis=2)


@pytest.mark.parametrize("ranks", [2, 8, 32])
@pytest.mark.parametrize("value", [1.0, 0.8, 0.5, 0.2])
def test_every_layer_and_micro_batch_has_the_stated_balancedness(value: float, ranks: int) -> None:
    if value < lowest_balancedness([64 // ranks] * ranks, top_k=6):
        with pytest.raises(ConflictError, match=r"never below 0\.5; use 0\.5 to 1"):
            make(value, ranks=ranks)
        return
    np.testing.assert_allclose(balancedness_LB(make(value, ranks=ranks)), value, rtol=TOLERANCE)


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (64, 8), (128, 8), (256, 8)])
def test_the_lowest_value_is_reached_and_the_one_below_refused_with_it(experts: int, top_k: int) -> None:
    lowest = lowest_balancedness([experts // 8] * 8, top_k=top_k)
    assert lowest == max(1 / 8, top_k / experts)  # all rows on one rank, or all of its experts for every token
    np.testing.assert_allclose(balancedness_LB(make(lowest, ranks=8, experts=experts, top_k=top_k)), lowest, rtol=1e-3)
    with pytest.raises(ConflictError, match=f"never below {lowest:.4g}; use {lowest:g} to 1"):
        make(lowest * 0.99, ranks=8, experts=experts, top_k=top_k)


def test_one_rank_is_always_balanced() -> None:
    assert (balancedness_LB(make(1.0, ranks=1)) == 1).all()
    with pytest.raises(ConflictError, match="always balanced; use 1"):
        make(0.9, ranks=1)


@pytest.mark.parametrize(("ranks", "top_k", "length"), [(8, 6, 2048), (64, 6, 512), (8, 1, 1001), (32, 7, 333)])
def test_at_one_no_rank_has_more_than_whole_rows_ask_for(ranks: int, top_k: int, length: int) -> None:
    scenario = make(1.0, ranks=ranks, top_k=top_k, **{"workload.sequence_length": length})
    step = obtain_trace(scenario).final
    for ids_STK in step.expert_ids_LSTK:
        for ids_TK in ids_STK:
            rows_D = np.bincount(ids_TK.reshape(-1) // (64 // ranks), minlength=ranks)
            assert rows_D.max() - rows_D.min() <= (0 if length * top_k % ranks == 0 else 1)


@pytest.mark.parametrize("placement", ["{kind: round_robin}", "{kind: contiguous}"])
@pytest.mark.parametrize(
    "layout",
    [
        {"data": 2, "context": 2, "tensor": 2, "expert": 2},  # a group holds a part of the sequences
        {"data": 4, "tensor": 2, "expert": 8},
        {"data": 4, "expert": 4, "pipeline": 2},
        {"data": 8, "expert": 4, "expert_tensor": 2},
    ],
)
def test_it_holds_for_the_ranks_of_any_layout(placement: str, layout: dict[str, int]) -> None:
    settings = {f"parallelism.{key}": size for key, size in ({"data": 8, "expert": 8} | layout).items()}
    scenario = make(0.6, ranks=8, placement=placement, **settings, **{"workload.global_batch": 16})
    groups = scenario.parallelism.stage_ranks // scenario.parallelism.expert
    for group in range(groups):
        np.testing.assert_allclose(balancedness_LB(scenario, group=group), 0.6, rtol=TOLERANCE)


@pytest.mark.parametrize("value", [1.0, 0.6, 0.2])
def test_tokens_have_distinct_experts_within_the_models_groups(value: float) -> None:
    groups = {"model.router_groups": 8, "model.router_group_limit": 3}
    scenario = make(value, ranks=8, **groups)
    trace = obtain_trace(scenario)
    check_trace(trace)
    for ids_STK in trace.final.expert_ids_LSTK:
        assert not has_duplicates(ids_STK)
        assert distinct_domains(ids_STK, domain_of_expert_E=np.arange(64) // 8).max() <= 3
    np.testing.assert_allclose(balancedness_LB(scenario), value, rtol=TOLERANCE)


def test_ranks_may_hold_different_numbers_of_experts_as_far_as_the_smallest_reaches() -> None:
    slots = [list(range(3)), list(range(3, 16)), list(range(16, 40)), list(range(40, 64))]
    placement = f"{{kind: explicit, slots: {slots}}}"
    np.testing.assert_allclose(balancedness_LB(make(0.5, ranks=4, placement=placement)), 0.5, rtol=TOLERANCE)
    with pytest.raises(ConflictError, match=r"4 ranks of 3 experts and top_k = 6 are never below 0\.5"):
        make(0.4, ranks=4, placement=placement)
    with pytest.raises(ConflictError, match="a rank of 1 experts never has the rows of the others"):
        make(1.0, ranks=4, placement=f"{{kind: explicit, slots: {[[0], list(range(1, 16)), *slots[2:]]}}}")


@pytest.mark.parametrize(
    "placement", ["{kind: eplb, redundant_experts: 8}", "{kind: contiguous, redundant_experts: 8}"]
)
def test_placements_with_copies_are_refused_in_one_line(placement: str) -> None:
    with pytest.raises(ConflictError, match=r"^[^\n]*placement[^\n]*balancedness[^\n]*$"):
        make(0.5, ranks=8, placement=placement)


def test_the_hot_rank_differs_by_layer_and_follows_the_seed() -> None:
    hot_L = rank_rows_LBD(make(0.4, ranks=8, **{"model.layers": 28})).argmax(axis=2)
    assert (hot_L == hot_L[:, :1]).all()  # the same in all micro-batches of a layer
    assert len(np.unique(hot_L[:, 0])) > 4
    hashes = [trace_hash(obtain_trace(make(0.4, ranks=8, seed=seed))) for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_lower_the_balancedness_the_longer_the_step() -> None:
    steps = [simulate(make(value, ranks=8)).result["step_time_s"] for value in (1.0, 0.8, 0.5, 0.2)]
    assert all(one < two for one, two in itertools.pairwise(steps))


def test_a_result_reports_what_was_stated() -> None:
    result = simulate(make(0.5, ranks=8)).result
    assert 1 / result["imbalance"]["rank_rows"] == pytest.approx(0.5, rel=TOLERANCE)
    assert result["imbalance"]["balancedness"] == pytest.approx(0.5, rel=TOLERANCE)


def test_a_balancedness_is_that_of_layers_and_micro_batches_averaged() -> None:
    """A mean of quotients is no less than the quotient of means (Jensen)."""
    found = simulate(make(1.0, ranks=8, routing="{kind: uniform}")).result["imbalance"]
    assert 1 / found["rank_rows"] <= found["balancedness"] < 1


def test_it_survives_the_file() -> None:
    scenario = make(1, ranks=8)
    assert load_scenario_text(dump_scenario(scenario)) == scenario
