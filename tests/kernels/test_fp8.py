"""Laws of the block-scaled FP8 products that are fitted to published rows."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.kernels import CalibratedModel, Gemm, ScaledModel, load_profile
from moesim.kernels.families import GEMM_DIRECTIONS
from moesim.kernels.fp8 import PUBLISHED_ROWS, WEIGHT_GRADIENT_SHARE, fp8_gemm, published_errors
from moesim.scenario import gpu_spec

GPU = gpu_spec("h800")


def test_rows_that_a_fit_never_saw_are_met_within_8_percent() -> None:
    for left_out in range(3):
        errors_P = np.abs(np.expm1(published_errors(left_out=left_out)))
        assert len(errors_P) == len(PUBLISHED_ROWS) // 3
        assert np.median(errors_P) < 0.08
    assert np.median(np.abs(np.expm1(published_errors()))) < 0.06


def test_the_published_gpu_answers_with_the_published_kernels() -> None:
    h800 = load_profile("h800")
    errors = []
    for m, n, k, tflops in PUBLISHED_ROWS:
        found = h800.seconds(Gemm(m=m, k=k, n=n, dtype="fp8"))
        assert found.source == "scaled"
        errors.append(abs(2.0 * m * n * k / (tflops * 1e12) / float(found.seconds) - 1.0))
    assert np.median(errors) < 0.08


def test_more_of_anything_never_takes_less_than_a_tile_less() -> None:
    sizes = np.array([128.0, 512.0, 2048.0, 8192.0])
    for direction in GEMM_DIRECTIONS:
        for along in range(3):
            fixed: list[Any] = [4096.0, 4096.0, 4096.0]
            fixed[along] = sizes
            seconds = np.asarray(fp8_gemm(Gemm(*fixed, dtype="fp8", direction=direction), gpu=GPU).seconds)
            assert (np.diff(seconds) > 0).all()


def test_no_product_passes_the_peak_and_large_weight_gradients_reach_their_share() -> None:
    flops = 2.0 * 8192 * 8192 * 8192
    whole = Gemm(8192, 8192, 8192, dtype="fp8")
    forward, wgrad = (float(fp8_gemm(kernel, gpu=GPU).seconds) for kernel in (whole, replace(whole, direction="wgrad")))
    assert flops / forward < GPU.peak_flops["fp8"]
    assert forward / wgrad == pytest.approx(WEIGHT_GRADIENT_SHARE, abs=0.02)


def test_faster_chips_take_less_and_a_clock_changes_nothing_published() -> None:
    h800 = load_profile("h800")
    assert isinstance(h800, ScaledModel)
    kernel = Gemm(4096, 4096, 7168, dtype="fp8")
    assert h800.at_load(1e14).seconds(kernel) == h800.seconds(kernel)
    assert float(fp8_gemm(kernel, gpu=gpu_spec("b200")).seconds) < float(h800.seconds(kernel).seconds)


def test_at_no_load_of_a_step_does_an_fp8_product_pass_the_highest_measured_rate() -> None:
    for name in ("h100", "h200"):
        model = load_profile(name)
        assert isinstance(model, CalibratedModel)
        highest = max(2.0 * row["m"] * row["k"] * row["n"] / row["p50"] for row in model.profile.family("gemm_fp8"))
        m = np.array([4096, 8192, 16384, 32768])
        seconds = np.asarray(model.at_load(0.0).seconds(Gemm(m, 16384, 16384, dtype="fp8")).seconds)
        assert (2.0 * m * 16384 * 16384 / seconds <= highest * (1 + 1e-9)).all()
        assert (np.diff(seconds) > 0).all()
