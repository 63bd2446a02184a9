"""The clock under the power limit, and what it does to predictions."""

import math

import numpy as np
import pytest

from moesim.kernels import (
    CalibratedModel,
    Gemm,
    GroupedGemm,
    MemoryBound,
    kernel_model,
    load_profile,
)
from moesim.kernels.power import PowerCap, SustainedRows, fit_power_cap

CAP = PowerCap(free=math.log(1900.0), threshold=3.5e14, slope=8e-16, traffic=30.0)


def rows(cap: PowerCap, loads_P: np.ndarray) -> SustainedRows:
    """Kernels of 1 ms that slow down as the cap says, without noise."""
    count = len(loads_P)
    bytes_P = np.random.default_rng(0).uniform(0.0, 4e9, count)
    flops_P = loads_P * 1e-3 - cap.traffic * bytes_P
    clock_P = np.linspace(7.3, 7.6, count)
    predicted_P = np.full(count, math.log(1e-3))
    measured_P = predicted_P - 0.6 * (cap.log_clock(loads_P) - clock_P)
    return SustainedRows(measured_P, predicted_P, flops_P, bytes_P, clock_P, np.full(count, 0.6))


def test_a_known_law_is_found_again() -> None:
    found = fit_power_cap(rows(CAP, np.linspace(5e13, 7e14, 60)))
    assert found is not None
    for load in (1e14, 4e14, 6.5e14):
        assert found.log_clock(load) == pytest.approx(CAP.log_clock(load), abs=0.01)


def test_few_rows_or_a_clock_that_does_not_fall_give_no_cap() -> None:
    assert fit_power_cap(rows(CAP, np.linspace(5e13, 7e14, 10))) is None
    rising = PowerCap(free=7.3, threshold=3.5e14, slope=-8e-16, traffic=30.0)
    assert fit_power_cap(rows(rising, np.linspace(5e13, 7e14, 60))) is None


def test_heavier_kernels_that_run_on_are_slower_than_at_a_free_clock(h200: CalibratedModel) -> None:
    heavy, light = Gemm(8192, 8192, 8192), Gemm(64, 2048, 2048)
    assert h200.seconds(heavy).seconds > 1.08 * h200.at_clock(1950.0).seconds(heavy).seconds
    assert h200.seconds(light).seconds == pytest.approx(h200.at_load(0.0).seconds(light).seconds, rel=1e-6)


def test_all_kernels_of_a_step_share_the_clock_that_its_load_leaves(h200: CalibratedModel) -> None:
    calm, hot = h200.at_load(1e14), h200.at_load(6e14)
    gemm = Gemm(8192, 8192, 8192)
    assert calm.seconds(gemm).seconds < h200.seconds(gemm).seconds < 1.1 * hot.seconds(gemm).seconds
    assert hot.seconds(gemm).seconds > 1.05 * calm.seconds(gemm).seconds
    # Kernels at the memory's full bandwidth do not notice; an index-add, far below it, does.
    for kind, slower in (("elementwise", 1.0), ("unpermute", 1.05)):
        moved = MemoryBound(kind, 1e9)
        ratio = hot.seconds(moved).seconds / calm.seconds(moved).seconds
        assert ratio == pytest.approx(1.0, abs=1e-9) if slower == 1.0 else ratio > slower


def test_models_without_a_power_limit_have_no_load() -> None:
    roofline = kernel_model("h200", "roofline")
    assert roofline.at_load(5e14) is roofline
    scaled = load_profile("b200")
    gemm = Gemm(8192, 8192, 8192)
    # A B200 with the same work is less of its peak, and so runs nearer to its free clock.
    assert scaled.at_load(1e15).seconds(gemm).seconds < scaled.at_load(1.6e15).seconds(gemm).seconds


def test_vectors_agree_with_floats_under_the_cap(h200: CalibratedModel) -> None:
    m = np.array([512, 4096, 30000])
    vector = h200.seconds(Gemm(m=m, k=4096, n=8192)).seconds
    assert vector == pytest.approx([h200.seconds(Gemm(m=int(each), k=4096, n=8192)).seconds for each in m], rel=1e-3)


def test_equal_ranks_are_equal_wherever_they_stand(h200: CalibratedModel) -> None:
    rows_RE = np.random.default_rng(0).integers(0, 3000, (200, 8))
    seconds = h200.seconds(GroupedGemm(rows_per_expert=rows_RE, k=2048, n=2816)).seconds
    few = h200.seconds(GroupedGemm(rows_per_expert=rows_RE[:20], k=2048, n=2816)).seconds
    assert seconds[:20] == pytest.approx(few, rel=1e-5)
    order = np.random.default_rng(1).permutation(200)
    shuffled = h200.seconds(GroupedGemm(rows_per_expert=rows_RE[order][:, ::-1], k=2048, n=2816)).seconds
    assert shuffled == pytest.approx(seconds[order], rel=1e-6)
