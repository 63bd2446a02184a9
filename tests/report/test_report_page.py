"""The HTML report: complete, self-contained, and deaf to hostile names.

Behind it the whole step (the pipeline as it ran, and the memory of its ranks), and the placement of experts: the map
with its copies, loads before and after, and facts on both screens.
"""

import dataclasses
import io
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from moesim.report import facts
from moesim.report.categories import BACKWARD, FORWARD, INPUT, PAIR, WEIGHT
from moesim.report.categories import CATEGORIES as DRAWN
from moesim.report.facts import placement
from moesim.report.passes import gantt, idle_share
from moesim.report.placement_view import copies_of_slots, slot_map
from moesim.report.report import PARTS, by_kind, render
from moesim.report.run_view import print_facts
from moesim.results import CATEGORIES
from moesim.results.store import RunRecord
from moesim.run import simulate

LARGEST_FILE = 8_000_000
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;"
FETCHING = {"src", "href", "srcset", "data", "action", "poster", "formaction"}


class Document(HTMLParser):
    """What a browser would see: elements, attributes that fetch, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.fetched: list[str] = []
        self.handlers: list[str] = []
        self.words: list[str] = []
        self.styles: list[str] = []
        self.own_scripts: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        for name, value in attrs:
            self.fetched += [f"{tag} {value}"] if name in FETCHING else []
            self.handlers += [name] if name.startswith("on") else []
            self.ids |= {value} if name == "id" and value else set()

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        {"style": self.styles, "script": self.own_scripts}.get(inside, self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def record(make_record) -> RunRecord:
    return make_record()


@pytest.fixture(scope="module")
def page(record: RunRecord) -> str:
    return render(record)


def test_every_section_and_figure_is_there(page: str) -> None:
    document = Document(page)
    for title in (
        "Where the time goes",
        "Expert load",
        "Traffic between ranks",
        "Time per rank",
        "One layer, rank by rank",
        "The router",
    ):
        assert title in document.text
    figures = {
        "attribution",
        "expert-load",
        "traffic",
        "rank-time",
        "timeline",
        "loss",
        "imbalance",
        "imbalance-layers",
    }
    assert figures <= document.ids
    assert {f"{name}-plot" for name in figures} <= document.ids


def test_the_numbers_of_the_record_are_in_tables(page: str, record: RunRecord) -> None:
    text = Document(page).text
    tables = (facts.headline, facts.communication, facts.balance, facts.training, facts.sources, facts.samples)
    for table in tables:
        for fact in table(record.result):
            assert fact.label in text
            assert fact.value in text
    for category, seconds, share in facts.attribution(record.result):
        assert f"{category.label} {facts.seconds(seconds)} {facts.percent(share)}" in text


def test_nothing_is_fetched_from_anywhere(page: str) -> None:
    document = Document(page)
    assert document.fetched == []
    assert not re.search(r"url\(|@import", "".join(document.styles))
    own = [script for script in document.own_scripts if len(script) < 1_000_000]
    assert len(document.own_scripts) - len(own) == 1, "plotly is embedded once"
    assert not any(re.search(r"https?:|fetch\(|XMLHttpRequest|import\(", script) for script in own)
    assert len(page.encode()) < LARGEST_FILE


def test_hostile_texts_stay_texts(record: RunRecord) -> None:
    honest = Document(render(record))
    result = record.result | {
        "warnings": [HOSTILE],
        "router": record.result["router"] | {"kind": HOSTILE},
    }
    scenario = record.scenario.model_copy(
        update={
            "name": HOSTILE,
            "model": record.scenario.model.model_copy(update={"preset": HOSTILE, "source": HOSTILE}),
        }
    )
    assert record.trace is not None
    trace = dataclasses.replace(record.trace, provenance={HOSTILE: HOSTILE})
    document = Document(render(dataclasses.replace(record, result=result, scenario=scenario, trace=trace)))
    assert document.tags == honest.tags
    assert document.handlers == honest.handlers == []
    assert HOSTILE in document.text


def test_a_figure_cannot_end_its_script(page: str) -> None:
    assert page.count("</script>") == page.count("<script")


def test_a_router_that_was_not_trained_says_so(make_record) -> None:
    text = Document(render(make_record(trained=False))).text
    assert "was not trained here" in text
    assert "Imbalance of experts" in text


def test_a_missing_range_or_price_is_said_and_not_invented(record: RunRecord) -> None:
    cost = dict.fromkeys(record.result["cost"])
    result = record.result | {"step_time_range_s": None, "cost": cost}
    text = Document(render(dataclasses.replace(record, result=result))).text
    assert "no range: too few distinct sequences" in text
    assert "give cluster.price_per_gpu_hour to know it" in text


def test_what_sums_round_off_is_no_waiting(record: RunRecord) -> None:
    seconds_CW = record.arrays["attribution_CW"].copy()
    seconds_CW[CATEGORIES.index("imbalance_wait")] = 1e-12 * seconds_CW.sum(axis=0)
    seconds_CW[CATEGORIES.index("bubble")] = 0.0
    page = render(dataclasses.replace(record, arrays={**record.arrays, "attribution_CW": seconds_CW}))
    assert "waiting 0 s 0 s 0 s 0 s" in Document(page).text


def test_a_large_run_stays_small(make_record) -> None:
    """64 ranks, 61 layers, 256 experts."""
    page = render(make_record(ranks=64, layers=58, experts=256))
    assert len(page.encode()) < LARGEST_FILE


def test_every_category_of_the_attribution_has_a_place() -> None:
    assert {category.key for category in DRAWN} == set(CATEGORIES)
    assert len({category.colour for category in DRAWN}) == len(DRAWN)


def test_an_unknown_category_is_shown_under_its_own_name(record: RunRecord) -> None:
    grown = record.result["attribution_s"] | {"new_part": 0.25}
    labels = [category.label for category, _, _ in facts.attribution(record.result | {"attribution_s": grown})]
    assert "new part" in labels


def test_trace_imbalance_is_the_busiest_expert_over_the_mean(make_record) -> None:
    trace = make_record().trace
    ids = trace.final.expert_ids_LSTK[0].ravel()
    expected = max(np.count_nonzero(ids == e) for e in range(64)) / (len(ids) / 64)
    assert facts.trace_imbalance(trace)[trace.final.step][0] == pytest.approx(expected, rel=1e-12)


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


def test_without_a_pipeline_there_is_no_chart_but_memory(page: str) -> None:
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
