"""`moesim plan`: what a person sees, what a program reads, and the exit codes."""

import csv
import io
import json
import shutil

import pytest
import yaml
from plan_cases import PLAN, changed

from moesim.cli import main
from moesim.planner.outcome import STAGES
from moesim.report.plan_view import STAGE_WORDS, layout_words

QUICK = {
    "choices.gpus": [2],
    "choices.capacity": [{"kind": "expert", "factor": 1.0}],
    "choices.recompute": ["none"],
    "search": {"simulate": 2, "check": 1},
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(yaml.safe_dump(changed(PLAN, QUICK)))
    return path


@pytest.fixture(scope="module")
def made(file):
    """The folder of the plan, made."""
    out = file.parent / "out"
    assert main(["plan", str(file), "--out", str(out), "--workers", "1", "--quiet"]) == 0
    return out


def test_a_plan_is_printed_and_read_back(file, made, capsys):
    out, points = made, (made / "points.jsonl").read_bytes()
    assert main(["plan", str(file), "--out", str(out), "--workers", "1"]) == 0
    screen = capsys.readouterr().out
    for words in (
        "what was looked at",
        "layouts by simulated cost",
        "why it wins",
        "what would alter the choice",
        "mb: sequences",
        "estimates rest on the routing",
        "rows that they drop, and so do not compute for their price: 1: ",
    ):
        assert words in screen
    assert max(map(len, screen.splitlines()[:-1])) <= 100  # the last line holds the path
    assert (out / "points.jsonl").read_bytes() == points, "nothing is simulated again"
    assert main(["plan", str(file), "--out", str(out), "--workers", "1", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    stored = json.loads((out / "plan.json").read_text())
    assert content["ranking"] == stored["ranking"]
    assert stored["routing"]["rests_on"] in screen
    assert stored["kind"] == "plan"
    assert main(["plan", str(file), "--out", str(out), "--workers", "1", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["id"] for row in rows if row["rank"]] == stored["ranking"]
    assert [float(row["usd"]) for row in rows] == [stored["outcomes"][row["id"]]["usd"] for row in rows]
    assert {"goal", "counts", "front", "ranking", "why", "sensitivity", "baseline", "screen_error"} <= stored.keys()
    assert main(["plan", str(file), "--out", str(out), "--quiet", "--set", "goal.usd=99"]) == 1
    assert "holds another plan" in capsys.readouterr().err


def test_what_cannot_be_reached_ends_with_2_and_one_line(file, tmp_path, capsys):
    code = main(["plan", str(file), "--out", str(tmp_path / "out"), "--set", "memory.reserved=300 GB", "--quiet"])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1
    assert "memory: the smallest layout needs" in captured.err


def test_a_mistake_ends_with_1(file, tmp_path, capsys):
    assert main(["plan", str(file), "--out", str(tmp_path / "out"), "--set", "choices.exprt=[1]"]) == 1
    assert "unknown key" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "no.yaml")]) == 1
    assert "cannot read the plan" in capsys.readouterr().err
    assert main(["plan", str(file), "--workers", "0"]) == 1
    assert "use 1 or more" in capsys.readouterr().err
    assert main(["plan", str(file), "--workers", "2", "--cluster", "tcp://127.0.0.1:1"]) == 1
    assert "leave it out beside --cluster" in capsys.readouterr().err


def test_layouts_are_told_in_short_words():
    values = {
        "cluster.gpu": "h100",
        "gpus": 16,
        "parallelism.pipeline": 2,
        "parallelism.data": 8,
        "parallelism.tensor": 1,
        "workload.micro_batch": 1,
        "parallelism.zero": {"dense": 1, "expert": 0},
        "parallelism.schedule": {"kind": "interleaved", "virtual": 2},
        "capacity": {"kind": "device", "factor": 1.5},
        "workload.recompute": ["swiglu"],
        "routing.router.group_limit": 3,
    }
    words = layout_words(values)
    assert words == "pp2 dp8 mb1 zero1/0 interleaved(virtual=2) device(factor=1.5) recompute=swiglu M3"


def test_every_reason_of_a_rejection_has_its_words():
    assert list(STAGE_WORDS) == list(STAGES)


def test_every_layout_comes_as_flags_when_asked(file, made, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(made, out)
    assert main(["plan", str(file), "--out", str(out), "--workers", "1", "--flags", "megatron"]) == 0
    screen = capsys.readouterr().out
    stored = json.loads((out / "plan.json").read_text())
    commands = {key: outcome["flags"]["megatron"]["command"] for key, outcome in stored["outcomes"].items()}
    assert commands[stored["ranking"][0]] in screen
    assert main(["plot", str(out), "--out", str(tmp_path / "plot.html"), "--quiet"]) == 0
    page = (tmp_path / "plot.html").read_text()
    assert page.count("flags for Megatron-LM") == len(stored["ranking"])
    capsys.readouterr()
    assert main(["plan", str(file), "--out", str(out), "--workers", "1", "--csv", "--flags", "megatron"]) == 0
    assert "pretrain_gpt" not in capsys.readouterr().out
