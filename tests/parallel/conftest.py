"""Small scenarios and traces for the tests of plans and traffic."""

from collections.abc import Callable
from typing import Any

import pytest

from moesim.scenario import Scenario, scenario_from_mapping


@pytest.fixture
def make_scenario() -> Callable[..., Scenario]:
    """A small MoE scenario; keyword arguments replace whole sections or extend `model` and `parallelism`."""

    def make(*, model: dict[str, Any] | None = None, expert: int = 8, **sections: Any) -> Scenario:
        architecture = {
            "layers": 9, "hidden": 256, "heads": 4, "kv_heads": 4, "head_dim": 64, "dense_layers": 1,
            "dense_intermediate": 512, "experts": 32, "top_k": 4, "expert_intermediate": 128, "vocab": 512,
        }  # fmt: skip
        data = {
            "schema_version": 1,
            "name": "small",
            "model": architecture | (model or {}),
            "routing": {"kind": "uniform", "router": {"kind": "deepseek_v2", "groups": 8, "group_limit": 3}},
            "cluster": {"gpu": "h800", "nodes": 2, "gpus_per_node": 4},
            "parallelism": {"data": 8, "expert": expert},
            "workload": {"kind": "training", "sequence_length": 32, "micro_batch": 2, "global_batch": 48},
        }
        return scenario_from_mapping(data | sections)

    return make
