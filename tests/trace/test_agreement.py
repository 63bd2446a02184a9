"""A replayed trace keeps its own group limit; where that is not the model's, a reader is told."""

from typing import Any

import pytest

from moesim.scenario import RouterShape, Scenario
from moesim.trace import uniform_trace
from moesim.trace.provenance import limit_difference


def scenario_of(small: Any, tmp_path: Any, router: dict[str, Any] | None = None) -> Scenario:
    (tmp_path / "t.npz").write_bytes(b"")
    routing = {"kind": "trace", "file": str(tmp_path / "t.npz")} | ({"router": router} if router else {})
    scenario: Scenario = small({"routing": routing, "model.router_groups": 4, "model.router_group_limit": 2})
    return scenario


@pytest.mark.parametrize(
    ("groups", "limit", "told"), [(4, 2, None), (4, 1, "at most 1 of 4 groups"), (1, 1, "no group limit")]
)
def test_another_limit_than_the_models_is_told(small, tmp_path, groups: int, limit: int, told: str | None) -> None:
    router = RouterShape(kind="deepseek_v2", num_experts=16, top_k=4, num_groups=groups, group_limit=limit)
    trace = uniform_trace(router, num_layers=1, num_sequences=2, sequence_length=8, seed=0)
    found = limit_difference(trace, scenario_of(small, tmp_path))
    assert len(found) == (told is not None)
    assert all(told in text and "the model's own at most 2 of 4" in text for text in found)
    asked = {"kind": "deepseek_v2", "groups": 4, "group_limit": 1}
    assert limit_difference(trace, scenario_of(small, tmp_path, asked)) == []
    assert limit_difference(trace, small()) == []
