"""Do jobs on several kinds of GPU, and with ranks of unequal speed, keep the laws?"""

from functools import cache

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.results import RunRecord
from moesim.run import simulate
from moesim.scenario import Scenario, load_scenario_text
from moesim.scenario.pools import data_ranks_of_pools, pools_of_ranks, relative_speeds

pytestmark = pytest.mark.usefixtures("few_tokens")

MODEL = """
name: mixed
model: {hidden: 512, layers: 2, heads: 8, kv_heads: 8, head_dim: 64, attention: {kind: mha}, vocab: 4096, experts: 16,
        top_k: 2, expert_intermediate: 512, shared_experts: 1, dense_layers: 1, dense_intermediate: 2048}
workload: {sequence_length: 1024, global_batch: 24}
uncertainty: {samples: 2, bank: 2}
"""
ONE = "cluster: {{gpu: {gpu}, nodes: 4, gpus_per_node: 2}}\n"
TWO = """cluster: {{pools: [{{name: a, gpu: {a}, nodes: 2, gpus_per_node: 2}}, {{name: b, gpu: {b}, nodes: 2,
  gpus_per_node: 2}}]}}
"""
AXES = {
    "data": "parallelism: {data: 8, expert: 4, across_pools: data}\n",
    "expert": "parallelism: {data: 8, expert: 4, across_pools: expert}\n",
    "pipeline": "parallelism: {data: 4, pipeline: 2, expert: 4, across_pools: pipeline}\n",
    "data of stages": "parallelism: {data: 4, pipeline: 2, expert: 2, across_pools: data}\n",
}


def scenario(text: str, *overrides: str) -> Scenario:
    return load_scenario_text(MODEL + text, overrides=overrides)


def mixed(axis: str, first: str, second: str, *overrides: str) -> Scenario:
    return scenario(TWO.format(a=first, b=second) + AXES[axis], *overrides)


def alone(axis: str, gpu: str) -> Scenario:
    layout = ONE.format(gpu=gpu) + AXES[axis]
    return scenario(layout.replace(f", across_pools: {axis.split()[0]}", ""))


@cache
def simulated_alone(axis: str, gpu: str) -> RunRecord:
    """Several tests compare with it."""
    return simulate(alone(axis, gpu))


@pytest.mark.parametrize("axis", AXES)
def test_two_equal_pools_are_one(axis: str) -> None:
    two, one = simulate(mixed(axis, "h100", "h100")), simulated_alone(axis, "h100")
    for key in ("step_time_s", "attribution_s", "mfu", "cost", "estimate_sources", "communication", "waiting"):
        assert two.result[key] == one.result[key]
    for name, values in two.arrays.items():
        assert np.array_equal(values, one.arrays[name])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("order", [("a100", "h100"), ("h100", "a100")])
def test_between_all_of_the_faster_and_all_of_the_slower(axis: str, order: tuple[str, str]) -> None:
    slow, fast = (simulated_alone(axis, gpu).result["step_time_s"] for gpu in ("a100", "h100"))
    both = simulate(mixed(axis, *order)).result
    assert fast < both["step_time_s"] <= slow * (1 + 1e-12)
    assert sum(pool["usd_per_step"] for pool in both["pools"]) == pytest.approx(both["cost"]["usd_per_step"])
    computed = {gpu: pool["compute_s"] for gpu, pool in zip(order, both["pools"], strict=True)}
    if axis != "pipeline":  # whose faster ranks have more layers
        assert computed["a100"] > 1.2 * computed["h100"]


def test_a_share_by_speed_is_between_and_helps() -> None:
    even = simulate(mixed("data", "a100", "h100", "workload.global_batch=120"))
    given = mixed("data", "a100", "h100", "workload.global_batch=120", "parallelism.batch_share=by_speed")
    share = simulate(given)
    batches, ranks = given.micro_batches_of_pools, data_ranks_of_pools(given)
    assert sum(n * count for n, count in zip(batches, ranks, strict=True)) == 120
    speeds = relative_speeds(given)
    longest = max(n / speed for n, speed in zip(batches, speeds, strict=True))
    for moved in (-1, 1):  # as many ranks on both: what one takes less the other takes more
        others = batches[0] + moved, batches[1] - moved
        assert max(n / speed for n, speed in zip(others, speeds, strict=True)) >= longest
    assert share.result["step_time_s"] < even.result["step_time_s"]
    listed = given.model_copy(update={"parallelism": given.parallelism.model_copy(update={"batch_share": batches})})
    assert simulate(listed).result["step_time_s"] == share.result["step_time_s"]
    assert share.result["communication"]["copies_per_token"] == pytest.approx(
        even.result["communication"]["copies_per_token"], rel=0.01
    )


