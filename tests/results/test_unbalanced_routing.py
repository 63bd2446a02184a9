"""A router that was not balanced is said to be so: its imbalance is no property of the model."""

import pytest

from moesim.results.metrics import FAR_ABOVE_UNIFORM, balance_warnings
from moesim.trace.metrics import imbalance
from moesim.trace.synthetic import popularity_trace, uniform_trace

EXPERTS = 64


def scenario_of(small, routing):
    return small({"routing": routing, "model.experts": EXPERTS})


def trace_of(scenario, hottest):
    """Experts of which one is `hottest` times as popular as the others."""
    size = {"num_layers": 1, "num_sequences": 16, "sequence_length": 1024, "seed": 0}
    if hottest == 1:
        return uniform_trace(scenario.router_shape(), **size)
    return popularity_trace(scenario.router_shape(), counts=[hottest] + [1] * (EXPERTS - 1), **size)


def train(kind="topk_softmax", **balance):
    return {"kind": "train", "router": {"kind": kind}} | ({"balance": balance} if balance else {})


@pytest.mark.parametrize("balance", [{}, {"expert": 0.0}, {"loss_free": {"gamma": 0.0}}])
def test_a_router_trained_without_balance_is_named_with_its_imbalance(small, balance):
    scenario = scenario_of(small, train(**balance))
    trace = trace_of(scenario, 8)
    ratio = imbalance(trace.final_load_LE).mean()
    (warning,) = balance_warnings(scenario, trace)
    assert "without a balance loss or bias" in warning
    assert f"{ratio:.1f} times the mean rows" in warning
    assert "routing.balance: {expert: 0.01}" in warning
    assert len(balance_warnings(scenario, trace_of(scenario, 1))) == 1  # whatever came of it this time


@pytest.mark.parametrize(
    "routing",
    [
        train(expert=0.01),
        train(sequence=1e-4),
        train("deepseek_v3", loss_free={"gamma": 0.001}),
        train("hash"),
        train("expert_choice"),
        {"kind": "uniform"},
        {"kind": "popularity", "counts": [1] * EXPERTS},
    ],
)
def test_balanced_routing_is_not_warned_of_until_it_is_far_from_uniform(small, routing):
    scenario = scenario_of(small, routing)
    assert balance_warnings(scenario, trace_of(scenario, 1)) == []
    assert balance_warnings(scenario, trace_of(scenario, FAR_ABOVE_UNIFORM - 1)) == []
    (warning,) = balance_warnings(scenario, trace_of(scenario, 3 * FAR_ABOVE_UNIFORM))
    assert "far from balanced" in warning


def test_few_experts_are_far_from_balanced_sooner(small):
    """Of 16 experts, top 4, none can get more than four times the mean."""
    scenario = small({"routing": {"kind": "uniform"}})
    size = {"num_layers": 1, "num_sequences": 16, "sequence_length": 1024, "seed": 0}
    trace = popularity_trace(scenario.router_shape(), counts=[12, 12, 12, 12] + [1] * 12, **size)
    assert imbalance(trace.final_load_LE).max() < 4
    assert len(balance_warnings(scenario, trace)) == 1
