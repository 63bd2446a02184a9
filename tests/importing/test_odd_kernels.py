"""Ratios of kernels that no profile holds are the medians of their measured rows, and price those rows."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.kernels import Gemm, KernelModel, MemoryBound, kernel_model
from moesim.kernels.odd_kernels import DROPOUT, SUMMED_BYTES, SUMMED_S, UNALIGNED
from moesim.strict_json import parse_json

FILE = Path(__file__).parent.parent / "data" / "odd_kernels_h100.json.gz"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    return parse_json(gzip.decompress(FILE.read_bytes()))["rows"]


@pytest.fixture(scope="module")
def kernels() -> KernelModel:
    return kernel_model("h100").at_load(0.0)


@pytest.mark.parametrize("aligned", [2, 4, 8])
@pytest.mark.parametrize("direction", ["forward", "dgrad", "wgrad"])
def test_products_of_unaligned_rows(rows: Rows, kernels: KernelModel, aligned: int, direction: Any) -> None:
    found = [
        row[direction] / kernels.seconds(Gemm(m=row["m"], k=row["k"], n=row["n"], direction=direction)).seconds
        for row in rows
        if row["what"] == "gemm" and np.gcd(2 * row["n"], 16) == aligned
    ]
    assert np.median(found) == pytest.approx(UNALIGNED[aligned][direction], rel=0.02)
    assert np.allclose(found, np.median(found), rtol=0.15), "one number is enough for all sizes"


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention_with_dropout(rows: Rows, direction: str) -> None:
    measured = {(tuple(row["shape"]), row["dropout"] > 0): row for row in rows if row["what"] == "attention"}
    found = [row[direction] / measured[shape, False][direction] for (shape, drops), row in measured.items() if drops]
    assert np.median(found) == pytest.approx(DROPOUT[direction], rel=0.02) and len(found) >= 5


def test_sums_into_rows(rows: Rows, kernels: KernelModel) -> None:
    found = [
        (SUMMED_S + kernels.seconds(MemoryBound("elementwise", SUMMED_BYTES * elements)).seconds) / row["put"]
        for row in rows
        if row["what"] == "index_put"
        for elements in [row["tokens"] * row["choices"] * row["width"]]
    ]
    assert np.median(found) == pytest.approx(1, abs=0.02) and np.abs(np.array(found) - 1).max() < 0.13


def test_a_fill_writes_and_reads_nothing(rows: Rows, kernels: KernelModel) -> None:
    found = [
        kernels.seconds(MemoryBound("zero", float(row["tokens"] * row["width"] * row["bytes"]))).seconds / row["zero"]
        for row in rows
        if row["what"] == "index_put"
    ]
    assert np.median(found) == pytest.approx(1, abs=0.05)
