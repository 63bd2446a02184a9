"""Ratios of kernels that no profile holds are the medians of their measured rows, and price those rows."""

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.kernels import Gemm, KernelModel, MemoryBound, kernel_model
from moesim.kernels.unprofiled import DROPOUT, SUMMED_BYTES, SUMMED_S, UNALIGNED
from moesim.recorded.pricing import prices
from moesim.recorded.step_file import RecordedOp, Seen
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
def test_gemms_of_unaligned_rows(rows: Rows, kernels: KernelModel, aligned: int, direction: Any) -> None:
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


def price(name: str, reads: list[Seen], writes: list[Seen], kernels: KernelModel, **more: Any) -> float:
    op = RecordedOp(name=name, phase="forward", module="", reads=tuple(reads), writes=tuple(writes), **more)
    return prices([op], kernels)[0].seconds


def seen(*shape: int, dtype: str = "bfloat16", size: int = 2) -> Seen:
    return shape, dtype, size * math.prod(shape)


def of(rows: Rows, what: str) -> Rows:
    found = [row for row in rows if row["what"] == what]
    assert found
    return found


def test_the_gradient_of_a_table_is_a_fill_and_sums_of_rows(rows: Rows, kernels: KernelModel) -> None:
    found = []
    for row in of(rows, "embedding_backward"):
        dtype = {"dtype": "bfloat16" if row["bytes"] == 2 else "float32", "size": row["bytes"]}
        ids, table = seen(row["T"], dtype="int64", size=8), seen(row["V"], row["H"], **dtype)
        priced = price("embedding_dense_backward", [seen(row["T"], row["H"], **dtype), ids], [table], kernels)
        found.append((priced / row["s"], row["ids"]))
    uniform = [ratio for ratio, ids in found if ids == "uniform"]
    assert len(uniform) > 30 and np.median(uniform) == pytest.approx(1, abs=0.04)
    assert np.all(np.abs(np.log(uniform)) < 0.22), "over 75 times the tokens, 6 times the vocabulary, 7 times the width"
    assert all(1.0 < ratio < 1.4 for ratio, ids in found if ids == "zipf"), "ids that repeat themselves take less"


@pytest.mark.parametrize(
    ("what", "name", "worst"), [("index_put_rows", "index_put", 0.12), ("index_add_", "index_add", 0.3),
                                ("scatter_add_rows", "scatter_add", 0.3)]
)  # fmt: skip
def test_rows_written_by_their_places(rows: Rows, kernels: KernelModel, what: str, name: str, worst: float) -> None:
    found = []
    for row in of(rows, what):
        dtype = {"dtype": "bfloat16" if row["bytes"] == 2 else "float32", "size": row["bytes"]}
        many, few = (seen(row["T"] * times, row["H"], **dtype) for times in (row["K"], 1))
        place = seen(row["T"] * row["K"], dtype="int64", size=8)
        if name == "index_put":
            found.append(price(name, [many, place, many], [many], kernels) / row["s"])
        else:
            suffix = "_" if name == "index_add" else ""
            zeros = price("zeros", [], [few], kernels)
            found.append((zeros + price(f"{name}{suffix}", [few, place, many], [few], kernels)) / row["s"])
    assert np.median(found) == pytest.approx(1, abs=0.12) and np.abs(np.array(found) - 1).max() < worst, found


def test_searches_and_sorts(rows: Rows, kernels: KernelModel) -> None:
    for row in of(rows, "topk_f32"):
        scores = seen(row["T"], row["E"], dtype="float32", size=4)
        assert price("topk", [scores], [scores], kernels) == pytest.approx(row["s"], rel=0.45)
    for row in of(rows, "sort_flat"):
        ids = seen(row["T"] * row["K"], dtype="int64", size=8)
        assert price("sort", [ids], [ids, ids], kernels) == pytest.approx(row["s"], rel=0.2)
    for row in of(rows, "bincount"):
        ids = seen(row["T"] * row["K"], dtype="int64", size=8)
        assert price("bincount", [ids], [seen(row["E"], dtype="int64", size=8)], kernels) == pytest.approx(
            row["s"], rel=0.2
        )


def test_pieces_side_by_side_and_copies_into_another_order(rows: Rows, kernels: KernelModel) -> None:
    """Rotary halves: their sign is turned in a kernel of its own, which is measured apart."""
    halves = {tuple(row["shape"]): row["s"] for row in of(rows, "neg_half")}
    for row in of(rows, "cat_halves"):
        *outer, width = row["shape"]
        half = seen(*outer, width // 2)
        joined = price("cat", [half, half], [seen(*outer, width)], kernels, facts={"strided": True})
        assert joined == pytest.approx(row["s"] - halves[tuple(row["shape"])], rel=0.1)
    for row in of(rows, "contiguous_transposed"):
        whole = seen(*row["shape"])
        assert price("clone", [whole], [whole], kernels, facts={"strided": True}) == pytest.approx(row["s"], rel=0.1)


def test_long_rows_of_a_softmax_and_scans_across_rows(rows: Rows, kernels: KernelModel) -> None:
    for row in of(rows, "softmax_scores"):
        batch, _, length, _ = row["shape"]
        scores = seen(batch, row["scores"], length, length)
        assert price("_softmax", [scores], [scores], kernels) == pytest.approx(row["s"], rel=0.25)
    for row in of(rows, "cumsum_TE"):
        counts = seen(row["T"], row["E"], dtype="int64", size=8)
        assert price("cumsum", [counts], [counts], kernels, facts={"steps": row["T"]}) < 1.05 * row["s"]
