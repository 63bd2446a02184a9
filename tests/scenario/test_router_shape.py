from dataclasses import replace
from pathlib import Path

import pytest

from moesim.scenario import RouterShape, load_scenario

QUICKSTART = Path(__file__).parents[2] / "scenarios" / "quickstart.yaml"
PLAIN = RouterShape(kind="deepseek_moe", num_experts=64, top_k=6, num_devices=8)


def shape(*overrides):
    return load_scenario(QUICKSTART, overrides).router_shape()


def test_a_device_limit_is_short_for_groups_equal_to_ranks():
    named = shape("routing.router={kind: deepseek_v2, groups: 8, group_limit: 3}")
    assert shape() == named
    assert (named.num_groups, named.group_limit, named.num_devices) == (8, 3, 8)
    assert shape("parallelism.expert=4").num_groups == 4


def test_a_router_without_limit_has_one_group():
    assert shape("routing.router={kind: deepseek_moe}") == PLAIN
    assert shape("routing.router={kind: deepseek_v2}") == replace(PLAIN, kind="deepseek_v2")


@pytest.mark.parametrize("kind", ["popularity", "uniform"])
def test_synthetic_routing_takes_groups_and_limit_from_its_router(kind):
    counts = ", counts: [" + ", ".join(["1"] * 64) + "]" if kind == "popularity" else ""
    routing = f"routing={{kind: {kind}, router: {{kind: deepseek_v2, device_limit: 3}}{counts}}}"
    assert shape(routing) == replace(PLAIN, kind=kind, num_groups=8, group_limit=3)


def test_a_recorded_trace_brings_its_own_router(tmp_path):
    (tmp_path / "t.npz").write_bytes(b"")
    assert shape(f"routing={{kind: trace, file: {tmp_path / 't.npz'}}}") == replace(PLAIN, kind="trace")


def test_settings_of_single_routers_arrive():
    gshard = shape("routing.router={kind: gshard, random_second: true}", "model.top_k=2")
    assert gshard.random_second
    choice = shape("routing.router={kind: expert_choice, capacity_factor: 2.0}", "capacity={kind: none}")
    assert choice.capacity_factor == 2.0
    assert shape("model.routed_scaling_factor=16").routed_scaling_factor == 16.0
