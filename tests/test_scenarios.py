"""Every scenario file runs: with one routing sample and few micro-batches here, as it stands in the acceptance run."""

from pathlib import Path

import pytest

from moesim.run import simulate
from moesim.scenario import load_scenario

FILES = sorted((Path(__file__).parent.parent / "scenarios").glob("*.yaml"))
LARGE = 32  # GPUs; the steps of more take longer than a quick test may


def _parameters() -> list:
    scenarios = [(file, load_scenario(file)) for file in FILES]
    return [
        pytest.param(file, id=file.stem, marks=[pytest.mark.slow] if scenario.cluster.num_gpus > LARGE else [])
        for file, scenario in scenarios
    ]


@pytest.mark.usefixtures("few_tokens")
@pytest.mark.parametrize("file", _parameters())
def test_scenario_runs(file, tmp_path):
    scenario = load_scenario(file)
    mesh, work = scenario.parallelism, scenario.workload
    micro_batches = min(scenario.num_micro_batches, 2 * mesh.pipeline if mesh.pipeline > 1 else 1)
    overrides = ["uncertainty.samples=1", f"workload.global_batch={mesh.data * work.micro_batch * micro_batches}"]
    if scenario.routing.kind == "train":
        overrides += ["routing.steps=2", "routing.thin.tokens_per_step=512", "routing.thin.layers=1"]
        overrides += ["routing.thin.hidden=32", "routing.thin.heads=2", "routing.thin.expert_intermediate=8"]
    result = simulate(load_scenario(file, overrides), cache_dir=tmp_path).result
    assert result["step_time_s"] > 0
    assert 0 < result["mfu"]["causal"] < 1
    assert sum(result["attribution_s"].values()) == pytest.approx(result["step_time_s"], rel=1e-9)


@pytest.mark.parametrize("model", ["fluid", "exact"])
def test_all_models_of_the_network_agree_on_a_small_step(small, model):
    ports = simulate(small()).result["step_time_s"]
    other = simulate(small({"network.model": model})).result["step_time_s"]
    assert other == pytest.approx(ports, rel=0.02)
