"""Rows that are gathered, keys that are joined, optimizers of small tensors and mixtures of kernels, on one H100.

`tools/measure_row_moves.py` measured them; every second row of a kind (`held_out`) is in no choice.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.kernels import CalibratedModel, Gemm, MemoryBound
from moesim.kernels.unprofiled import JOINED, adam_floor, gathered_bytes
from moesim.strict_json import parse_json, unpacked

Row = dict[str, Any]
ROWS: list[Row] = parse_json(unpacked((Path(__file__).parents[1] / "data" / "row_moves_h100.json.gz").read_bytes()))[
    "rows"
]


def rows_of(what: str, **facts: Any) -> list[Row]:
    """Of one kind, those with these facts."""
    return [row for row in ROWS if row["what"] == what and all(row.get(key) == fact for key, fact in facts.items())]


def errors_of(model: CalibratedModel, rows: list[Row], kernel_of: Any) -> np.ndarray:
    """Log of measured over predicted seconds of rows of 30 us and more, at the clock of benchmarks."""
    free = model.at_benchmark_clock()
    long = [row for row in rows if row["s"] >= 30e-6]
    return np.array([np.log(row["s"] / float(free.seconds(kernel_of(row)).seconds)) for row in long])


def row_bytes(row: Row) -> float:
    """Of one row."""
    return float(row["width"] * row.get("bytes", 2))


def gather(row: Row) -> MemoryBound:
    """As a program prices it."""
    rows = row["tokens"] * row["copies"]
    return MemoryBound("copy", float(gathered_bytes(rows, of=row["tokens"], row_bytes=row_bytes(row))))


@pytest.mark.parametrize("facts", [{"by": "torch"}, {"by": "triton", "bytes": None}, {"by": "triton", "bytes": 1}])
def test_rows_gathered_are_copies_of_what_the_memory_moves(h100: CalibratedModel, facts: Row) -> None:
    """The kind `permute`, measured with eight copies of every token, is up to 1.7 times too fast for distinct rows."""
    held_out = rows_of("gather", held_out=True, **facts)
    errors = errors_of(h100, held_out, gather)
    repeated = lambda row: MemoryBound("permute", (2.0 * row_bytes(row) + 8) * row["tokens"] * row["copies"])  # noqa: E731
    before = errors_of(h100, held_out, repeated)
    found = [f"{np.median(np.abs(each)):.1%}, p90 {np.percentile(np.abs(each), 90):.1%}" for each in (errors, before)]
    print(f"\n{facts}: median {found[0]} of {len(errors)}; as repeated rows {found[1]}")
    assert len(errors) >= 14
    assert np.median(np.abs(errors)) < 0.06 and np.percentile(np.abs(errors), 90) < 0.2
    assert np.median(np.abs(before)) > 2.0 * np.median(np.abs(errors))


def test_sums_of_a_tokens_rows_are_elementwise_kernels(h100: CalibratedModel) -> None:
    held_out = rows_of("sum", held_out=True)
    errors = errors_of(
        h100, held_out, lambda row: MemoryBound("elementwise", 2.0 * row["width"] * row["tokens"] * (row["copies"] + 1))
    )
    assert len(errors) >= 10 and np.median(np.abs(errors)) < 0.04


def test_joined_keys_are_slow_copies(h100: CalibratedModel) -> None:
    """Both ways by Triton; torch's own concatenation of a spread part takes almost three times as long."""

    def join(row: Row) -> MemoryBound:
        numbers = row["heads"] * (2 * row["plain"] + row["position"]) + row["position"]
        return MemoryBound("copy", JOINED * 2.0 * row["tokens"] * numbers)

    for back in (None, True):
        errors = errors_of(h100, rows_of("join", by="triton", back=back), join)
        assert len(errors) >= 7 and abs(np.median(errors)) < 0.05 and np.abs(errors).max() < 0.15
    assert np.median(errors_of(h100, rows_of("join", by="torch"), join)) > np.log(2.4)


def test_optimizers_of_small_tensors_take_their_blocks(h100: CalibratedModel) -> None:
    """From captured graphs: torch's fused AdamW over 100 to 4,000 tensors of 1 K to 268 M numbers."""
    errors, plain = [], []
    for row in rows_of("adam"):
        numbers = row["tensors"] * row["size"]
        kind = {2: "optimizer_bf16", 4: "optimizer_fp32"}[row["bytes"]]
        alone = float(h100.at_load(0.0).seconds(MemoryBound(kind, 7.0 * row["bytes"] * numbers)).seconds)
        if row["graph"] > 60e-6:  # shorter ones are not what a step waits for
            errors.append(np.log(row["graph"] / max(alone, adam_floor(numbers, row["tensors"]))))
            plain.append(np.log(row["graph"] / alone))
    assert len(errors) >= 24
    assert np.median(np.abs(errors)) < 0.05 and np.abs(errors).max() < 0.25 and np.max(plain) > 1.0


def test_gemms_and_copies_in_turn_meet_the_clock_of_a_step(h100: CalibratedModel) -> None:
    """Mixtures without pause, of 400 to 820 TFLOP/s in the mean; none is in a fit."""
    kernel = Gemm(m=8192, k=8192, n=8192)
    light = float(h100.at_load(0.0).seconds(kernel).seconds)
    print()
    for row in rows_of("mixed"):
        busy = row["products"] * light + row["copies"] * row["copy_s"]
        load = row["products"] * float(kernel.flops) / busy
        if load < 3.5e14:
            continue
        error = np.log(row["product_s"] / float(h100.at_load(load).seconds(kernel).seconds))
        print(f"{row['products']} GEMMs, {row['copies']} copies, {load / 1e12:.0f} TFLOP/s: {error:+.1%}")
        assert abs(error) < (0.04 if row["copies"] else 0.08)
