"""A plan whose routing is stated as a balancedness: each layout has it on its own ranks, or falls out."""

import numpy as np
import pytest
from plan_cases import build_plan

from moesim.planner.search import Traces
from moesim.planner.space import Discarded, Space
from moesim.scenario import Scenario

ROUTING = {"kind": "balancedness", "value": 0.4}


def layouts() -> tuple[list[Scenario], list[Discarded]]:
    space = Space.of(build_plan({"routing": ROUTING, "choices.pipeline": [1], "choices.micro_batch": [1]}))
    fitting, refused = [], []
    for layout in space.layouts():
        try:
            fitting.append(space.scenario(layout))
        except Discarded as reason:
            refused.append(reason)
    return fitting, refused


def test_layouts_that_cannot_reach_the_value_fall_out_by_its_key() -> None:
    fitting, refused = layouts()
    assert {scenario.parallelism.expert for scenario in fitting} == {4}  # 2 ranks are never below 0.5, 1 always at 1
    assert any("routing.value" in str(reason) for reason in refused)


def test_each_layout_is_screened_with_the_routing_of_its_own_ranks() -> None:
    fitting, _ = layouts()
    traces = Traces(None)
    for scenario in fitting[:4]:
        for ids_STK in traces.of(scenario).final.expert_ids_LSTK:
            ranks = ids_STK.reshape(-1) // (scenario.model.experts // scenario.parallelism.expert)
            rows_D = np.bincount(ranks, minlength=scenario.parallelism.expert)
            assert rows_D.mean() / rows_D.max() == pytest.approx(0.4, rel=0.01)
