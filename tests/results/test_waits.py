"""Who waited for whom: the matrix adds up to the waits of the attribution and names the rank that came last."""

import numpy as np
import pytest

import moesim
from moesim.report.report import render
from moesim.results import CATEGORIES, attribute, waited_for
from moesim.results.spans import Stream

pytestmark = pytest.mark.usefixtures("few_tokens")

WAIT = CATEGORIES.index("imbalance_wait")
SMALL = {"workload.global_batch": 8, "uncertainty.samples": 1, "compute.profile": "roofline"}


@pytest.mark.parametrize("name", ["stress-hot-rank", "stress-skewed"])
def test_the_matrix_adds_up_to_the_waits(name: str) -> None:
    record = moesim.simulate(moesim.load_scenario(name, SMALL | {"workload.micro_batch": 1}))
    (table,) = record.pipeline_spans
    assert "Exposed waiting, by who came last" in render(record)
    waits_RR = waited_for(table)
    np.testing.assert_allclose(waits_RR.sum(axis=1), attribute(table)[WAIT, 0], atol=1e-9)
    assert (waits_RR >= 0).all() and not np.diag(waits_RR).any()
    # Whoever is last in a transfer of all ranks is the one that they wait for.
    rows_N = table.rows(Stream.COMMUNICATION)
    last = np.bincount(table.start_NSR[rows_N, 0].argmax(axis=1), minlength=len(waits_RR)) > 0
    assert not waits_RR[:, :-1][:, ~last].any()
    assert waits_RR.sum() > 0


def test_equal_ranks_wait_for_nobody() -> None:
    (table,) = moesim.simulate(moesim.load_scenario("stress-balanced", SMALL)).pipeline_spans
    assert waited_for(table)[:, :-1].sum() < 1e-3 * float(table.step_S[0])
