"""The whole step in the report: the pipeline as it ran, and the memory of its ranks."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from moesim.report import facts
from moesim.report.report import PARTS, by_kind, render
from moesim.report.timeline import BACKWARD, FORWARD, INPUT, PAIR, WEIGHT, gantt, idle_share
from moesim.results import CATEGORIES
from moesim.run import simulate


def pipeline_of(small, kind: str):
    return simulate(
        small(
            {
                "cluster": {"gpu": "h200", "nodes": 1, "gpus_per_node": 4},
                "parallelism": {"data": 2, "pipeline": 2, "expert": 2, "schedule": {"kind": kind}},
                "workload": {"sequence_length": 1024, "micro_batch": 1, "global_batch": 8},
            }
        )
    )


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        ("1f1b", {FORWARD: 8, BACKWARD: 8}),
        ("zb_h1", {FORWARD: 8, INPUT: 8, WEIGHT: 8}),
        ("gpipe", {FORWARD: 8, BACKWARD: 8}),
    ],
)
def test_the_chart_holds_every_pass_once(small, kind: str, passes: dict[str, int]) -> None:
    bars = gantt(pipeline_of(small, kind).pipeline_spans)
    counted = Counter(bar.kind for bar in bars if bar.kind in (FORWARD, BACKWARD, INPUT, WEIGHT, PAIR))
    assert counted == passes
    for rank in range(2):
        own = sorted((bar.start, bar.finish) for bar in bars if bar.pipeline_rank == rank and bar.micro_batches)
        assert all(before[1] <= after[0] + 1e-12 for before, after in pairwise(own))


def test_pairs_are_drawn_as_pairs(small) -> None:
    bars = gantt(pipeline_of(small, "dualpipe").pipeline_spans)
    pairs = [bar for bar in bars if bar.kind == PAIR]
    assert pairs
    assert all(len(bar.micro_batches) == 2 for bar in pairs)


def test_gaps_of_the_chart_are_the_bubble_of_the_attribution(small) -> None:
    """Attribution also counts gaps inside actions, p2p sends apart; here both are small beside the schedule's gaps."""
    record = pipeline_of(small, "gpipe")
    bars = gantt(record.pipeline_spans)
    seconds_CPW = record.arrays["attribution_CW"].reshape(len(CATEGORIES), 2, -1)
    waiting_P = seconds_CPW[[CATEGORIES.index(name) for name in ("bubble", "pipeline")]].sum(axis=0).mean(axis=1)
    passes = [bar for bar in bars if bar.micro_batches]
    length = max(bar.finish for bar in passes) - min(bar.start for bar in passes)
    idle_P = np.array([idle_share(bars, pipeline_rank=rank) * length for rank in range(2)])
    assert idle_P == pytest.approx(waiting_P, rel=0.15)


def test_the_report_of_a_pipeline_shows_it(small) -> None:
    record = pipeline_of(small, "1f1b")
    page = render(record)
    assert 'id="pipeline-plot"' in page
    assert "under the 1f1b schedule" in page
    peaks = record.result["memory"]["peak_bytes_by_pipeline_rank"]
    for peak in peaks:
        assert facts.bytes_column(peaks)(peak) in page


def test_without_a_pipeline_there_is_no_chart_but_memory(make_record) -> None:
    page = render(make_record())
    assert 'id="pipeline-plot"' not in page
    assert 'id="memory-plot"' in page
    assert "88 % of the routing samples fit" in page


def test_every_part_of_memory_has_a_kind(small) -> None:
    memory = pipeline_of(small, "dualpipe").result["memory"]
    for parts, peak in zip(memory["parts_bytes_by_pipeline_rank"], memory["peak_bytes_by_pipeline_rank"], strict=True):
        kinds = by_kind(parts)
        assert set(kinds) == set(PARTS)
        assert sum(kinds.values()) == pytest.approx(peak, rel=1e-9)


def test_the_memory_line_names_the_fullest_rank(make_record) -> None:
    result = make_record().result
    memory = result["memory"] | {
        "peak_bytes_by_pipeline_rank": [40e9, 50e9],
        "capacity_bytes_by_pipeline_rank": [80e9, 80e9],
        "fullest_pipeline_rank": 1,
    }
    line = facts.memory(result | {"memory": memory})
    assert (line.value, line.note) == ("50 GB", "of 80 GB on pipeline rank 1; 88 % of samples fit")
