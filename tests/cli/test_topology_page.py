"""`moesim topology` and `moesim volume`: a page beside the numbers, which replaces nothing by accident."""

import json
from pathlib import Path

import pytest

VERBS = ("topology", "volume")


@pytest.mark.parametrize("verb", VERBS)
def test_the_page_goes_into_the_folder_of_the_runs(scenario: Path, moesim, verb: str) -> None:
    answer = moesim(verb, scenario)
    page = Path(f"runs/small/{verb}.html")
    assert answer.code == 0
    assert answer.out.splitlines()[-1].endswith(f" in {page}")
    text = page.read_text()
    assert "Plotly" in text
    assert 'src="' not in text.split("</script>")[-1]
    assert not list(page.parent.glob("*.partial"))


@pytest.mark.parametrize("verb", VERBS)
def test_another_page_is_replaced_only_by_force(scenario: Path, moesim, verb: str) -> None:
    assert moesim(verb, scenario).code == 0
    page = Path(f"runs/small/{verb}.html")
    before = page.read_bytes()
    assert moesim(verb, scenario).code == 0, "the same page again is no mistake"
    other = ("--set", "cluster.gpus_per_node=4", "--set", "model.hidden=128")
    answer = moesim(verb, scenario, *other)
    assert answer.code == 1
    assert "--force" in answer.complaint
    assert page.read_bytes() == before
    assert moesim(verb, scenario, *other, "--force").code == 0
    assert page.read_bytes() != before


@pytest.mark.parametrize("verb", VERBS)
def test_json_writes_no_page_unless_asked(scenario: Path, moesim, verb: str) -> None:
    json.loads(moesim(verb, scenario, "--json").out)
    assert not Path("runs").exists()
    json.loads(moesim(verb, scenario, "--json", "--out", "page.html").out)
    assert Path("page.html").exists()


def test_volume_takes_sizes_and_limits(scenario: Path, moesim) -> None:
    points = json.loads(moesim("volume", scenario, "--json", "--devices", "2, 4", "--limits", "1,none").out)["points"]
    assert {(point["devices"], point["limit"]) for point in points} == {(2, 1), (4, 1), (2, None), (4, None)}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["volume", "small.yaml", "--devices", "2,x"], "--devices 8,16,32"),
        (["volume", "small.yaml", "--devices", "3"], "divisors of 8"),
        (["volume", "small.yaml", "--limits", "0"], "--limits 1,2,none"),
        (["volume", "small.yaml", "--set", "model={preset: llama2-7b}", "--set", "parallelism.expert=1"], "dense"),
        (["volume", "small.yaml", "--out", "."], "is a folder"),
        (
            ["volume", "small.yaml", "--out", "page.json"],
            "page.json does not end in .html, as a page must; use --out page.h",
        ),
        (["topology", "small.yaml", "--out", "page"], "use --out page.html"),
        (["topology", "small.yaml", "--out", "small.yaml/x.html"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line(scenario: Path, moesim, argv: list[str], said: str) -> None:
    answer = moesim(*argv)
    assert answer.code == 1
    assert said in answer.complaint
    assert not Path("runs").exists()
