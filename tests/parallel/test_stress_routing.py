"""Stress routing: every pattern of the table does what it says, on the ranks of the scenario that it is drawn for."""

import dataclasses
import itertools
from functools import cache

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.parallel import TrafficSample, TrafficSampler
from moesim.run import obtain_trace, simulate
from moesim.scenario import Scenario, dump_scenario, load_scenario_text, scenario_from_mapping
from moesim.scenario.routers import STRESS, StressFacts, StressLayout
from moesim.scenario.routing import lowest_balancedness
from moesim.seeding import stream
from moesim.trace import RoutingTrace, check_trace, load_trace, save_trace, trace_hash
from moesim.trace.check import has_duplicates

pytestmark = pytest.mark.usefixtures("few_tokens")

RANKS, EXPERTS, TOP_K, LENGTH = 8, 64, 6, 512
LAYOUT = StressLayout(rank_of_expert_E=np.arange(EXPERTS) // (EXPERTS // RANKS), top_k=TOP_K)
EIGHT: dict[str, object] = {"workload.global_batch": 8 * RANKS}  # micro-batches
patterns = pytest.mark.parametrize("pattern", STRESS)


def make(pattern: str, *, severity: float = 1.0, **changes: object) -> Scenario:
    data = {
        "name": "strained",
        "model": {"preset": "deepseek-moe-16b", "layers": 3},
        "routing": {"kind": "stress", "pattern": pattern, "severity": severity},
        "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": RANKS},
        "parallelism": {"data": RANKS, "expert": RANKS},
        "workload": {"sequence_length": LENGTH, "micro_batch": 1, "global_batch": 4 * RANKS},
        "compute": {"profile": "roofline"},
        "uncertainty": {"samples": 2},
    }
    return scenario_from_mapping(data, [f"{key}={value}" for key, value in changes.items()])


@cache
def made(pattern: str, *, severity: float = 1.0) -> RoutingTrace:
    """The routing that several tests look at."""
    return obtain_trace(make(pattern, severity=severity))


@cache
def step_s(pattern: str) -> float:
    """Seconds of a step."""
    return simulate(make(pattern)).result["step_time_s"]


def drawn(scenario: Scenario) -> TrafficSample:
    return TrafficSampler(scenario, obtain_trace(scenario)).draw(stream(2, "test"))


def rank_rows_LBD(scenario: Scenario) -> np.ndarray:
    sample = drawn(scenario)
    return np.stack([sample.slot_rows_BDP(0, layer).sum(axis=2) for layer in range(scenario.model.moe_layers)])


def chosen_LE(trace: RoutingTrace) -> np.ndarray:
    """Share of all tokens that choose each expert."""
    return trace.final_load_LE / trace.final.num_tokens


@patterns
def test_a_trace_has_k_distinct_experts_for_every_token_that_is_no_padding(pattern: str) -> None:
    trace = made(pattern)
    check_trace(trace)
    for ids_STK in trace.final.expert_ids_LSTK:
        padding_ST = (ids_STK == -1).all(axis=-1)
        assert not has_duplicates(ids_STK[~padding_ST])
        assert (ids_STK[~padding_ST] >= 0).all()
        assert 1 - padding_ST.mean() == pytest.approx(np.mean(STRESS[pattern].live), abs=0.01)
        assert (np.diff(padding_ST, axis=1) >= 0).all()  # padding ends a sequence


@patterns
@pytest.mark.parametrize("severity", [0.0, 0.3, 1.0])
def test_shares_add_up_and_leave_no_expert_with_more_rows_than_tokens(pattern: str, severity: float) -> None:
    facts, order_E = STRESS[pattern], np.random.default_rng(0).permutation(EXPERTS)
    for phase in range(facts.num_phases):
        shares_E = facts.shares_E(LAYOUT, order_E=order_E, phase=phase, severity=severity)
        assert shares_E.sum() == pytest.approx(1)
        assert (shares_E >= 0).all()
        if facts.worst is not STRESS["skewed"].worst:  # a law that is cut off
            assert shares_E.max() <= 1 / TOP_K + 1e-12


