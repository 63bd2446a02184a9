"""`moesim plot`: where the page goes, what it never replaces, and one line for every mistake."""

import json
import shutil
from pathlib import Path

import pytest

from moesim.cli import main, studies
from moesim.report.plots import drawing
from moesim.sweeper.study import PLOT_KINDS

AXIS = {"keys": ["workload.micro_batch"], "values": [[1], [2]], "labels": None, "repeat": False}
SWEEP = {"schema_version": 1, "kind": "sweep", "name": "sizes", "num_points": 2, "plot": None, "axes": [AXIS]}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module are kept."""
    return tmp_path_factory.mktemp("plot")


@pytest.fixture
def runs(kept: Path, scenario: Path) -> tuple[Path, Path]:
    """Two real runs of the small scenario, with one and with two sequences in a micro-batch, simulated once."""
    folders = Path("runs/small"), Path("runs/double")
    for folder, size in zip(folders, (1, 2), strict=True):
        if not (kept / folder.name).exists():
            command = ["run", str(scenario), "--set", f"workload.micro_batch={size}", "--out", str(kept / folder.name)]
            assert main([*command, "--quiet"]) == 0
        folder.mkdir(parents=True)
        for name in ("result.json", "scenario.yaml"):
            shutil.copy(kept / folder.name / name, folder)
    return folders


def sweep_of(runs: tuple[Path, Path]) -> Path:
    """The folder of a sweep that holds the results of the two runs."""
    folder = Path("runs/sweep")
    folder.mkdir()
    (folder / "study.json").write_text(json.dumps(SWEEP))
    with (folder / "points.jsonl").open("w") as file:
        for number, run in enumerate(runs, start=1):
            line = {"id": str(number), "number": number, "values": {"workload.micro_batch": number}, "status": "done",
                    "reason": None, "pid": 1, "seconds": 0.1, "result": json.loads((run / "result.json").read_text()),
                    "scenario_file": None}  # fmt: skip
            file.write(json.dumps(line) + "\n")
    return folder


def test_two_runs_are_compared_and_a_sweep_is_drawn(runs: tuple[Path, Path], moesim) -> None:
    answer = moesim("plot", *runs)
    assert (answer.code, answer.out) == (0, "plotted in plot.html\n")
    text = Path("plot.html").read_text()
    assert "workload.micro_batch" in text and "What made the difference" in text
    sweep = sweep_of(runs)
    assert moesim("plot", sweep, "--quiet").out == ""
    assert "figure-0" in (sweep / "plot.html").read_text()
    assert moesim("plot", sweep, "--points", "1,2", "--out", "pair.html").code == 0
    assert "point 1 and point 2" in Path("pair.html").read_text()
    assert moesim("plot", sweep, runs[0], "--kind", "cost_performance", "--out", "mixed.html").code == 0


def test_another_page_is_replaced_only_by_force(runs: tuple[Path, Path], moesim) -> None:
    sweep = sweep_of(runs)
    assert moesim("plot", sweep).code == 0
    before = (sweep / "plot.html").read_bytes()
    assert moesim("plot", sweep).code == 0, "the same page again is no mistake"
    other = ("plot", sweep, "--y", "mfu.causal")
    answer = moesim(*other)
    assert answer.code == 1 and "--force" in answer.complaint
    assert (sweep / "plot.html").read_bytes() == before
    assert moesim(*other, "--force").code == 0
    assert (sweep / "plot.html").read_bytes() != before


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["runs/none"], "no such folder"),
        (["runs"], "name them, e.g. runs/"),
        (["small.yaml"], "not a folder"),
        (["runs/small"], "one run alone"),
        (["runs/small", "runs/double", "--kind", "curve"], "invalid choice: 'curve'"),
        (["runs/small", "runs/double", "--kind", "cost_performance", "--y", "mfu.cusal"], "did you mean 'mfu.causal'"),
        (["runs/small", "runs/double", "--points", "3"], "write --points 3,7"),
        (["runs/small", "runs/double", "--points", "1,2"], "needs one folder of a sweep or plan"),
        (["runs/small", "runs/double", "--out", "runs"], "is a folder"),
        (
            ["runs/small", "runs/double", "--out", "page"],
            "page does not end in .html, as a page must; use --out page.html",
        ),
        ([], "RUNS"),
    ],
)
def test_mistakes_are_one_line(runs: tuple[Path, Path], moesim, argv: list[str], said: str) -> None:
    answer = moesim("plot", *argv)
    assert answer.code == 1
    assert said in answer.complaint
    assert not list(Path().glob("**/plot.html"))


def test_flags_and_studies_know_the_kinds_that_are_drawn() -> None:
    assert studies.PLOT_KINDS == drawing.KINDS
    assert set(PLOT_KINDS) == set(studies.PLOT_KINDS) - {drawing.COMPARISON}, "a study has more than two points"


def test_deployments_are_drawn_and_their_answers_are_shown_before_a_file_is_in_the_way(scenario: Path, moesim) -> None:
    serve = ("serve", "qwen3-30b-one-h100", "--set", "model.layers=2", "--set")
    first = moesim(*serve, "workload.requests=6")
    folder = Path("runs/qwen3-30b-one-h100")
    assert first.code == 0 and json.loads((folder / "serve.json").read_text())["requests"] == 6
    again = moesim(*serve, "workload.requests=7")
    assert again.code == 1 and "7" in again.out and "exists and differs" in again.err
    assert moesim("plot", folder, folder / "serve.json", "--x", "ttft_s.p90").out == "plotted in plot.html\n"
    assert "is for runs of training" in moesim("plot", folder, "--kind", "curves").complaint
    assert "not of serving" in moesim("plot", folder, "runs").complaint
