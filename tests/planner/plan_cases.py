"""A plan over few small layouts that is made in seconds."""

from typing import Any

from moesim.planner.plan import Plan, plan_from_mapping
from moesim.planner.screen import Screen
from moesim.run import obtain_trace

PLAN: dict[str, Any] = {
    "name": "small",
    "model": {
        "layers": 4,
        "hidden": 512,
        "heads": 8,
        "kv_heads": 8,
        "head_dim": 64,
        "dense_layers": 1,
        "dense_intermediate": 1024,
        "experts": 16,
        "top_k": 4,
        "shared_experts": 1,
        "expert_intermediate": 256,
        "vocab": 1000,
    },
    "goal": {
        "tokens": 1e11,
        "gpus": [
            {"gpu": "h100", "at_most": 8, "usd_per_gpu_hour": 3.0, "source": "a test", "gpus_per_node": 4},
            {"gpu": "h200", "at_most": 4, "usd_per_gpu_hour": 4.0, "source": "a test", "gpus_per_node": 4},
        ],
    },
    "workload": {"sequence_length": 1024, "global_batch": 32},
    "routing": {"kind": "popularity", "counts": [8, 1, 1, 1, 4, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1]},
    "choices": {
        "gpus": [4, 8],
        "pipeline": [1, 2],
        "expert": [1, 2, 4],
        "schedule": [{"kind": "1f1b"}, {"kind": "zb_h1"}],
        "micro_batch": [1, 2],
        "recompute": ["none", "full"],
    },
    "implementation": "fused",
    "compute": {"profile": "roofline"},
    "search": {"simulate": 4, "check": 4},
    "sensitivity": {"candidates": 1, "bandwidth": [0.5]},
}


def changed(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with dotted keys replaced."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in base.items()}
    for dotted, value in changes.items():
        section = result
        *path, last = dotted.split(".")
        for key in path:
            section = section.setdefault(key, {})
        section[last] = value
    return result


# For plans here that differ in their layouts, goal and search alone: what it has found it need not find again.
SCREEN = Screen(obtain_trace)


def build_plan(changes: dict[str, Any] | None = None) -> Plan:
    """The small plan with dotted keys replaced."""
    return plan_from_mapping(changed(PLAN, changes or {}))
