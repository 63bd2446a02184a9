"""The report's placement section: the map with its copies, loads before and after, and facts on both screens."""

import io

import numpy as np
import pytest

from moesim.report.facts import placement
from moesim.report.placement_view import copies_of_slots, slot_map
from moesim.report.report import render
from moesim.report.run_view import print_facts
from moesim.results.store import RunRecord
from moesim.run import simulate

HOT = {"routing": {"kind": "popularity", "counts": [40, *[1] * 15]}}
COPIES = {"placement": {"kind": "eplb", "redundant_experts": 4}}


_simulated: list[RunRecord] = []


@pytest.fixture
def records(small) -> list[RunRecord]:
    if not _simulated:
        _simulated.extend(simulate(small(HOT | changes)) for changes in ({}, COPIES))
    return _simulated


def test_copies_are_counted_per_layer_and_empty_slots_are_none() -> None:
    slots_LZ = np.array([[0, 1, 0, -1, 2], [2, 1, 0, 1, 1]])
    assert copies_of_slots(slots_LZ).tolist() == [[2, 1, 2, 0, 1], [1, 3, 1, 3, 3]]


def test_the_map_shows_every_slot_once(records) -> None:
    slots_LDP = records[1].arrays["placement_LDP"].astype(int)
    assert slots_LDP.shape == (3, 4, 5)  # layers with a router, ranks, slots of a rank
    figure = slot_map(slots_LDP, first_layer=1)
    (heat,) = figure.data
    assert list(heat.y) == [1, 2, 3]
    np.testing.assert_array_equal(heat.customdata[..., 0], slots_LDP.reshape(3, 20))
    np.testing.assert_array_equal(heat.customdata[0, :, 1], np.repeat(np.arange(4), 5))
    np.testing.assert_array_equal(np.minimum(heat.customdata[..., 2], 5), heat.z)
    assert len(figure.layout.shapes) == 3  # between four ranks


def test_the_section_is_there_where_experts_are_placed(records) -> None:
    plain, placed = map(render, records)
    for name in ("placement", "rank-load-before", "rank-load-after"):
        assert f'id="{name}-plot"' in placed and f'id="{name}-plot"' not in plain


def test_the_facts_say_what_was_gained(records) -> None:
    plain, placed = (record.result for record in records)
    assert placement(plain) == []
    found = {fact.label: fact.value for fact in placement(placed)}
    assert found["placement"] == "eplb" and found["copies"] == "4"
    facts = placed["placement"]
    assert facts["slots"] == 20 and facts["experts"] == 16 and facts["slots_per_rank"] == 5
    assert facts["placing_sequences"] + facts["simulated_sequences"] == plain["placement"]["simulated_sequences"]
    assert facts["rank_rows_contiguous"] > placed["imbalance"]["rank_rows"]
    assert facts["rank_rows_contiguous"] == pytest.approx(plain["imbalance"]["rank_rows"], rel=0.05)
    screen = io.StringIO()
    print_facts(placed, file=screen, width=120)
    assert "ranks, contiguous" in screen.getvalue() and "their gradients" in screen.getvalue()


def test_results_of_before_have_no_placement(records) -> None:
    assert placement({key: value for key, value in records[1].result.items() if key != "placement"}) == []
