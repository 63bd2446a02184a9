"""The terminal: the numbers of the record in one screen, whatever the width and the encoding.

A reader sees whose kernels a number rests on, and how well they are known.

The parts of a step: what is printed adds up to the step, and pairs appear where passes overlap.
"""

import io

import pytest

from moesim.report import facts
from moesim.report.run_view import print_facts, print_parts, step_parts
from moesim.results.store import RunRecord
from moesim.run import simulate
from moesim.scenario import load_scenario
from moesim.scenario.software import SOFTWARE


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


def test_every_software_says_how_its_list_came_and_what_checked_it() -> None:
    assert all(len(known.listed) > 20 and len(known.checked) > 20 for known in SOFTWARE.values())
    assert len({known.listed for known in SOFTWARE.values()}) == len(SOFTWARE)


def test_the_screen_names_the_software(make_record) -> None:
    for known in SOFTWARE.values():
        said = {"name": known.name, "listed": known.listed, "checked": known.checked}
        out = io.StringIO()
        print_facts(make_record().result | {"software": said}, file=out, width=1000)
        assert all(text in out.getvalue() for text in said.values())


def test_a_result_of_an_earlier_version_says_nothing(make_record) -> None:
    assert facts.software({key: value for key, value in make_record().result.items() if key != "software"}) == []


PIPELINE = (
    "cluster.nodes=2",
    "parallelism.pipeline=2",
    "workload.global_batch=64",
    "uncertainty.samples=1",
    "model.layers=8",
)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("1f1b", {"forward", "backward"}),
        ("zb_h1", {"forward", "backward, inputs", "backward, weights"}),
        ("dualpipe", {"forward", "forward and backward overlapped"}),
    ],
)
def test_parts_of_every_kind_of_schedule(kind: str, names: set[str]) -> None:
    record = simulate(
        load_scenario("scenarios/uniform-dropless.yaml", (*PIPELINE, f"parallelism.schedule.kind={kind}"))
    )
    parts = {part.name: part for part in step_parts(record)}
    assert names <= parts.keys()
    assert parts["optimizer"].total_s > 0
    idle = parts["idle (bubble, waiting for other ranks)"]
    assert 0 < idle.total_s < record.result["step_time_s"]
    alone = [part.total_s for name, part in parts.items() if "gradients" not in name]
    together = sum(alone) + parts["gradients and parameters between ranks"].total_s
    assert sum(alone) <= record.result["step_time_s"] * 1.001 <= together * 1.002  # reductions may lie beside passes
    out = io.StringIO()
    print_parts(record, file=out, width=100)
    assert all(name in out.getvalue() for name in names)
