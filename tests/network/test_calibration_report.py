"""What `moesim calibrate --report` says of collectives: rows that follow the law have no error, others have theirs."""

from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from moesim.kernels import load_profile
from moesim.network.calibration import measured_parameters
from moesim.network.calibration_report import call_errors, call_table, predicted_seconds, seen_bandwidth

BANDWIDTH = 450e9
Row = dict[str, Any]


def made_up(factor: float) -> list[Row]:
    """The h100 profile's collectives as its own constants predict them, those kept out `factor` times as long."""
    rows: list[Row] = [row for row in load_profile("h100").collectives if "max_ctas" not in row]
    parameters = measured_parameters(rows, link_bandwidth=BANDWIDTH, source="", kind="h100")
    assert parameters is not None
    found = []
    for row in rows:
        seconds = predicted_seconds(row, parameters, link_bandwidth=BANDWIDTH, kind="h100")
        assert seconds is not None and seconds > 0
        found.append(row | {"p50": seconds * (factor if row.get("held_out") else 1.0)})
    return found


@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_errors_are_those_of_the_rows_kept_out(factor: float) -> None:
    found = call_errors(made_up(factor), link_bandwidth=BANDWIDTH, kind="h100")
    assert {each.kind for each in found} >= {"all_to_all", "all_to_all_uneven", "all_reduce", "send_recv", "exchange"}
    for each in found:
        if each.kind != "exchange":  # in no fit either, but not all of its rows are marked
            assert each.errors and max(abs(error - (factor - 1.0)) for error in each.errors) < 0.03, each


def test_a_gpu_of_no_catalogue_is_known_by_its_fastest_message() -> None:
    assert seen_bandwidth(load_profile("h100").collectives) == pytest.approx(BANDWIDTH, rel=0.02)


def test_without_rows_there_is_nothing_to_say() -> None:
    assert call_errors([], link_bandwidth=BANDWIDTH, kind=None) == []
    parameters = measured_parameters(load_profile("h100").collectives, link_bandwidth=BANDWIDTH, source="")
    assert parameters is not None
    row = {"kind": "all_reduce", "bytes": 1 << 20, "ranks": 2}
    assert predicted_seconds(row, replace(parameters, own=()), link_bandwidth=BANDWIDTH, kind=None) is None


def test_the_table_has_constants_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    """Below that of the kernels, which tests/kernels/test_compute_benchmarks.py prints."""
    found = call_errors(load_profile("h100").collectives, link_bandwidth=BANDWIDTH, kind="h100")
    Console(width=96).print(call_table(found, title="NCCL's calls"))
    printed = capsys.readouterr().out
    for words in ("NCCL's calls", "send_recv x2", "an SM of exchanges", "median / worst"):
        assert words in printed
