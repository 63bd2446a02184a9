"""The clock of a step: what is simulated to find it, and that heavy steps run slower than light ones."""

from moesim.engine import step_kernels
from moesim.engine.step_clock import FEW_LAYERS, small_part, step_flops
from moesim.kernels import (
    CalibratedModel,
    Gemm,
    kernel_model,
)
from moesim.program.scenario_fabric import scenario_fabric
from moesim.run import draw_samples, obtain_trace
from moesim.scenario import Scenario, scenario_from_mapping

MODEL = {
    "layers": 12, "hidden": 1024, "heads": 8, "kv_heads": 8, "head_dim": 128, "experts": 16, "top_k": 2,
    "expert_intermediate": 2048, "vocab": 32000,
}  # fmt: skip
GEMM = {"m": 8192, "k": 8192, "n": 8192}


def scenario(tokens: int, *, pipeline: int = 1, gpu: str = "h200") -> Scenario:
    return scenario_from_mapping(
        {
            "schema_version": 1,
            "name": "clock",
            "model": MODEL,
            "routing": {"kind": "uniform"},
            "cluster": {"gpu": gpu, "nodes": 1, "gpus_per_node": 4 * pipeline},
            "parallelism": {"data": 4, "expert": 2, "pipeline": pipeline},
            "workload": {"kind": "training", "sequence_length": tokens, "global_batch": 16},
            "uncertainty": {"samples": 2},
        }
    )


def kernels_of(given: Scenario, profile: str | None = None) -> tuple[CalibratedModel, object]:
    kernels = kernel_model("h200", profile)
    samples, _ = draw_samples(given, obtain_trace(given), bootstrap=False)
    fabric = scenario_fabric(given, kernels)
    found = step_kernels(given, fabric=fabric, kernels=kernels, samples=samples)
    assert isinstance(kernels, CalibratedModel) == (profile is None)
    return found, kernels  # type: ignore[return-value]


def test_heavier_steps_run_at_lower_clocks() -> None:
    light, heavy = kernels_of(scenario(64))[0], kernels_of(scenario(8192))[0]
    assert light.seconds(Gemm(**GEMM)).seconds < heavy.seconds(Gemm(**GEMM)).seconds


def test_a_datasheet_has_no_clock() -> None:
    found, kernels = kernels_of(scenario(64), "roofline")
    assert found is kernels


def test_the_part_that_is_simulated_is_one_group_of_few_layers() -> None:
    whole = scenario(256, pipeline=2)
    part = small_part(whole)
    assert part.parallelism.world_size == 2 and part.parallelism.pipeline == 1
    assert part.model.layers == FEW_LAYERS < whole.model.layers
    assert part.num_micro_batches == whole.num_drawn_micro_batches
    kernels = kernel_model("h200")
    assert 0 < step_flops(part, kernels) < step_flops(whole, kernels) * 2
