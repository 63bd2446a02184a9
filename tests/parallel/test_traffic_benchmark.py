"""CPU time from a loaded trace to traffic matrices (run with -m benchmark -s)."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moesim.parallel import TrafficSampler
from moesim.parallel.counts import device_keep_mask, ranks_of_rows
from moesim.parallel.traffic import stage_copies
from moesim.scenario import load_scenario, scenario_from_mapping
from moesim.seeding import stream
from moesim.trace import load_trace, save_trace, uniform_trace

SCENARIOS = Path(__file__).parent.parent.parent / "scenarios"


def cpu_seconds(work: Callable[[], object], *, label: str, repeats: int = 3) -> float:
    """Least process CPU time of some runs, printed."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    print(f"{label}: {1e3 * min(times):.1f} ms CPU")
    return min(times)


@pytest.mark.benchmark
def test_quickstart_samples() -> None:
    scenario = load_scenario(SCENARIOS / "quickstart.yaml")
    trace = uniform_trace(scenario.router_shape(), num_layers=2, num_sequences=128, sequence_length=512, seed=0)

    def sixteen_samples() -> None:
        sampler = TrafficSampler(scenario, trace)
        for index in range(16):
            sample = sampler.draw(stream(0, "benchmark", index), bootstrap=True)
            for layer in range(scenario.model.moe_layers):
                sample.arrays(0, layer)

    assert cpu_seconds(sixteen_samples, label="quickstart, 16 samples with device capacity") < 2.5


@pytest.mark.benchmark
def test_step_of_61_layers_on_64_ranks(tmp_path: Path) -> None:
    scenario = scenario_from_mapping(
        {
            "schema_version": 1,
            "name": "v3",
            "model": {"preset": "deepseek-v3"},
            "routing": {"kind": "uniform", "router": {"kind": "deepseek_v3", "groups": 8, "group_limit": 4}},
            "cluster": {"gpu": "h800", "nodes": 8, "gpus_per_node": 8},
            "parallelism": {"data": 64, "expert": 64},
            "workload": {"kind": "training", "sequence_length": 4096, "global_batch": 64},
        }
    )
    trace = uniform_trace(scenario.router_shape(), num_layers=4, num_sequences=64, sequence_length=4096, seed=0)
    save_trace(trace, tmp_path / "v3.trace")
    cpu_seconds(lambda: load_trace(tmp_path / "v3.trace"), label="load 4 layers of 262,144 tokens")

    def step() -> None:
        sample = TrafficSampler(scenario, trace).draw(stream(0, "benchmark"))
        for layer in range(scenario.model.moe_layers):
            stage_copies(sample.arrays(0, layer), sample.placement, "per_node")

    assert cpu_seconds(step, label="61-layer step on 64 ranks, matrices of two stages") < 1.5


@pytest.mark.benchmark
@pytest.mark.parametrize(("ranks", "top_k", "experts", "budget"), [(8, 6, 64, 0.010), (64, 8, 256, 0.120)])
def test_device_capacity(ranks: int, top_k: int, experts: int, budget: float) -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(-rng.random((ranks, 4096, experts), dtype=np.float32), axis=-1)[..., :top_k].astype(np.int16)
    rows = ranks_of_rows(ids, rank_of_expert_E=np.arange(experts) * ranks // experts, num_ranks=ranks)
    affinities = rng.random(ids.shape, dtype=np.float32)
    protected = np.arange(ranks) % 10 == 0

    def drop() -> None:
        device_keep_mask(rows, affinities, protected_S=protected, num_ranks=ranks, factor=1.0)

    assert cpu_seconds(drop, label=f"device capacity, {ranks} x 4096 x {top_k} rows", repeats=7) < budget
