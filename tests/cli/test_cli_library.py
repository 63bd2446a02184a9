"""`moesim trace library:...`: the list of shipped routing, and one entry."""

import io
import json
from pathlib import Path

import pytest

from moesim.report.catalogue_view import print_entries
from moesim.routing.request import TrainingRequest, checkpoint_path, trace_path
from moesim.scenario import load_scenario
from moesim.trace import load_trace
from moesim.trace.library import find_entry, library_entries


def test_all_entries_are_listed(moesim) -> None:
    answer = moesim("trace", "library:")
    assert answer.code == 0
    assert all(entry.name in answer.out for entry in library_entries())
    rows = json.loads(moesim("trace", "library:", "--json").out)
    assert [row["name"] for row in rows] == [entry.name for entry in library_entries()]


@pytest.mark.parametrize(("width", "columns"), [(80, 4), (92, 6)])
def test_the_list_fits_into_a_terminal(width: int, columns: int) -> None:
    file = io.StringIO()
    print_entries(library_entries(), file=file, width=width)
    lines = file.getvalue().splitlines()
    assert not any("…" in line or len(line) > width for line in lines)
    assert [len(line.replace(" %", "%").split()) for line in lines[1 : len(library_entries()) + 1]] == [columns] * len(
        library_entries()
    )
    assert "nats per byte" in lines[len(library_entries()) + 1]


def test_a_pattern_chooses_by_every_name(moesim) -> None:
    rows = json.loads(moesim("trace", "library:64x6/M*/seed0", "--json").out)
    names = {"M-unlimited", "M1", "M2", "M4", "published"}
    assert {row["name"] for row in rows} == {f"64x6/{name}/seed0" for name in names}


def test_one_entry_shows_its_losses_and_drift(moesim) -> None:
    answer = moesim("trace", "library:64x6/M2/seed1")
    entry = find_entry("64x6/M2/seed1")
    for text in ("64x6/M2/seed1", f"{entry.held_out_loss:.4f}", "at most 2 of 8 groups", "cpython-3.11.7-stdlib"):
        assert text in answer.out
    facts = json.loads(moesim("trace", "library:64x6/M2/seed1", "--json").out)
    assert facts["drift"][-1]["held_out_loss"] == entry.held_out_loss
    assert all(len(step["imbalance"]) == 2 and min(step["imbalance"]) >= 1 for step in facts["drift"])
    assert 1 < max(facts["distinct_groups_per_token"]) <= 2
    assert moesim("trace", "library:64x6/M2/seed1", "--quiet").out == ""


def test_an_entry_can_be_saved_as_a_file(moesim, tmp_path: Path) -> None:
    saved = tmp_path / "m2.npz"
    assert moesim("trace", "library:64x6/M2/seed1", "--out", saved, "--quiet").code == 0
    assert load_trace(saved).router.group_limit == 2
    assert "--force" in moesim("trace", "library:64x6/M2/seed1", "--out", saved).complaint
    said = moesim("trace", saved).complaint
    assert "is a routing trace, no scenario" in said and f"add --set 'routing={{kind: trace, file: {saved}}}'" in said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["library:64x6/M9"], "did you mean"),
        (["library:none*"], "no entry has such a name"),
        (["library:", "--out", "all.npz"], "name one entry"),
        (["library:64x6/M2", "--set", "seed=1"], "--set changes a scenario"),
    ],
)
def test_mistakes_are_one_line(moesim, arguments: list[str], complaint: str) -> None:
    answer = moesim("trace", *arguments)
    assert answer.code == 1
    assert complaint in answer.complaint


def test_checkpoints_lie_beside_the_traces(scenario: Path) -> None:
    trained = "routing={kind: train, router: {kind: deepseek_moe}}"
    request = TrainingRequest.from_scenario(load_scenario(scenario, [trained]))
    trace, checkpoint = trace_path(request), checkpoint_path(request)
    assert checkpoint.parent.parent == trace.parent.parent