def test_pools_are_dealt_out_as_said() -> None:
    half = (0, 0, 1, 1)
    given = {axis: mixed(axis, "h100", "h200") for axis in AXES}
    found = {axis: pools_of_ranks(each.cluster, each.parallelism) for axis, each in given.items()}
    assert found["expert"] == half * 2
    assert found["data of stages"] == half * 2
    assert found["data"] == found["pipeline"] == (0,) * 4 + (1,) * 4


def test_memory_of_each_pool() -> None:
    record = simulate(mixed("data", "a100", "h200"))
    pools = record.result["pools"]
    assert [pool["capacity_bytes"] for pool in pools] == [p.spec.memory_bytes for p in record.scenario.cluster.pools]
    assert pools[0]["peak_bytes"] == pytest.approx(pools[1]["peak_bytes"], rel=0.05)  # but for the rows of ranks
    fullest = max(pools, key=lambda pool: pool["peak_bytes"] / pool["capacity_bytes"])
    assert record.result["memory"]["peak_bytes"] == fullest["peak_bytes"]
    assert record.result["memory"]["capacity_bytes_by_pipeline_rank"] == [fullest["capacity_bytes"]]


def test_a_slow_rank_slows_all_who_wait_for_it() -> None:
    layout = ONE.format(gpu="h100") + "parallelism: {data: 8, expert: 8}\n"
    slow = scenario(layout, "cluster.speeds={ranks: [{rank: 3, factor: 0.5}]}")
    first, second = simulate(scenario(layout)), simulate(slow)
    assert second.result["step_time_s"] > first.result["step_time_s"]
    ratio_W = second.arrays["compute_time_W"] / first.arrays["compute_time_W"]
    others_W = np.arange(8) != 3
    assert ratio_W[3] == pytest.approx(2.0, rel=0.02)  # kernels beside transfers lose as long as before
    assert ratio_W[others_W] == pytest.approx(1.0, rel=0.02)
    assert second.result["waiting"]["waited_for"][0]["rank"] == 3
    assert {pair["waits_for"] for pair in second.result["waiting"]["pairs"]} == {3}
    assert second.result["pools"][0]["slowest_speed"] == 0.5


def test_drawn_speeds_follow_the_seed_and_the_spread() -> None:
    given = alone("data", "h100")
    speeds = given.cluster.speeds.model_copy(update={"spread": 0.07})
    drawn = [speeds.of_ranks(2048, seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    assert drawn[0].std() == pytest.approx(0.07, rel=0.05)
    apart = np.abs(np.subtract.outer(drawn[0], drawn[0])).mean()
    assert apart == pytest.approx(0.08, rel=0.05)  # what Sinha et al. found between GPUs of a kind
    assert given.cluster.speeds.of_ranks(8, seed=0) is None


def test_all_ranks_at_half_speed_compute_twice_as_long() -> None:
    record = simulate(replace_speeds(alone("data", "h100"), 0.5))
    plain = simulated_alone("data", "h100")
    assert record.result["pools"][0]["compute_s"] == pytest.approx(2 * plain.result["pools"][0]["compute_s"], rel=0.03)


def replace_speeds(given: Scenario, factor: float) -> Scenario:
    speeds = given.cluster.speeds.model_copy(update={"factors": (factor,) * 8})
    return given.model_copy(update={"cluster": given.cluster.model_copy(update={"speeds": speeds})})


@pytest.mark.parametrize(
    ("axis", "override", "told"),
    [
        ("data", "parallelism.across_pools=tensor", "tensor"),
        ("pipeline", "parallelism.pipeline=1", "multiples of|crosses no pool"),
        ("data of stages", "cluster.pools.0.nodes=3", "does? not divide|as many nodes"),
        ("data", "parallelism.batch_share=[1, 2, 3]", "one per pool"),
        ("data", "parallelism.batch_share=[1, 2]", "make them equal"),
        ("expert", "parallelism.batch_share=by_speed", "across_pools: data"),
        ("data", "cluster.speeds={ranks: [{rank: 8, factor: 0.5}]}", "rank 8 of ranks 0 to 7"),
        ("data", "cluster.speeds={ranks: [{rank: 1, factor: 0}]}", "factor"),
        ("data", "cluster.speeds={ranks: [{rank: 1, factor: -1.0}]}", "factor"),
        ("data", "cluster.speeds={factors: [1.0, 0.5]}", "2 factors for 8 ranks"),
    ],
)
def test_a_mistake_is_told_in_one_line(axis: str, override: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        mixed(axis, "h100", "h200", override)
    assert "\n" not in str(error.value)
