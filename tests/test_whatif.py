"""What-ifs: the same step again with one thing changed."""

import pytest

from moesim.results import RunRecord
from moesim.run import mean_step_seconds, simulate
from moesim.whatif import LABELS, what_if

pytestmark = pytest.mark.usefixtures("few_tokens")

FAR = {  # two nodes, so that the network matters
    "cluster": {"gpu": "h200", "nodes": 2, "gpus_per_node": 2, "price_per_gpu_hour": 2.0},
    "routing": {"kind": "uniform", "router": {"kind": "deepseek_v3", "groups": 4, "group_limit": 1}},
    "dispatch": {"deduplicate": "per_rank"},
}


def answers(record: RunRecord, **more: object) -> dict[str, dict]:
    return {entry["name"]: entry for entry in what_if(record, **more).result["what_if"]}


def test_every_question_is_answered_by_another_simulation(small) -> None:
    record = simulate(small(FAR))
    found, step_s = answers(record), record.result["step_time_s"]
    assert list(found) == list(LABELS)
    assert found["balanced_routing"]["step_time_s"] == record.result["balanced_step_time_s"]
    assert found["double_bandwidth"]["difference_s"] < -0.01 * step_s
    assert found["no_overlap"]["difference_s"] > 0
    assert found["no_group_limit"]["difference_s"] > 0.01 * step_s, "tokens travel to more ranks"
    for entry in found.values():
        assert entry["difference_s"] == entry["step_time_s"] - step_s
        price = record.result["cost"]["usd_per_million_tokens"] * entry["step_time_s"] / step_s
        assert entry["usd_per_million_tokens"] == pytest.approx(price, rel=1e-12)


def test_the_unchanged_step_gives_the_unchanged_time(small) -> None:
    """The yardstick of every difference: what-ifs draw the same samples as the run."""
    record = simulate(small(FAR))
    assert mean_step_seconds(record.scenario, record.trace) == pytest.approx(record.result["step_time_s"], rel=1e-12)


# Durations of kernels asked for in batches of another shape: sums of the processor's linear algebra round differently,
# which the Gaussian process behind them magnifies.
ROUNDING = 1e-7
LINKS = [{"source": f"gpu{rank}", "target": "switch", "bandwidth": "50 GB/s", "latency": "3 us"} for rank in range(4)]
FAST_LINKS = [link | {"bandwidth": "100 GB/s"} for link in LINKS]
FABRICS = {  # and the same with links twice as fast; gpu h200: 450 GB/s of NVLink per direction, 50 GB/s of network
    "a slow network": ({"nic": "100 Gbps"}, {"nvlink": "900 GB/s", "nic": "200 Gbps"}),
    "shared uplinks": (
        {"preset": "leaf_spine", "pod_nodes": 1, "oversubscription": 2.0},
        {"preset": "leaf_spine", "pod_nodes": 1, "oversubscription": 2.0, "nvlink": "900 GB/s", "nic": "100 GB/s"},
    ),
    "custom links": ({"preset": "custom", "links": LINKS}, {"preset": "custom", "links": FAST_LINKS}),
}


@pytest.mark.parametrize("name", FABRICS)
@pytest.mark.parametrize("model", ["ports", pytest.param("fluid", marks=pytest.mark.slow)])
def test_the_faster_network_is_the_scenario_with_faster_links(small, name, model) -> None:
    """Measured kernels: the clock under the power limit is found by a step of its own, on the same links."""
    slow, fast = FABRICS[name]
    common = FAR | {"compute": {}, "network": {"model": model}}
    record = simulate(small(common | {"cluster.fabric": slow}))
    changed = simulate(small(common | {"cluster.fabric": fast}))
    assert changed.result["step_time_s"] < record.result["step_time_s"]
    assert answers(record)["double_bandwidth"]["step_time_s"] == pytest.approx(
        changed.result["step_time_s"], rel=ROUNDING
    )


def test_every_answer_is_the_run_of_the_changed_scenario(small) -> None:
    settings = FAR | {"compute": {}}
    found = answers(simulate(small(settings)))
    nothing = {"shared_experts": False, "micro_batches": False, "gradient_reduction": False}
    for name, change in {
        "double_bandwidth": {"cluster.fabric": {"bandwidth_factor": 2.0}},
        "no_overlap": {"overlap": nothing},
        "no_group_limit": {"routing": {"kind": "uniform"}},
    }.items():
        step_s = simulate(small(settings | change)).result["step_time_s"]
        assert found[name]["step_time_s"] == pytest.approx(step_s, rel=ROUNDING), name


def test_what_does_not_apply_says_why(small) -> None:
    found = answers(simulate(small({"implementation": {"kind": "torch_eager"}})))
    assert found["no_overlap"]["step_time_s"] is None
    assert "overlaps nothing" in found["no_overlap"]["note"]
    assert "no group limit" in found["no_group_limit"]["note"]


TRAINED = {
    "model.layers": 2,
    "routing": {
        "kind": "train",
        "router": {"kind": "deepseek_v2", "device_limit": 1},
        "steps": 2,
        "tokens": 16384,
        "thin": {
            "layers": 1,
            "hidden": 16,
            "heads": 2,
            "expert_intermediate": 8,
            "context": 64,
            "tokens_per_step": 128,
        },
    },
}


def test_another_router_is_trained_only_when_asked(small, tmp_path) -> None:
    record = simulate(small(TRAINED), cache_dir=tmp_path)
    assert "--what-if=all" in answers(record, cache_dir=tmp_path)["no_group_limit"]["note"]
    steps: list[int] = []
    found = answers(record, train=True, cache_dir=tmp_path, progress=lambda report: steps.append(report.step))
    assert found["no_group_limit"]["step_time_s"] > 0
    assert steps == [1, 2]
