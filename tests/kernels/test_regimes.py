"""Kernels of an H100 in other regimes than those of the benchmarks (tools/measure_rows.py)."""

from pathlib import Path
from typing import Any

import numpy as np

from moesim.kernels import CalibratedModel
from moesim.kernels.families import kernel_of
from moesim.strict_json import parse_json, unpacked

ROWS: list[dict[str, Any]] = parse_json(
    unpacked((Path(__file__).parents[1] / "data" / "regimes_h100.json.gz").read_bytes())
)["rows"]


def logs(model: Any, rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """Log of measured over predicted."""
    return np.array([np.log(row[key] / float(model.seconds(kernel_of(row["of"])).seconds)) for row in rows])


def test_fp8_products_without_pause_meet_the_power_law(h100: CalibratedModel) -> None:
    """One constant, the power of an FP8 FLOP, was chosen on them: within 5 % in the median without a bias."""
    rows = [row for row in ROWS if row["family"] == "sustained" and row["of"]["family"] == "gemm_fp8"]
    assert len(rows) >= 15
    errors = logs(h100, rows, "p50")
    assert np.median(np.abs(errors)) < 0.05 and abs(np.median(errors)) < 0.03
    short = logs(h100.at_benchmark_clock(), rows, "p50")
    assert np.median(short) > np.median(errors) + 0.03, "without the law they would be too fast"
