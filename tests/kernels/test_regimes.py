"""Kernels of an H100 in other regimes than those of the benchmarks (tools/measure_rows.py)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moesim
from moesim.errors import UserError
from moesim.kernels import CalibratedModel, Gemm, MemoryBound, in_regime, kernel_model
from moesim.kernels.errors import kernels_rest_on
from moesim.kernels.families import kernel_of
from moesim.strict_json import parse_json, unpacked

ROWS: list[dict[str, Any]] = parse_json(
    unpacked((Path(__file__).parents[1] / "data" / "regimes_h100.json.gz").read_bytes())
)["rows"]


def logs(model: Any, rows: list[dict[str, Any]], key: str) -> np.ndarray:
    """Log of measured over predicted."""
    return np.array([np.log(row[key] / float(model.seconds(kernel_of(row["of"])).seconds)) for row in rows])


def test_fp8_gemms_without_pause_meet_the_power_law(h100: CalibratedModel) -> None:
    """One constant, the power of an FP8 FLOP, was chosen on them: within 5 % in the median without a bias."""
    rows = [row for row in ROWS if row["family"] == "sustained" and row["of"]["family"] == "gemm_fp8"]
    assert len(rows) >= 15
    errors = logs(h100, rows, "p50")
    assert np.median(np.abs(errors)) < 0.05 and abs(np.median(errors)) < 0.03
    short = logs(h100.at_benchmark_clock(), rows, "p50")
    assert np.median(short) > np.median(errors) + 0.03, "without the law they would be too fast"


def test_large_optimizer_steps_behind_gemms_follow_the_clock(h100: CalibratedModel) -> None:
    """The exponents were chosen on steps over four tensors; those over 400 are in no choice."""
    loaded = h100.at_load(7e14)
    for dtype, before in (("bf16", 0.08), ("fp32", 0.0)):
        rows = [row for row in ROWS if row["family"] == "optimizer_step" and row["dtype"] == dtype]
        others = [row for row in rows if row["tensors"] == 400 and row["parameters"] >= 400_000_000]
        assert len(others) == 2
        for row in others:
            kernel = MemoryBound(f"optimizer_{dtype}", row["bytes"])
            plain, slower = (
                float(model.at_load(load).seconds(kernel).seconds) for model, load in ((h100, 0.0), (h100, 7e14))
            )
            assert row["hot"] > plain * (1.0 + before)
            assert abs(np.log(row["hot"] / slower)) < 0.04
    copy = MemoryBound("copy", 1e9)
    assert loaded.seconds(copy) == h100.at_load(0.0).seconds(copy)


def test_regimes_tell_gemms_apart(h100: CalibratedModel) -> None:
    """Few rows, and many rows of narrow GEMMs: without pause, in short runs, and at the clock of each row."""
    rows = [row for row in ROWS if row["family"] == "regime" and row["of"]["family"] == "gemm"]
    print()
    for name, chosen in (
        ("up to 512 rows", [row for row in rows if row["of"]["m"] <= 512]),
        ("narrow, 3072 rows and more", [row for row in rows if row["of"]["m"] >= 3072]),
    ):
        assert len(chosen) > 30
        without_pause = logs(in_regime(h100, "sustained"), chosen, "sustained")
        short = logs(in_regime(h100, "short"), chosen, "short")
        clocked = np.array([logs(in_regime(h100, row["short_clock_mhz"]), [row], "short")[0] for row in chosen])
        for regime, found in (("sustained", without_pause), ("short", short), ("at its clock", clocked)):
            print(f"{name:27} {regime:13} median {np.median(found):+.1%}, median error {np.median(np.abs(found)):.1%}")
        assert abs(np.median(clocked)) < 0.02 and np.median(np.abs(clocked)) < 0.07
        assert abs(np.median(without_pause)) < 0.06 and abs(np.median(short)) < 0.06


def test_skewed_weight_gradients_are_slower_by_what_is_predicted(h100: CalibratedModel) -> None:
    """Pairs of even and skewed rows of the same GEMM."""
    rows = [row for row in ROWS if row["family"] == "regime" and row["of"]["family"] == "grouped_gemm"]
    even, skewed = rows[::2], rows[1::2]
    assert all(
        max(a["of"]["rows_per_expert"]) < max(b["of"]["rows_per_expert"]) for a, b in zip(even, skewed, strict=True)
    )
    measured = np.array([b["sustained"] / a["sustained"] for a, b in zip(even, skewed, strict=True)])
    seconds = [[float(h100.seconds(kernel_of(row["of"])).seconds) for row in pair] for pair in (even, skewed)]
    predicted = np.array(seconds[1]) / np.array(seconds[0])
    print(f"\nslower by {np.median(measured) - 1:.1%}, predicted {np.median(predicted) - 1:.1%}")
    assert abs(np.median(np.log(measured / predicted))) < 0.02


def test_a_wrong_regime_is_refused_in_one_line(h100: CalibratedModel) -> None:
    with pytest.raises(UserError, match="sustained, short, or a clock in MHz; did you mean 'sustained'"):
        in_regime(h100, "sustain")
    with pytest.raises(UserError, match="whose clocks were measured"):
        in_regime(kernel_model("b200"), 1500.0)
    with pytest.raises(UserError, match="data sheet has no regime"):
        in_regime(kernel_model("h100", "roofline"), "short")
    with pytest.raises(UserError, match="needs a clock"):
        moesim.load_scenario("quickstart", {"compute.regime": "at_clock"})


@pytest.mark.parametrize("gpu", ["h100", "h800", "b200", "gb300", "a800"])
def test_no_load_of_a_step_changes_a_regime(gpu: str) -> None:
    """A heavy GEMM is as fast in short runs as in a step that does little, and slower without pause."""
    model, heavy = kernel_model(gpu), Gemm(m=16384, k=8192, n=8192)
    short, sustained = in_regime(model, "short"), in_regime(model, "sustained")
    assert short.at_load(1e15) is short and sustained.at_load(1e15) is sustained
    seconds = [float(kernels.seconds(heavy).seconds) for kernels in (short, model.at_load(5e14), sustained)]
    assert seconds == sorted(seconds)
    assert kernels_rest_on(short) == f"{kernels_rest_on(model)}, in short runs"
