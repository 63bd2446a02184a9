"""Whole runs: how far a step is known follows from what its kernels rest on, and never moves its mean.

The range of a step time from its parts.
"""

import math
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.report.facts import step_time
from moesim.results import RunRecord
from moesim.results.outcome import Basis, ErrorPart, error_parts, kernel_range, path_shares, whole_range
from moesim.run import simulate
from moesim.scenario import Scenario

pytestmark = pytest.mark.usefixtures("few_tokens")

MEASURED = {"cluster.gpu": "h200", "compute.profile": None}
DENSE = {
    "model": {
        "layers": 2,
        "hidden": 256,
        "heads": 4,
        "kv_heads": 4,
        "head_dim": 64,
        "dense_layers": 2,
        "dense_intermediate": 512,
        "vocab": 1000,
    },
    "routing": {"kind": "uniform"},
    "parallelism": {"data": 4},
}


@cache
def simulated(scenario: Scenario) -> RunRecord:
    """Several tests ask for the same run."""
    return simulate(scenario)


def kernel_width(result: dict[str, Any]) -> float:
    low, high = result["step_time_kernel_range_s"]
    return math.log(high / low)


def test_a_step_is_known_the_less_the_weaker_its_sources_are(small) -> None:
    """Measured kernels, those of published tables, and a data sheet."""
    changes = [MEASURED, MEASURED | {"cluster.gpu": "b200"}, {"cluster.gpu": "h200", "compute.profile": "roofline"}]
    widths = [kernel_width(simulated(small(change)).result) for change in changes]
    assert widths == sorted(widths) and 0 < widths[0] < 0.5 * widths[1]


def test_a_run_says_whose_kernels_it_priced(small) -> None:
    names = [
        simulated(small(change)).result["kernels"] for change in (MEASURED, MEASURED | {"compute.profile": "roofline"})
    ]
    assert names == ["h200", "h200 (data sheet)"], "equal names share their errors"


def test_a_dense_model_has_a_range_of_its_kernels_alone(small) -> None:
    result = simulated(small(DENSE)).result
    assert result["step_time_routing_range_s"] is None
    assert result["step_time_range_s"] == result["step_time_kernel_range_s"]
    assert "90 % range" in step_time(result).note and "routing" not in step_time(result).note


def test_one_routing_sample_has_no_whole_range_but_one_of_its_kernels(small) -> None:
    result = simulated(small({"uncertainty.samples": 1})).result
    assert result["step_time_range_s"] is None and kernel_width(result) > 0
    note = step_time(result).note
    assert note.startswith("90 % range ") and note.endswith(" from kernels alone; none of routing: one routing sample")


def test_errors_are_of_the_step_and_make_its_range(small) -> None:
    result = simulated(small()).result
    parts = result["step_time_errors"]
    assert 0.3 < sum(part["share"] for part in parts if part["source"] != "clock") <= 1 + 1e-9
    high = math.hypot(*(math.log1p(part["share"] * math.expm1(part["log_error"])) for part in parts))
    assert result["step_time_kernel_range_s"][1] == pytest.approx(result["step_time_s"] * math.exp(high))


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
