"""Whole runs: how far a step is known follows from what its kernels rest on, and never moves its mean."""

import math
from typing import Any

import pytest

from moesim.report.facts import step_time
from moesim.run import simulate

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


def kernel_width(result: dict[str, Any]) -> float:
    low, high = result["step_time_kernel_range_s"]
    return math.log(high / low)


def test_a_step_is_known_the_less_the_weaker_its_sources_are(small) -> None:
    """Measured kernels, those of published tables, and a data sheet."""
    changes = [MEASURED, MEASURED | {"cluster.gpu": "b200"}, {"cluster.gpu": "h200", "compute.profile": "roofline"}]
    widths = [kernel_width(simulate(small(change)).result) for change in changes]
    assert widths == sorted(widths) and 0 < widths[0] < 0.5 * widths[1]


def test_a_run_says_whose_kernels_it_priced(small) -> None:
    names = [
        simulate(small(change)).result["kernels"] for change in (MEASURED, MEASURED | {"compute.profile": "roofline"})
    ]
    assert names == ["h200", "h200 (data sheet)"], "equal names share their errors"


def test_a_dense_model_has_a_range_of_its_kernels_alone(small) -> None:
    result = simulate(small(DENSE)).result
    assert result["step_time_routing_range_s"] is None
    assert result["step_time_range_s"] == result["step_time_kernel_range_s"]
    assert "90 % range" in step_time(result).note and "routing" not in step_time(result).note


def test_one_routing_sample_has_no_whole_range_but_one_of_its_kernels(small) -> None:
    result = simulate(small({"uncertainty.samples": 1})).result
    assert result["step_time_range_s"] is None and kernel_width(result) > 0
    note = step_time(result).note
    assert note.startswith("90 % range ") and note.endswith(" from kernels alone; none of routing: one routing sample")


def test_errors_are_of_the_step_and_make_its_range(small) -> None:
    result = simulate(small()).result
    parts = result["step_time_errors"]
    assert 0.3 < sum(part["share"] for part in parts if part["source"] != "clock") <= 1 + 1e-9
    high = math.hypot(*(math.log1p(part["share"] * math.expm1(part["log_error"])) for part in parts))
    assert result["step_time_kernel_range_s"][1] == pytest.approx(result["step_time_s"] * math.exp(high))
