"""The 90 % interval of a mean: Student's t against the integral of its density, and the width by hand."""

import math

import numpy as np
import pytest

from moesim.study.points import half_width_90, student_t_95


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 30, 31, 100, 1000])
def test_quantiles_of_student_t_leave_five_per_cent_above(freedom: int) -> None:
    """Against the integral of the density, substituted so that its tail is finite: x = q / u for u in (0, 1]."""
    quantile, u = student_t_95(freedom), (np.arange(200_000) + 0.5) / 200_000
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = scale * (1 + (quantile / u) ** 2 / freedom) ** (-(freedom + 1) / 2)
    assert float((density * quantile / u**2).mean()) == pytest.approx(0.05, abs=2e-5)


def test_half_widths_by_hand() -> None:
    assert half_width_90([1.0, 2.0, 3.0]) == pytest.approx(2.9200 / 3**0.5)  # standard deviation 1
    assert half_width_90([float(number % 2) for number in range(40)]) == pytest.approx(1.6849 * 0.50637 / 40**0.5, 1e-4)
