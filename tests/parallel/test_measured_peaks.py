"""Peaks of transformers' models that were measured on an H100 (tools/measure_peaks.py) beside the prediction."""

import gzip

import numpy as np
import pytest
from measure_peaks import Case
from peak_table import DATA, as_scenario, peaks

from moesim.parallel.memory.report import memory_report
from moesim.parallel.memory.rows import even_rows
from moesim.strict_json import parse_json


def test_no_peak_is_more_than_a_two_hundredth_low_nor_a_fiftieth_high() -> None:
    found = list(peaks())
    errors = {peak.name: peak.error for peak in found}
    assert len(errors) == 34
    assert sum(peak.blind for peak in found) == 17
    assert {peak.moment for peak in found} == {"backward", "optimizer"}
    assert min(errors.values()) > -0.005, errors
    assert max(errors.values()) < 0.02, errors
    assert abs(np.median([peak.error for peak in found if peak.blind])) < 0.005


def test_what_a_run_prints_covers_tensors_context_and_libraries() -> None:
    """The allocator reserves more while there is room, and gives it back where there is none."""
    beside = {row["case"]["name"]: row["beside"] for row in parse_json(gzip.decompress(DATA.read_bytes()))["steps"]}
    found = list(peaks())
    for peak in found:
        assert peak.printed > peak.measured + beside[peak.name], peak.name
    assert 0.9 < np.median([peak.printed / peak.used for peak in found]) < 1.1


@pytest.mark.parametrize(
    ("changes", "grows"),
    [
        ({"optimizer": "foreach"}, True),
        ({"checkpointing": True}, False),
        ({"attention": "eager"}, True),
        ({"micro_batches": 2}, True),
    ],
)
def test_what_a_step_does_otherwise_moves_its_peak(changes: dict, grows: bool) -> None:
    row = next(
        row["case"]
        for row in parse_json(gzip.decompress(DATA.read_bytes()))["steps"]
        if row["case"]["name"] == ("olmoe-short" if "optimizer" in changes else "olmoe")
    )
    plain, other = (as_scenario(Case(**(row | more))) for more in ({}, changes))
    before, after = (memory_report(scenario, even_rows(scenario)).peak_bytes for scenario in (plain, other))
    assert (after > before) == grows
