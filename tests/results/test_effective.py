"""Dropping does less work: the figures by kept rows say how much of the work and of the price that is."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from moesim.parallel import TrafficSampler
from moesim.results import RunRecord
from moesim.results.metrics import MUCH_DROPPED, TrafficFacts, cost, dropping_warnings, effective, utilisation
from moesim.run import simulate
from moesim.scenario import Scenario
from moesim.trace.synthetic import uniform_trace

pytestmark = pytest.mark.usefixtures("few_tokens")


@cache
def simulated(scenario: Scenario) -> RunRecord:
    """Several tests ask for the same run."""
    return simulate(scenario)


def test_a_row_left_out_takes_its_flops_and_its_share_of_the_tokens_with_it(small):
    scenario, step_s = small(), 0.1
    model = scenario.model
    found = effective(scenario, kept_share=0.25, step_s=step_s)
    experts = 3 * 2 * model.moe_layers * model.top_k * 3 * model.hidden * model.expert_intermediate
    spent = utilisation(scenario, step_s)["causal"] - found["mfu_causal"]
    peak = 989.4e12  # bf16 FLOP/s of an H200
    flops = 0.75 * experts * scenario.tokens_per_step
    assert spent == pytest.approx(flops / (scenario.parallelism.world_size * peak * step_s), rel=1e-3)
    assert found["usd_per_million_tokens"] == pytest.approx(4 * cost(scenario, step_s)["usd_per_million_tokens"])


def test_where_nothing_is_dropped_both_figures_are_the_same(small):
    result = simulated(small({"routing": {"kind": "uniform"}})).result
    found = result["effective"]
    assert found["kept_share"] == 1.0
    assert found["mfu_causal"] == result["mfu"]["causal"]
    assert found["mfu_non_causal"] == result["mfu"]["non_causal"]
    assert found["usd_per_million_tokens"] == result["cost"]["usd_per_million_tokens"]
    assert not any("rows are not computed" in warning for warning in result["warnings"])


@pytest.mark.parametrize("pad", [False, True])
def test_dropping_looks_cheaper_but_a_kept_row_costs_more(small, pad):
    whole = simulated(small({"routing": {"kind": "uniform"}})).result
    half = simulated(
        small({"routing": {"kind": "uniform"}, "capacity": {"kind": "expert", "factor": 0.5, "pad": pad}})
    ).result
    assert half["effective"]["kept_share"] == pytest.approx(1 - half["dropped_share"], abs=1e-12)
    assert half["effective"]["kept_share"] == pytest.approx(0.5, abs=0.01)
    assert half["cost"]["usd_per_million_tokens"] < whole["cost"]["usd_per_million_tokens"]
    assert half["effective"]["usd_per_million_tokens"] > whole["effective"]["usd_per_million_tokens"]
    assert half["effective"]["mfu_causal"] < half["mfu"]["causal"]
    assert any("50% of the (token, expert) rows are not computed" in warning for warning in half["warnings"])


def test_a_router_that_chooses_fewer_rows_leaves_them_out_as_well(small):
    scenario = small({"routing": {"kind": "uniform"}})
    length = scenario.workload.sequence_length
    trace = uniform_trace(scenario.router_shape(), num_layers=1, num_sequences=8, sequence_length=length, seed=0)
    ids = trace.final.expert_ids_LSTK.copy()
    ids[..., -1] = -1  # of K = 4 experts of each token one is not chosen
    fewer = replace(trace, steps=(*trace.steps[:-1], replace(trace.final, expert_ids_LSTK=ids)))
    sample = TrafficSampler(scenario, fewer).draw(np.random.default_rng(0))
    facts = TrafficFacts(scenario, [sample])
    assert facts.dropped_share == 0.0
    assert facts.kept_share == pytest.approx(1 - 1 / scenario.model.top_k)


def test_a_run_warns_above_a_tenth_and_survives_dropping_everything(small):
    assert dropping_warnings({"kept_share": 1 - MUCH_DROPPED}) == []
    assert len(dropping_warnings({"kept_share": 1 - MUCH_DROPPED - 1e-6})) == 1
    nothing = effective(small(), kept_share=0.0, step_s=1.0)
    assert nothing["usd_per_million_tokens"] is None
    assert 0 < nothing["mfu_causal"] < utilisation(small(), 1.0)["causal"]
