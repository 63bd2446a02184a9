"""What imbalance costs: never less than nothing, and no luck with the tiles of kernels."""

import numpy as np
import pytest

from moesim.run import simulate
from moesim.scenario import scenario_from_mapping

NOISE = 0.01  # of the step: how far kernels' durations follow rows that end elsewhere in a tile
GROUPS = {1: (1, 1), 2: (2, 2), 4: (4, 4), 8: (8, 4)}  # GPUs: data-parallel ranks, expert-parallel ranks


def step(
    *, tokens=2048, gpus=1, gpu="h200", experts=16, top_k=4, counts=None, micro_batches=2, jitter=True, **sections
):
    data, expert = GROUPS[gpus]
    routing = {"kind": "uniform"} if counts is None else {"kind": "popularity", "counts": counts}
    return simulate(
        scenario_from_mapping(
            {
                "schema_version": 1,
                "name": "imbalance",
                "model": {
                    "layers": 3, "hidden": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128, "dense_layers": 1,
                    "dense_intermediate": 4096, "experts": experts, "top_k": top_k, "shared_experts": 1,
                    "expert_intermediate": 1408, "vocab": 1000,
                },
                "routing": routing,
                "cluster": {"gpu": gpu, "nodes": 1, "gpus_per_node": gpus, "jitter": jitter},
                "parallelism": {"data": data, "expert": expert},
                "workload": {"sequence_length": tokens, "global_batch": data * micro_batches},
                "uncertainty": {"samples": 2, "bank": 2},
                **sections,
            }
        )
    ).result  # fmt: skip


def cost_share(result):
    return result["imbalance"]["cost_s"] / result["step_time_s"]


@pytest.mark.parametrize("mean_rows", [24, 140, 256, 281, 530, 1100])
def test_uniform_routing_on_one_gpu_costs_nothing_wherever_rows_end_in_a_tile(mean_rows):
    """Rows of 256 are computed together: equal rows of 281 would cost a third more than uneven ones, of 256 less."""
    assert 0 <= cost_share(step(tokens=4 * mean_rows)) < NOISE


def random_step(seed):
    """A step of random size, skew, layout and software."""
    rng = np.random.default_rng(seed)
    experts = int(rng.choice([8, 16, 64]))
    skew = rng.dirichlet(np.full(experts, rng.choice([0.05, 0.3, 1.0, 10.0])))
    capacity = [
        {"kind": "none"},
        {"kind": "device", "factor": 1.0},
        {"kind": "expert", "factor": 1.25},
        {"kind": "expert", "factor": 1.0, "pad": True},
    ]
    return step(
        tokens=int(rng.integers(16, 700)) * 4,
        gpus=int(rng.choice(list(GROUPS))),
        gpu=str(rng.choice(["h200", "h100", "a100"])),
        experts=experts,
        top_k=int(rng.choice([1, 2, 6])),
        counts=(skew + 1e-3).tolist(),
        micro_batches=int(rng.integers(1, 4)),
        jitter=False,  # ranks with equal loads wait more for each other's chance than for one that is slowest anyway
        capacity=capacity[rng.integers(len(capacity))],
        implementation={"kind": str(rng.choice(["fused", "torch_eager"]))},
        dispatch={"deduplicate": str(rng.choice(["per_expert", "per_rank"]))},
    )


@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, 150), marks=pytest.mark.slow)])
def test_imbalance_never_costs_less_than_nothing(seeds):
    shares = {seed: cost_share(random_step(seed)) for seed in seeds}
    assert min(shares.values()) >= -1e-8, min(shares, key=shares.get)
    assert max(shares.values()) > 0.02


def test_more_skew_costs_more():
    mild, strong = (step(gpus=4, counts=[top, top] + [1] * 14) for top in (2, 8))
    even = step(gpus=4)
    assert cost_share(even) < 0.5 * cost_share(mild)
    assert cost_share(mild) < 0.5 * cost_share(strong)


def test_busy_experts_cost_a_little_on_one_gpu_too():
    """Their tiles come one behind the other, and cold experts fill few of theirs."""
    skewed = step(tokens=4096, experts=64, top_k=6, counts=[40] * 4 + [1] * 60)
    assert skewed["imbalance"]["expert"] > 5
    assert NOISE / 10 < cost_share(skewed) < 0.1


def test_the_counterfactual_waits_for_nobody_and_computes_no_longer():
    still = {"gpu": "h200", "nodes": 1, "gpus_per_node": 4, "jitter": False}  # chips and hosts alike
    result = step(gpus=4, counts=[8, 8] + [1] * 14, cluster=still)
    real, even = result["attribution_s"], result["attribution_balanced_s"]
    assert even["imbalance_wait"] < 1e-9 < real["imbalance_wait"]
    assert even["experts"] <= real["experts"]
    assert result["balanced_step_time_s"] == pytest.approx(sum(even.values()))
