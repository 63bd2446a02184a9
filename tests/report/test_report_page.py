"""The HTML report: complete, self-contained, and deaf to hostile names."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from moesim.report import facts
from moesim.report.categories import CATEGORIES as DRAWN
from moesim.report.report import render
from moesim.results.spans import CATEGORIES
from moesim.results.store import RunRecord

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
