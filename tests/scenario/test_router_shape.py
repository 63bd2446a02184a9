from dataclasses import replace
from pathlib import Path

import pytest

from moesim.errors import UserError
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


GROUPS = ("model.router_groups=8", "model.router_group_limit=4")


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        ("", (8, 4)),
        ("{kind: deepseek_v3}", (8, 4)),
        ("{kind: deepseek_v3, group_limit: 2}", (8, 2)),
        ("{kind: deepseek_v2, groups: 4, group_limit: 2}", (4, 2)),
        ("{kind: deepseek_v2, device_limit: 3}", (8, 3)),
        ("{kind: deepseek_v3, groups: 1, group_limit: 1}", (1, 1)),
        ("{kind: deepseek_moe}", (1, 1)),
    ],
)
def test_the_models_groups_hold_where_routing_names_no_others(router, expected):
    routing = f"routing={{kind: uniform{', router: ' + router if router else ''}}}"
    found = shape(routing, *GROUPS)
    assert (found.num_groups, found.group_limit) == expected


def test_a_trace_brings_its_own_groups_whatever_the_model_has(tmp_path):
    (tmp_path / "t.npz").write_bytes(b"")
    assert shape(f"routing={{kind: trace, file: {tmp_path / 't.npz'}}}", *GROUPS).num_groups == 1


def test_presets_have_the_groups_of_their_papers():
    for name, expected in (("deepseek-v2", (8, 3)), ("deepseek-v3", (8, 4)), ("deepseek-v2-lite", (1, 1))):
        found = shape(f"model={{preset: {name}}}", "routing={kind: uniform}")
        assert (found.num_groups, found.group_limit) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.router_groups=7"], "model.router_groups: 7 does not divide experts = 64; use 4 or 8"),
        (
            ["model.router_groups=8", "model.router_group_limit=9"],
            "group_limit: 9 is more than groups = 8",
        ),
        (["model.router_groups=32", "model.router_group_limit=2"], "2 groups of 2 experts hold fewer than top_k = 6"),
        (["routing.router={kind: deepseek_v3, group_limit: 2}"], "routing.router.group_limit: needs groups beside it"),
        ([*GROUPS, "routing.router={kind: deepseek_v3, groups: 8}"], "routing.router.groups: needs group_limit"),
    ],
)
def test_groups_that_do_not_fit_are_refused_at_their_key(overrides, message):
    with pytest.raises(UserError) as error:
        shape("routing={kind: uniform}", *overrides)
    assert message in str(error.value)


def test_groups_that_do_not_divide_the_experts_are_refused_under_any_software(small) -> None:
    changes = {"implementation": {"kind": "torch_eager"}, "parallelism": {"data": 1, "expert": 1}}
    changes |= {"model.experts": 1, "model.top_k": 1, "workload.global_batch": 2}
    changes["routing"] = {"kind": "uniform", "router": {"kind": "deepseek_v3", "groups": 2, "group_limit": 1}}
    with pytest.raises(UserError, match="2 does not divide experts = 1"):
        small(changes)