@patterns
def test_severity_nought_is_balanced(pattern: str) -> None:
    rows_LBD = rank_rows_LBD(make(pattern, severity=0.0))
    assert np.ptp(rows_LBD) == 0
    np.testing.assert_array_less(np.abs(chosen_LE(made(pattern, severity=0.0)) - 6 / 64), 1e-3)


def test_every_token_has_the_hot_expert() -> None:
    chosen = chosen_LE(made("hot_expert"))
    assert (chosen.max(axis=1) == 1).all()
    others = np.sort(chosen, axis=1)[:, :-1]
    np.testing.assert_allclose(others, (TOP_K - 1) / (EXPERTS - 1), rtol=0.02)
    half = chosen_LE(made("hot_expert", severity=0.5))
    np.testing.assert_allclose(half.max(axis=1), (1 + TOP_K / EXPERTS) / 2, rtol=0.01)


@pytest.mark.parametrize("top_k", [6, 12])
def test_the_hot_rank_has_all_that_distinct_experts_allow(top_k: int) -> None:
    rows_LBD = rank_rows_LBD(make("hot_rank", **{"model.top_k": top_k}))
    lowest = lowest_balancedness([EXPERTS // RANKS] * RANKS, top_k=top_k)
    np.testing.assert_allclose(rows_LBD.mean(axis=2) / rows_LBD.max(axis=2), lowest, rtol=1e-3)
    hot_L = rows_LBD.argmax(axis=2)[:, 0]
    assert (rows_LBD.argmax(axis=2) == hot_L[:, None]).all()
    assert len(set(hot_L)) > 1


def test_the_skew_is_zipfs_law_where_it_is_not_cut_off() -> None:
    for chosen_E in chosen_LE(made("skewed")):
        sorted_E = np.sort(chosen_E)[::-1]
        assert sorted_E[0] == 1  # K / H(64) = 1.27 of all tokens, cut off
        gemms = sorted_E[2:] * np.arange(3, EXPERTS + 1)
        np.testing.assert_allclose(gemms, gemms.mean(), rtol=0.05)


def test_ragged_and_empty_sources_send_what_they_route_and_receive_alike() -> None:
    for pattern in ("ragged_sources", "empty_sources"):
        scenario = make(pattern)
        arrays = drawn(scenario).arrays(0, 0)
        sent_BR = arrays.rows_BRE.sum(axis=2) / (LENGTH * TOP_K)
        assert set(sent_BR.reshape(-1)) == set(STRESS[pattern].live)
        assert any(len(set(sent_R)) > 1 for sent_R in sent_BR)  # ranks differ within a micro-batch
        rows_LBD = rank_rows_LBD(scenario)
        assert (np.ptp(rows_LBD, axis=2) <= RANKS).all()  # rounding of each sequence's rows


def test_padding_counts_as_tokens_of_which_no_rows_are_computed() -> None:
    result = simulate(make("empty_sources", **{"workload.global_batch": 64})).result
    assert result["effective"]["kept_share"] == pytest.approx(0.75, abs=0.1)  # sequences are drawn
    assert result["dropped_share"] == 0
    assert any("rows are not computed" in warning for warning in result["warnings"])


def test_the_hotspot_rotates_over_all_ranks_and_the_step_is_even() -> None:
    rows_LBD = rank_rows_LBD(make("rotating_hotspot", **EIGHT))
    assert rows_LBD.shape[1] == STRESS["rotating_hotspot"].num_phases == RANKS
    for rows_BD in rows_LBD:
        assert sorted(rows_BD.argmax(axis=1)) == list(range(RANKS))
        assert np.ptp(rows_BD.sum(axis=0)) == 0
        assert (rows_BD.max(axis=1) == rows_BD.sum(axis=1)).all()


def test_one_micro_batch_of_four_bursts() -> None:
    for rows_BD in rank_rows_LBD(make("burst", **EIGHT)):
        hot_B = rows_BD.max(axis=1) > rows_BD.mean(axis=1)
        assert hot_B.sum() == 2
        assert np.diff(np.flatnonzero(hot_B)) == 4
        assert (rows_BD[hot_B].max(axis=1) == rows_BD[hot_B].sum(axis=1)).all()


def test_samples_begin_in_different_phases() -> None:
    scenario = make("burst", **{"workload.global_batch": RANKS})
    sampler = TrafficSampler(scenario, obtain_trace(scenario))
    hot = [
        np.ptp(sampler.draw(stream(seed, "test")).slot_rows_BDP(0, 0).sum(axis=2), axis=1).max() > 0
        for seed in range(24)
    ]
    assert 1 < sum(hot) < 14  # a quarter of steps of one micro-batch


def test_phases_survive_the_disk_and_count_for_the_hash(tmp_path) -> None:
    trace = made("burst")
    save_trace(trace, tmp_path / "burst.npz")
    again = load_trace(tmp_path / "burst.npz")
    assert again.num_phases == trace.num_phases == 4
    plain = dataclasses.replace(trace, num_phases=1)
    assert trace_hash(again) == trace_hash(trace) != trace_hash(plain)
    with pytest.raises(UserError, match="not those of 7 phases"):
        check_trace(dataclasses.replace(trace, num_phases=7))


def test_a_trace_with_phases_keeps_them_apart_in_other_sequences() -> None:
    trace = made("burst")
    halved = trace.resequence(LENGTH // 2)
    assert halved.num_sequences == 2 * trace.num_sequences
    with pytest.raises(UserError, match="does not divide; use 512"):
        trace.resequence(1000)


@patterns
def test_no_pattern_is_faster_than_balanced_for_the_same_rows(pattern: str) -> None:
    if STRESS[pattern].live != (1.0,):
        return
    assert step_s(pattern) >= step_s("balanced") * (1 - 1e-9)


@patterns
def test_it_survives_the_file_and_follows_the_seed(pattern: str) -> None:
    scenario = make(pattern)
    assert load_scenario_text(dump_scenario(scenario)) == scenario
    hashes = [trace_hash(made(pattern)), *(trace_hash(obtain_trace(make(pattern, seed=seed))) for seed in (0, 1))]
    assert hashes[0] == hashes[1] != hashes[2]


def test_copies_by_eplb_cope_with_a_hot_rank_that_stays() -> None:
    before = rank_rows_LBD(make("hot_rank"))
    after = rank_rows_LBD(make("hot_rank", placement="{kind: eplb, redundant_experts: 16}"))
    assert (before.max(axis=2) == 8 * before.mean(axis=2)).all()
    assert (after.max(axis=2) < 1.3 * after.mean(axis=2)).all()


def test_a_pattern_is_added_by_an_entry_alone(monkeypatch) -> None:
    two_ranks = StressFacts(
        name="two_ranks",
        about="only the first two ranks work",
        worst=lambda layout, order_E, phase: np.where(layout.rank_of_expert_E < 2, 1 / 16, 0.0),
    )
    monkeypatch.setitem(STRESS, "two_ranks", two_ranks)
    rows_LBD = rank_rows_LBD(make("two_ranks"))
    assert ((rows_LBD > 0).sum(axis=2) == 2).all()


LAYOUTS = [
    {"parallelism.data": 2, "parallelism.context": 2, "parallelism.tensor": 2, "parallelism.expert": 2},
    {"capacity": "{kind: expert, factor: 1.0}"},
    {"capacity": "{kind: device, factor: 1.0}"},
    {"parallelism.pipeline": 2, "parallelism.data": 4, "parallelism.expert": 4},
]


def _with_layouts() -> list:
    """Every pattern with one, every one with two patterns; the other pairs are slow."""
    found = []
    for (number, name), (at, layout) in itertools.product(enumerate(STRESS), enumerate(LAYOUTS)):
        marks = [] if (number - at) % len(LAYOUTS) == 0 else [pytest.mark.slow]
        found.append(pytest.param(name, layout, id=f"{name}-{at}", marks=marks))
    return found


@pytest.mark.parametrize(("pattern", "settings"), _with_layouts())
def test_every_pattern_runs_on_other_layouts_and_with_capacities(pattern: str, settings: dict[str, object]) -> None:
    scenario = make(pattern, **settings, **{"workload.global_batch": 16, "uncertainty.samples": 1})
    result = simulate(scenario).result
    assert 0 < result["step_time_s"] < 10
