"""The table of known errors: what ships is what the profiles tell, and every kernel that can be priced has a row."""

import math

import numpy as np
import pytest

from moesim.kernels import SOURCES, kernel_model
from moesim.kernels.error_study import LEAST_SECONDS, left_out
from moesim.kernels.error_table import KIND_OUT, STANDS_FOR, TABULATED, kind_misses, kinds_left_out, left_out_errors
from moesim.kernels.errors import NETWORK, KnownError, bases_of, known_error, known_error_of, known_errors, transfers_of
from moesim.kernels.families import Gemm, MemoryBound, error_family
from moesim.kernels.loading import load_profile
from moesim.network.parameters import Evidence

FAMILIES = (
    *("gemm", "gemm fp8", "grouped_gemm", "grouped_gemm fp8", "attention"),
    *("memory_bound", "memory_bound searching"),
)


def agree(again: list[KnownError]) -> None:
    shipped = {(row.basis, row.source, row.family): row for row in known_errors()}
    assert len(shipped) == len(known_errors()), "one row for each"
    for row in again:
        known = shipped[row.basis, row.source, row.family]
        assert (row.count, row.how, row.apart) == (known.count, known.how, known.apart)
        for number in ("median", "p50", "p90"):
            assert getattr(row, number) == pytest.approx(getattr(known, number), abs=2e-4)


def test_a_part_of_the_shipped_table_is_what_the_profiles_tell():
    """`python tools/kernel_errors.py` computes all of it again."""
    again = [row for name in ("a100", "l40s") for row in left_out_errors(name) if row.source == "interpolated"]
    assert len(again) == 5
    agree(again)


@pytest.mark.slow
def test_kinds_left_out_are_what_the_profiles_tell():
    again = list(kinds_left_out("scaled", ("h100", "h200", *TABULATED), kind_misses, KIND_OUT))
    assert {row.family for row in again} == set(FAMILIES) - {"grouped_gemm fp8"}
    agree(again)


def test_every_gpu_source_and_family_has_an_error():
    for gpu in ("h200", "b200", "mi300x"):
        bases = bases_of(kernel_model(gpu))
        for source in SOURCES:
            for family in FAMILIES:
                assert 0 < known_error(bases, source, family).half_width < 5
        for evidence in Evidence:
            assert 0 < known_error(bases, NETWORK, transfers_of(evidence)).half_width < 5
    assert bases_of(kernel_model("h200", "roofline")) == ("any",)


@pytest.mark.parametrize("family", ["gemm", "grouped_gemm", "attention", "memory_bound"])
def test_measured_kernels_are_known_better_than_scaled_ones_and_those_better_than_by_the_roofline(family):
    own, other = (bases_of(kernel_model(gpu)) for gpu in ("h200", "mi300x"))
    measured, interpolated = (known_error(own, source, family).half_width for source in ("measured", "interpolated"))
    scaled, roofline = (known_error(other, source, family).half_width for source in ("scaled", "roofline"))
    assert measured < interpolated < scaled < roofline


def test_a_gpu_of_the_measured_chip_has_its_errors():
    """H800 is H100 with other links: its kernels are scaled in name only."""
    own, same = bases_of(kernel_model("h100")), bases_of(kernel_model("h800"))
    assert known_error(same, "scaled", "gemm") == known_error(own, "interpolated", "gemm")
    assert known_error(bases_of(kernel_model("h20")), "scaled", "gemm").basis == "scaled"


def test_a_kind_is_never_predicted_from_itself():
    assert all(kind != base for kind, base in STANDS_FOR.items())


def test_every_kind_counts_as_much_however_many_rows_it_has():
    few, many = np.full(10, 1.0), np.full(990, 0.0)
    found = known_error_of([few, many], basis="x", source="scaled", family="gemm", how="")
    assert found.p90 == 1.0 and found.count == 1000
    alone = known_error_of([np.array([-0.2, 0.1])], basis="x", source="scaled", family="gemm", how="", apart=0.3)
    assert alone.half_width == pytest.approx(math.hypot(alone.p90, 0.3))


def test_the_studies_leave_short_kernels_out_and_know_their_families():
    model = load_profile("a100").tables
    rows = [row for row in model.profile.rows if row["family"].startswith("gemm") and row["p50"] >= LEAST_SECONDS]
    found = [misses for misses in left_out(model) if misses.family.startswith("gemm") and misses.source != "measured"]
    assert sum(len(misses.logs_P) for misses in found) == len(rows)
    assert error_family(Gemm(1, 1, 1, dtype="fp8")) == "gemm fp8"
    assert error_family(MemoryBound("sort", 1e6)) == "memory_bound searching"
