"""The Python interface: the examples of the documents run, and it gives what the command line gives."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest

import moesim
from moesim import api
from moesim.cli import main

ROOT = Path(__file__).parent.parent


def examples(document: str) -> list[str]:
    """The blocks of Python in a document."""
    return re.findall(
        r"^```python\n(.*?)^```$", (ROOT / document).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


def printed_by(code: str) -> list[str]:
    """The lines that the code prints; it sees no names but its own."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "example", "exec"), {"__name__": "example"})
    return out.getvalue().splitlines()


def numbers(line: str) -> list[float]:
    return [float(word) for word in re.findall(r"\d+(?:\.\d+)?", line)]


def test_the_example_of_the_readme_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = examples("README.md")
    shown = re.findall(r"^M = .*$", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    got = [numbers(line) for line in printed_by(example)]
    assert len(got) == len(shown) == 3
    for line, said in zip(got, map(numbers, shown), strict=True):
        assert line == pytest.approx(said, rel=0.01)
    assert [line[2] for line in got] == sorted({line[2] for line in got})  # more groups per token, more bytes
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_the_document_runs():
    (example,) = examples("docs/python.md")
    (line,) = printed_by(example)
    assert re.fullmatch(r"\d+\.\d{3} s, fullest expert \d\.\d\d times the mean", line)


def test_every_name_is_documented_and_is_that_of_the_api():
    assert moesim.__all__ == api.__all__
    assert {name for name in moesim.__all__ if name in dir(moesim)} == set(moesim.__all__)
    named = set(re.findall(r"`(\w+)", (ROOT / "docs/python.md").read_text(encoding="utf-8")))
    for name in moesim.__all__:
        assert getattr(moesim, name) is getattr(api, name)
        assert getattr(moesim, name).__doc__
        assert name in named or not name[0].islower()
    with pytest.raises(AttributeError, match="no attribute 'simulte'"):
        _ = moesim.simulte


def test_a_run_is_that_of_the_command_line(small, tmp_path, capsys):
    """Also from nested dicts, and once it is saved and read back."""
    scenario = small()
    run = moesim.simulate(scenario)
    folder = moesim.save_run(run, tmp_path / "saved")
    assert (folder / "report.html").is_file()
    assert main(["run", str(folder / "scenario.yaml"), "--out", str(tmp_path / "again"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == run.result == json.loads((folder / "result.json").read_text())
    again = moesim.simulate(moesim.load_scenario(scenario.model_dump(mode="json")))
    assert again.result["step_time_s"] == run.result["step_time_s"]
    assert moesim.load_trace(folder / "trace.npz").router == run.trace.router
    with pytest.raises(moesim.UserError, match="holds another run"):
        moesim.save_run(run, folder)


def test_overrides_are_those_of_set(tmp_path):
    scenario = moesim.load_scenario("quickstart", {"workload.global_batch": 64, "routing": {"kind": "uniform"}})
    assert (scenario.workload.global_batch, scenario.routing.kind) == (64, "uniform")
    with pytest.raises(moesim.UserError, match="seeed"):
        moesim.load_scenario("quickstart", {"seeed": 1})
    with pytest.raises(moesim.InfeasibleError):
        moesim.load_scenario("quickstart", {"cluster.gpus_per_node": 4})


def test_a_sweep_returns_the_records_of_its_points(small, tmp_path):
    moesim.save_run(moesim.simulate(small()), tmp_path / "base")
    study = tmp_path / "study.yaml"
    study.write_text("name: two\nbase: base/scenario.yaml\naxes:\n- {key: seed, values: [0, 1]}\n")
    records = moesim.sweep(study, out=tmp_path / "out", workers=1)
    assert [record.values for record in records] == [{"seed": 0}, {"seed": 1}]
    assert records[0].result["step_time_s"] == moesim.simulate(small({"seed": 0})).result["step_time_s"]
    assert moesim.sweep(study, out=tmp_path / "out") == records  # nothing is simulated again


def test_shipped_routing_and_gpus_are_objects():
    assert moesim.load_trace("library:64x6/M2").router.num_experts == 64
    assert {gpu.name: gpu.memory_bytes for gpu in moesim.gpus()}["a100"] == 80 * 2**30
