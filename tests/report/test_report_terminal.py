"""The terminal: the numbers of the record in one screen, whatever the width and the encoding."""

import io

import pytest

from moesim.report import facts, print_facts
from moesim.results.store import RunRecord


def printed(record: RunRecord, *, width: int | None) -> str:
    file = io.StringIO()
    print_facts(record.result, file=file, width=width)
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160, None])
def test_all_facts_fit_on_one_screen(make_record, width: int | None) -> None:
    record = make_record()
    text = printed(record, width=width)
    for table in (facts.headline, facts.communication, facts.balance, facts.training, facts.sources):
        for fact in table(record.result):
            assert fact.label in text
            assert fact.value in text
    for category, seconds, share in facts.attribution(record.result):
        if share >= 0.01:
            assert category.label in text
            assert facts.seconds(seconds) in text
    assert "…" not in text, "nothing is cut off"
    assert record.result["warnings"][0] in " ".join(text.split())
    assert len(text.splitlines()) <= 45
    assert max(map(len, text.splitlines())) <= (width or 100)


def test_a_pipe_gets_plain_text(make_record) -> None:
    assert "\x1b" not in printed(make_record(), width=None)


def test_names_are_not_markup(make_record) -> None:
    record = make_record()
    result = record.result | {"scenario_name": "[bold]x[/bold]", "warnings": ["see [red]here[/red]"]}
    file = io.StringIO()
    print_facts(result, file=file)
    assert "[bold]x[/bold]" in file.getvalue()
    assert "[red]here[/red]" in file.getvalue()


def test_an_ascii_terminal_gets_ascii(make_record) -> None:
    buffer = io.BytesIO()
    with io.TextIOWrapper(buffer, encoding="ascii") as file:
        print_facts(make_record().result, file=file)
        file.flush()
        assert b"####" in buffer.getvalue()


def test_shares_of_the_attribution_add_up_to_one(make_record) -> None:
    assert sum(share for _, _, share in facts.attribution(make_record().result)) == pytest.approx(1.0, abs=1e-12)


def test_what_ifs_stand_below_with_their_reasons(make_record) -> None:
    record = make_record()
    step_s = record.result["step_time_s"]
    asked = [
        {"label": "twice the network", "step_time_s": 0.9 * step_s, "difference_s": -0.1 * step_s,
         "usd_per_million_tokens": 0.0109, "note": ""},
        {"label": "no overlap", "step_time_s": None, "difference_s": None, "usd_per_million_tokens": None,
         "note": "nothing overlaps"},
    ]  # fmt: skip
    record.result["what_if"] = asked
    text = printed(record, width=100)
    assert "-10.0 %" in text
    assert "$0.0109" in text
    assert "no overlap: nothing overlaps" in text
