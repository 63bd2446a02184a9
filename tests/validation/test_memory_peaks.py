"""Peaks that PyTorch's allocator reported on GPUs beside what the memory model says of the same rows."""

import numpy as np
import pytest

from moesim.parallel.memory.report import memory_report
from moesim.parallel.memory.rows import RoutedRows
from moesim.scenario import Scenario
from moesim.scenario.schema import Memory
from moesim.validation.comparison import SHIPPED_TABLES, Row, shipped_table


def rows_of(scenario: Scenario, rows: list) -> RoutedRows:
    """Rows as a real run counted them, by rank, micro-batch, layer and expert, as the memory model wants them."""
    sent_RBLE = np.asarray(rows, dtype=float)
    ranks, micro_batches, layers, experts = sent_RBLE.shape
    group = scenario.parallelism.expert
    computed_LBR = np.zeros((layers, micro_batches, ranks))
    out_LBR = sent_RBLE.sum(axis=3).transpose(2, 1, 0)
    for rank in range(ranks):
        first = rank - rank % group
        own = slice(rank % group * experts // group, (rank % group + 1) * experts // group)
        computed_LBR[:, :, rank] = sent_RBLE[first : first + group, :, :, own].sum(axis=(0, 3)).T
    return RoutedRows(
        rows_SLBW=computed_LBR[None], copies_out_SLBW=out_LBR[None].copy(), copies_in_SLBW=computed_LBR[None]
    )


def error(row: Row) -> float:
    """Predicted / measured - 1 of the bytes that tensors took, of the fullest rank."""
    scenario = row.case.scenario.model_copy(update={"memory": Memory(reserved="0 B", allocator_overhead=0)})
    predicted = memory_report(scenario, rows_of(scenario, row.measured["rows"])).peak_bytes
    return predicted / row.measured["memory_bytes"] - 1


@pytest.mark.parametrize("name", SHIPPED_TABLES)
def test_no_peak_is_more_than_a_hundredth_low(name: str) -> None:
    errors = {row.case.name: error(row) for row in shipped_table(name).rows if row.measured.get("memory_bytes")}
    assert errors
    assert min(errors.values()) > -0.002, errors
    assert max(errors.values()) < 0.006, errors
    assert abs(float(np.median(list(errors.values())))) < 0.005, errors


def test_the_parts_of_the_peak_add_up_to_it() -> None:
    for row in shipped_table("h100-last").rows:
        report = memory_report(row.case.scenario, rows_of(row.case.scenario, row.measured["rows"]))
        assert sum(report.parts[0].values()) == pytest.approx(report.peak_bytes, rel=1e-9)
