"""Laws of the block-scaled FP8 products that are fitted to published rows."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moesim.errors import UserError
from moesim.kernels import CalibratedModel, Gemm, GroupedGemm, ScaledModel, kernel_model, load_profile
from moesim.kernels.families import GEMM_DIRECTIONS, chip_format, peak_format
from moesim.kernels.fp8 import PUBLISHED_ROWS, WEIGHT_GRADIENT_SHARE, fp8_gemm, published_errors
from moesim.kernels.physics import grouped_tiles
from moesim.kernels.report import held_out_rows
from moesim.kernels.tabulated import TabulatedModel
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
        found = h800.seconds(Gemm(m=m, k=k, n=n, dtype="fp8_block"))
        assert found.source == "scaled"
        errors.append(abs(2.0 * m * n * k / (tflops * 1e12) / float(found.seconds) - 1.0))
    assert np.median(errors) < 0.08


def test_more_of_anything_never_takes_less_than_a_tile_less() -> None:
    sizes = np.array([128.0, 512.0, 2048.0, 8192.0])
    for direction in GEMM_DIRECTIONS:
        for along in range(3):
            fixed: list[Any] = [4096.0, 4096.0, 4096.0]
            fixed[along] = sizes
            seconds = np.asarray(fp8_gemm(Gemm(*fixed, dtype="fp8_block", direction=direction), gpu=GPU).seconds)
            assert (np.diff(seconds) > 0).all()


def test_no_product_passes_the_peak_and_large_weight_gradients_reach_their_share() -> None:
    flops = 2.0 * 8192 * 8192 * 8192
    whole = Gemm(8192, 8192, 8192, dtype="fp8_block")
    forward, wgrad = (float(fp8_gemm(kernel, gpu=GPU).seconds) for kernel in (whole, replace(whole, direction="wgrad")))
    assert flops / forward < GPU.peak_flops["fp8"]
    assert forward / wgrad == pytest.approx(WEIGHT_GRADIENT_SHARE, abs=0.02)


def test_faster_chips_take_less_and_a_clock_changes_nothing_published() -> None:
    h800 = load_profile("h800")
    assert isinstance(h800, ScaledModel)
    kernel = Gemm(4096, 4096, 7168, dtype="fp8_block")
    assert h800.at_load(1e14).seconds(kernel) == h800.seconds(kernel)
    assert float(fp8_gemm(kernel, gpu=gpu_spec("b200")).seconds) < float(h800.seconds(kernel).seconds)


@pytest.mark.parametrize("name", ["h100", "h200", "h800", "b200", "gb300"])
def test_at_no_load_of_a_step_does_a_product_of_few_bits_pass_the_fastest_known(name: str) -> None:
    model = kernel_model(name).at_load(0.0)
    assert isinstance(model, CalibratedModel | ScaledModel | TabulatedModel)
    rows = np.array([4096, 8192, 16384, 32768])
    for dtype in ("fp8", "fp8_block", "mxfp8", "nvfp4"):
        if peak_format(dtype) not in gpu_spec(name).peak_flops:
            continue
        fastest = model.fastest[chip_format(dtype)]
        for direction in GEMM_DIRECTIONS:
            dense = Gemm(rows, 16384, 16384, dtype=dtype, direction=direction)
            grouped = GroupedGemm(np.stack([rows] * 8, axis=1), 16384, 16384, dtype=dtype, direction=direction)
            for kernel in (dense, grouped):
                assert (kernel.flops / np.asarray(model.seconds(kernel).seconds) <= fastest * (1 + 1e-9)).all()


def test_every_direction_of_every_recipe_has_rows_of_its_own_on_h100() -> None:
    h100 = load_profile("h100")
    assert isinstance(h100, CalibratedModel)
    for direction in GEMM_DIRECTIONS:
        for dtype in ("fp8", "fp8_block"):
            assert h100.has(Gemm(1, 1, 1, dtype=dtype, direction=direction))
        assert h100.has(GroupedGemm([1], 1, 1, dtype="fp8", direction=direction))
    free = h100.at_benchmark_clock()
    forward, wgrad = (Gemm(16384, 7168, 4096, dtype="fp8_block", direction=d) for d in ("forward", "wgrad"))
    assert 1.2 < float(free.seconds(wgrad).seconds) / float(free.seconds(forward).seconds) < 1.8


def test_rows_kept_out_of_the_fit_are_met() -> None:
    """Half of the FP8 rows of H100, by shape; printed by `moesim calibrate --report --profile h100`."""
    h100 = load_profile("h100")
    assert isinstance(h100, CalibratedModel)
    found = {row.name: row for row in held_out_rows(h100, by_class=True)}
    for dtype, (median, p90) in {"fp8": (0.04, 0.11), "fp8_block": (0.05, 0.18)}.items():
        for direction in GEMM_DIRECTIONS:
            row = found[f"gemm/{dtype}/{direction}"]
            assert row.count > 100 and row.median < median and row.p90 < p90
    assert not {name for name in found if "bf16" in name}


def test_another_gpu_of_the_chip_takes_its_ratios_from_there() -> None:
    h100, h200 = load_profile("h100"), load_profile("h200")
    plain, wgrad = (Gemm(8192, 4096, 4096, dtype="fp8", direction=d) for d in ("forward", "wgrad"))
    assert h200.seconds(plain).source != "scaled" and h200.seconds(wgrad).source == "scaled"
    ratios = [float(model.seconds(wgrad).seconds) / float(model.seconds(plain).seconds) for model in (h100, h200)]
    assert ratios[1] == pytest.approx(ratios[0], rel=0.15)


def test_formats_that_a_chip_lacks_are_refused() -> None:
    for dtype in ("mxfp8", "nvfp4"):
        with pytest.raises(UserError, match="matrix units"):
            kernel_model("h100").seconds(Gemm(4096, 4096, 4096, dtype=dtype))
    b200 = kernel_model("b200")
    large = Gemm(16384, 8192, 8192)
    seconds = [float(b200.seconds(replace(large, dtype=dtype)).seconds) for dtype in ("bf16", "mxfp8", "nvfp4")]
    assert seconds[0] > 1.5 * seconds[1] > 1.5 * seconds[2]


def test_grouped_products_take_the_tiles_of_their_three_sides() -> None:
    """torch's rule: small up to 128 rows or columns, other tiles where two of three sides reach 2048; bf16 has two."""
    assert grouped_tiles(128.9, 7168, 2048, direction="forward", fp8=True) == 0
    assert grouped_tiles(300.0, 7168, 2048, direction="forward", fp8=True) == 2
    assert grouped_tiles(300.0, 7168, 1536, direction="forward", fp8=True) == 1
    assert grouped_tiles(2048.0, 1536, 4096, direction="wgrad", fp8=True) == 2  # as deep as there are rows
    assert grouped_tiles(300.0, 7168, 2048, direction="forward") == 1
    mixed = grouped_tiles(np.array([10.0, 300.0, 3000.0]), 1024, 4096, direction="dgrad", fp8=True)
    assert mixed.tolist() == [0, 1, 2]
