"""Peaks of a trainer of fused kernels, measured on H100s (tools/measure_fused_peaks.py), beside `fused`."""

import gzip

import numpy as np
import pytest
from fused_peak_table import DATA, as_scenario, peaks, predicted

import moesim
from moesim.parallel.memory.libraries import WORKSPACE_BYTES
from moesim.parallel.memory.report import memory_report
from moesim.parallel.memory.rows import even_rows
from moesim.parallel.memory.temporaries import attention_moment
from moesim.strict_json import parse_json

FOUND = list(peaks())
LIBRARIES = parse_json(gzip.decompress(DATA.read_bytes()))["libraries"]


def test_no_peak_is_more_than_a_five_hundredth_low_nor_a_tenth_high() -> None:
    errors = {peak.name: peak.error for peak in FOUND}
    assert len(errors) == 48
    assert sum(peak.blind for peak in FOUND) == 30
    assert min(errors.values()) > -0.002, errors
    assert max(errors.values()) < 0.1, errors
    assert abs(np.median([peak.error for peak in FOUND if peak.blind])) < 0.005


def test_the_backward_pass_of_fused_attention_takes_what_was_measured() -> None:
    """The gradient of its result is there before, that of the residual stream is not in the measured number."""
    for row in LIBRARIES["attention"]:
        sizes = next(peak.row["case"]["sizes"] for peak in FOUND if peak.name == "heads")
        scenario = as_scenario(
            sizes | {name: row[name] for name in ("heads", "kv_heads", "head_dim")} | {"batch": 1, "sequence": 8192}
        )
        moment = attention_moment(scenario, kept_per_query=4.0)
        of_result = 2.0 * row["heads"] * row["head_dim"]
        expected = moment.token - 2.0 * scenario.model.hidden - of_result
        assert row["peak"] / row["tokens"] == pytest.approx(expected, rel=0.005), row


def test_a_graph_of_the_step_takes_workspaces_of_its_own_and_no_more() -> None:
    graphs = [peak for peak in FOUND if "error" not in peak.graph]
    assert len(graphs) == 40
    for peak in graphs:
        more = peak.graph["allocated"] - peak.graph["held_before"]
        assert more == pytest.approx(WORKSPACE_BYTES, rel=0.01), peak.name
        assert peak.measured <= peak.graph["peak"] < peak.measured + 1.01 * more, peak.name
        assert abs(peak.graph["beside"] - peak.graph["beside_before"]) < 0.1e9, peak.name
    plain, graphed = (
        memory_report(scenario, even_rows(scenario)).peak_bytes
        for scenario in (
            moesim.load_scenario(
                "quickstart",
                {"implementation": {"kind": "fused", "cuda_graphs": graphs}, "routing": {"kind": "uniform"}},
            )
            for graphs in ("none", "step")
        )
    )
    assert graphed == pytest.approx(plain + WORKSPACE_BYTES)


def test_what_a_run_prints_covers_tensors_and_context_and_nearly_what_the_allocator_holds() -> None:
    for peak in FOUND:
        printed = predicted(peak.row["case"]["sizes"], memory={"check": "warn"}).peak_bytes
        assert printed > peak.measured + peak.row["beside"], peak.name
        assert printed > 0.95 * (peak.reserved + peak.row["beside"]), peak.name
        if "error" not in peak.graph:
            assert printed + WORKSPACE_BYTES > 0.95 * (peak.graph["reserved"] + peak.graph["beside"]), peak.name
