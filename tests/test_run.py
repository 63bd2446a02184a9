"""simulate(): from a scenario to its numbers."""

import json
from functools import cache

import numpy as np
import pytest

from moesim import run
from moesim.errors import UserError
from moesim.results import CATEGORIES, RunRecord
from moesim.results.store import check_free, write_run
from moesim.run import simulate
from moesim.scenario import Scenario, load_scenario
from moesim.scenario.software import SOFTWARE
from moesim.trace import load_trace, save_trace

HOT = [40, 40, 40, 40] + [1] * 12


@cache
def simulated(scenario: Scenario) -> RunRecord:
    """Several tests ask for the same run."""
    return simulate(scenario)


def test_result_has_the_documented_keys_and_adds_up(small):
    result = simulated(small()).result
    assert set(result["attribution_s"]) == set(CATEGORIES)
    assert sum(result["attribution_s"].values()) == pytest.approx(result["step_time_s"], rel=1e-9)
    assert result["attribution_s"]["other"] <= 0.05 * result["step_time_s"]
    assert sum(result["estimate_sources"].values()) == pytest.approx(1.0)
    known = SOFTWARE[result["software"]["name"]]
    said = {"name": known.name, "switches": "", "listed": known.listed, "checked": known.checked}
    assert result["software"] == said
    low, high = result["step_time_range_s"]
    assert low <= result["step_time_s"] <= high
    for part in ("routing", "kernel"):
        inner = result[f"step_time_{part}_range_s"]
        assert low <= inner[0] <= result["step_time_s"] <= inner[1] <= high, part
    assert sum(part["share"] for part in result["step_time_errors"] if part["source"] != "clock") <= 1 + 1e-9
    json.dumps(result, allow_nan=False)


def test_cost_follows_price_and_time(small):
    result = simulated(small()).result
    tokens = 16 * 2048
    per_step = 4 * 2.0 * result["step_time_s"] / 3600
    assert result["cost"]["usd_per_step"] == pytest.approx(per_step)
    assert result["cost"]["usd_per_million_tokens"] == pytest.approx(per_step / tokens * 1e6)
    assert result["cost"]["usd_total"] == pytest.approx(per_step * 1e9 / tokens)
    assert result["tokens_per_second"] == pytest.approx(tokens / result["step_time_s"])


def test_a_hot_rank_changes_time_traffic_and_heat_map(small):
    even = simulated(small({"routing": {"kind": "uniform"}}))
    hot = simulated(small({"routing.counts": HOT}))
    assert hot.result["step_time_s"] > 1.05 * even.result["step_time_s"]
    assert hot.result["imbalance"]["rank_rows"] > 1.5 > even.result["imbalance"]["rank_rows"]
    assert hot.result["imbalance"]["cost_s"] > 10 * abs(even.result["imbalance"]["cost_s"])
    received_R = hot.arrays["traffic_RR"].sum(axis=0)
    assert received_R.max() > 1.1 * received_R.mean()
    assert hot.arrays["expert_load_LE"].max() > 2 > even.arrays["expert_load_LE"].max()


def test_a_recorded_trace_gives_the_same_result_as_its_source(small, tmp_path):
    record = simulated(small())
    save_trace(record.trace, tmp_path / "trace.npz")
    replayed = simulated(small({"routing": {"kind": "trace", "file": str(tmp_path / "trace.npz")}}))
    assert replayed.result["step_time_s"] == record.result["step_time_s"]


def test_a_trace_of_another_model_is_refused(small, tmp_path):
    save_trace(simulated(small()).trace, tmp_path / "trace.npz")
    other = small({"routing": {"kind": "trace", "file": str(tmp_path / "trace.npz")}, "model.experts": 32})
    with pytest.raises(UserError, match="16 experts"):
        simulate(other)


def test_nothing_works_without_the_routers_output(small, monkeypatch):
    monkeypatch.setattr(run, "obtain_trace", lambda *args, **kwargs: None)
    with pytest.raises(AssertionError):
        simulate(small())


def test_a_dense_model_needs_no_routing(small):
    dense = {"layers": 4, "hidden": 512, "heads": 8, "kv_heads": 8, "head_dim": 64, "vocab": 1000}
    model = {**dense, "dense_layers": 4, "dense_intermediate": 1024}
    result = simulated(small({"model": model, "parallelism.expert": 1, "routing": {"kind": "uniform"}})).result
    assert result["attribution_s"]["experts"] == 0 < result["attribution_s"]["dense_ffn"]
    assert result["imbalance"]["cost_s"] == 0


def test_a_small_trace_gives_a_warning_or_no_range(small, tmp_path):
    source = simulated(small()).trace.resequence(2048)
    final = source.final
    few = type(final)(
        step=0,
        expert_ids_LSTK=final.expert_ids_LSTK[:, :9],
        affinities_LSTK=final.affinities_LSTK[:, :9],
        gates_LSTK=final.gates_LSTK[:, :9],
    )
    save_trace(type(source)(router=source.router, steps=(few,)), tmp_path / "few.npz")
    routing = {"kind": "trace", "file": str(tmp_path / "few.npz")}
    short = simulated(small({"routing": routing})).result
    assert short["step_time_range_s"] is not None
    assert "9 sequences for a batch of 16" in short["warnings"][0]
    tiny = simulated(small({"routing": routing, "workload.global_batch": 80})).result
    assert tiny["step_time_range_s"] is None


@pytest.mark.parametrize(
    ("implementation", "felt"),
    [
        ("fused", False),
        ("deepseek", False),
        ({"kind": "fused", "host": "launches", "cuda_graphs": "step"}, False),
        ({"kind": "fused", "host": "launches"}, True),
        ("torchtitan", True),
    ],
)
def test_a_pace_of_the_host_is_felt_or_said_to_change_nothing(small, implementation, felt):
    changes = {"implementation": implementation, "uncertainty.samples": 1}
    usual, slow = (simulated(small({**changes, "compute.host_factor": factor})).result for factor in (1, 50))
    assert (slow["step_time_s"] > usual["step_time_s"]) is felt
    assert any("compute.host_factor: 50 changes nothing" in text for text in slow["warnings"]) is not felt
    assert not any("compute.host_factor" in text for text in usual["warnings"])


def test_a_run_can_be_written_read_and_run_again(small, tmp_path):
    record = simulated(small())
    write_run(record, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == record.result
    assert load_trace(tmp_path / "run" / "trace.npz").router == record.trace.router
    again = simulate(load_scenario(tmp_path / "run" / "scenario.yaml"))
    assert again.result == record.result
    spans = np.load(tmp_path / "run" / "spans.npz")
    assert spans["finish_s"].max() == pytest.approx(record.arrays["step_time_S"][0])
    with pytest.raises(UserError, match="another run"):
        check_free(tmp_path / "run", force=False)
    write_run(record, tmp_path / "run", force=True)


def test_more_price_more_cost_but_no_more_time(small):
    cheap, dear = simulated(small()).result, simulated(small({"cluster.price_per_gpu_hour": 4.0})).result
    assert dear["step_time_s"] == cheap["step_time_s"]
    assert dear["cost"]["usd_per_step"] == pytest.approx(2 * cheap["cost"]["usd_per_step"])


def test_full_recomputation_dispatches_three_times(small):
    once = simulated(small()).result["communication"]
    again = simulated(small({"workload.recompute": "full"})).result
    assert again["communication"]["dispatch_bytes"] == pytest.approx(1.5 * once["dispatch_bytes"])
    assert again["attribution_s"]["recompute"] > 0
