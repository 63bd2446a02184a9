"""The routing that layouts are screened with."""

import pytest
from plan_cases import build_plan

from moesim.planner.search import Traces
from moesim.planner.space import Discarded, Space
from moesim.trace import trace_hash


@pytest.mark.parametrize("length", [1024, 131_072])
def test_a_trace_does_not_depend_on_what_was_asked_for_before(length):
    plan = build_plan({"workload.sequence_length": length, "compute.profile": "roofline"})
    space, scenarios = Space.of(plan), []
    for layout in space.layouts():
        try:
            scenarios.append(space.scenario(layout))
        except Discarded:
            continue
    chosen = [scenarios[0], scenarios[-1], scenarios[len(scenarios) // 2]]
    forwards, backwards = Traces(None), Traces(None)
    first = [trace_hash(forwards.of(scenario)) for scenario in chosen]
    again = [trace_hash(backwards.of(scenario)) for scenario in reversed(chosen)][::-1]
    assert first == again
    part = chosen[0].model_copy(update={"workload": chosen[0].workload.model_copy(update={"global_batch": 1})})
    assert trace_hash(Traces(None).of(part)) == first[0], "a part of a layout's step is screened with its routing"
