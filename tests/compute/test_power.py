"""The clock under the power limit, and what it does to predictions."""

import math

import numpy as np
import pytest

from moesim.compute import load_profile
from moesim.compute.power import PowerCap, fit_power_cap


def rows(cap: PowerCap, rates: np.ndarray) -> list[dict[str, float]]:
    return [{"flops_per_second": float(r), "clock_mhz": math.exp(cap.log_clock(float(r)))} for r in rates]


def test_a_known_law_is_found_again() -> None:
    cap = PowerCap(free_mhz=1950.0, threshold=250e12, slope=1e-12)
    found = fit_power_cap(rows(cap, np.linspace(50e12, 700e12, 60)))
    assert found is not None
    for rate in (100e12, 400e12, 650e12):
        assert found.log_clock(rate) == pytest.approx(cap.log_clock(rate), abs=0.01)


def test_few_rows_or_a_clock_that_does_not_fall_give_no_cap() -> None:
    cap = PowerCap(free_mhz=1950.0, threshold=250e12, slope=1e-12)
    assert fit_power_cap(rows(cap, np.linspace(50e12, 700e12, 10))) is None
    rising = PowerCap(free_mhz=1500.0, threshold=250e12, slope=-1e-12)
    assert fit_power_cap(rows(rising, np.linspace(50e12, 700e12, 60))) is None


def test_the_cap_slows_heavy_kernels_and_makes_none_faster() -> None:
    model = load_profile("h200")
    heavy, light = {"m": 8192, "k": 8192, "n": 8192}, {"m": 64, "k": 2048, "n": 2048}
    uncapped = {
        name: model.at_clock(clock).gemm(**heavy).seconds for name, clock in (("slow", 1500.0), ("fast", 1950.0))
    }
    assert uncapped["fast"] < model.gemm(**heavy).seconds < 1.05 * uncapped["slow"]
    cell = model.cell("gemm/bf16/forward")
    assert cell is not None
    sizes = (64.0, 2048.0, 2048.0, 2.0)
    assert model.gemm(**light).seconds == pytest.approx(cell.predict_one(sizes)[0], rel=1e-6)


def test_vectors_agree_with_floats_under_the_cap() -> None:
    model = load_profile("h200")
    m = np.array([512, 4096, 30000])
    vector = model.gemm(m=m, k=4096, n=8192).seconds
    assert vector == pytest.approx([model.gemm(m=int(each), k=4096, n=8192).seconds for each in m], rel=1e-3)


def test_equal_ranks_are_equal_wherever_they_stand() -> None:
    model = load_profile("h200")
    rows_RE = np.random.default_rng(0).integers(0, 3000, (200, 8))
    seconds = model.grouped_gemm(rows_per_expert=rows_RE, k=2048, n=2816).seconds
    few = model.grouped_gemm(rows_per_expert=rows_RE[:20], k=2048, n=2816).seconds
    assert seconds[:20] == pytest.approx(few, rel=1e-5)
    order = np.random.default_rng(1).permutation(200)
    shuffled = model.grouped_gemm(rows_per_expert=rows_RE[order][:, ::-1], k=2048, n=2816).seconds
    assert shuffled == pytest.approx(seconds[order], rel=1e-6)
