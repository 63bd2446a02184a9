"""What was measured is asked for: every family and direction of a shipped profile is reached from some step."""

from typing import Any

import numpy as np
import pytest

from moesim.kernels import (
    Attention,
    CalibratedModel,
    Gemm,
    GroupedGemm,
    Kernel,
    MemoryBound,
    kernel_model,
    load_profile,
)
from moesim.kernels.families import ATTENTION_DIRECTIONS, GEMM_DIRECTIONS, MEMORY_KINDS
from moesim.network import build_fabric
from moesim.program import build_program
from moesim.run import draw_samples, obtain_trace

EAGER = {"implementation.kind": "torch_eager", "dispatch.deduplicate": "per_expert", "workload.recompute": "none"}
STEPS: dict[str, dict[str, Any]] = {
    "fused": {},
    "fused, FP8": {"workload.precision": {"gemm": "fp8"}, "dispatch.dtype": "fp8"},
    "fused, one scale": {"workload.precision": {"gemm": "fp8", "recipe": "per_tensor"}, "dispatch.dtype": "fp8"},
    "eager": {**EAGER, "workload.precision": {"optimizer": "bf16", "master": "none"}},
    "eager, grouped queries": {**EAGER, "model.attention": {"kind": "gqa"}, "model.kv_heads": 2},
    "eager, few rows, one GPU": {**EAGER, "parallelism": {"data": 4, "expert": 1}, "workload.sequence_length": 64},
}
# Measured for predictions of single kernels: software has other kernels for the same work, or several.
ONLY_ALONE = {
    "cross_entropy", "cross_entropy_backward", "permute", "permute_backward", "silu", "silu_backward",
    "unpermute_backward",
}  # fmt: skip
# Measured on one GPU alone: gradients of FP8 and their casts, gradients of indexed rows, which imported steps have.
ONLY_H100 = {"scaled_cast", "fp8_cast_tiles", "index_put"}


def test_every_measured_family_and_direction_is_reached_from_a_step(small, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    fitted = CalibratedModel.kernel_class

    def noted(model: CalibratedModel, name: str) -> Any:
        asked.add(name)
        return fitted(model, name)

    monkeypatch.setattr(CalibratedModel, "kernel_class", noted)
    for changes in STEPS.values():
        scenario = small(changes)
        samples, _ = draw_samples(scenario, obtain_trace(scenario))
        for name in ("h200", "h100"):
            kernels = kernel_model(name)
            build_program(scenario, fabric=build_fabric(scenario.cluster), kernels=kernels, samples=samples[:1])
    for name, only in (("h200", ONLY_ALONE), ("h100", ONLY_ALONE | ONLY_H100)):
        profile = load_profile(name)
        assert isinstance(profile, CalibratedModel)
        alone = {f"memory_bound/{kind}" for kind in only}
        left = set(profile.profile.fits) - {"sustained"} - asked
        # Which of the grouped FP8 kernels runs depends on the sides of the model: one class a direction is enough.
        grouped = {kernel_class for kernel_class in left if kernel_class.startswith("grouped_gemm/fp8")}
        assert left - grouped == alone
        known = {kernel_class for kernel_class in profile.profile.fits if kernel_class.startswith("grouped_gemm/fp8")}
        for way in GEMM_DIRECTIONS:
            of_way = {kernel_class for kernel_class in known if f"/{way}/" in kernel_class}
            assert not of_way or of_way - grouped


def every_kernel() -> list[Kernel]:
    """One of each family, direction and kind, for single sizes and for a size per rank."""
    sequence, many = {"batch": 1, "heads": 8, "kv_heads": 8, "head_dim": 128, "value_dim": 128}, np.array([64, 4096])
    found: list[Kernel] = []
    for direction in GEMM_DIRECTIONS:
        found += [Gemm(m, 512, 768, direction=direction) for m in (300, many)]
        found += [GroupedGemm(rows, 512, 768, direction=direction) for rows in ([30, 0, 500], [[30, 0], [600, 7]])]
    for way in ATTENTION_DIRECTIONS:
        found += [Attention(sequence=length, direction=way, **sequence) for length in (1024, many)]
    for kind in MEMORY_KINDS:
        found += [MemoryBound(kind, moved) for moved in (1e6, many * 1e3)]
    return found


@pytest.mark.parametrize("name", ["roofline", "h200", "h100", "h800", "b200"])
def test_every_model_answers_every_kernel_in_the_shape_of_its_sizes(name: str) -> None:
    model = kernel_model("h200", name) if name == "roofline" else kernel_model(name)
    for kernel in every_kernel():
        seconds, source = model.seconds(kernel)
        assert np.shape(seconds) == np.shape(kernel.moved_bytes)
        assert np.min(seconds) > 0 and np.isfinite(seconds).all(), kernel
        assert source
