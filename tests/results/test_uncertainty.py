"""The range of a step time from its parts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.results.outcome import Basis, ErrorPart, error_parts, kernel_range, path_shares, whole_range


def part(share: float, error: float) -> ErrorPart:
    return ErrorPart(source="scaled", family="gemm", share=share, log_error=error, count=1, how="")


def test_a_step_of_one_family_has_just_its_factor():
    assert kernel_range(2.0, [part(1.0, math.log(1.25))]) == pytest.approx([1.6, 2.5])


def test_a_family_moves_the_step_by_its_share():
    low, high = kernel_range(1.0, [part(0.25, math.log(2.0))])
    assert (low, high) == pytest.approx((1 - 0.25 / 2, 1.25))


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 2)), max_size=5),
    st.floats(0, 0.3),
    st.floats(0, 0.3),
    st.floats(1e-3, 1e3),
)
def test_the_whole_range_holds_either_part_and_not_more_than_both_together(parts, less, more, step_s):
    kernels = kernel_range(step_s, [part(share, error) for share, error in parts])
    routing = [step_s * math.exp(-less), step_s * math.exp(more)]
    low, high = whole_range(step_s, kernels, routing)
    slack = 1e-9 * step_s
    assert low <= min(kernels[0], routing[0]) + slack and high >= max(kernels[1], routing[1]) - slack
    assert low >= kernels[0] * routing[0] / step_s - slack and high <= kernels[1] * routing[1] / step_s * (1 + 1e-9)


def test_shares_split_a_category_of_the_path_as_its_operations():
    seconds = {
        Basis("attention", "measured", "attention"): 30.0,
        Basis("attention", "scaled", "gemm"): 10.0,
        Basis("experts", "scaled", "gemm"): 100.0,
        Basis("dispatch_exposed", "network", "transfers"): 50.0,
    }
    path = {"attention": 4.0, "experts": 2.0, "dispatch_exposed": 0.0, "pipeline": 1.0, "bubble": 3.0}
    assert path_shares(seconds, path) == pytest.approx(
        {("measured", "attention"): 0.3, ("scaled", "gemm"): 0.3, ("network", "transfers"): 0.1}
    )


def test_an_unknown_clock_moves_all_that_computes():
    shares = {("scaled", "gemm"): 0.4, ("interpolated", "attention"): 0.2, ("scaled", "memory_bound"): 0.3}
    clock = next(
        part for part in error_parts(shares, ("b300", "tables", "any"), clock_error=0.1) if part.source == "clock"
    )
    assert (clock.share, clock.log_error) == pytest.approx((0.6, 0.1))
