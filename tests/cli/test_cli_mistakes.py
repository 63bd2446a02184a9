"""A mistake is one line with a remedy and exit code 1, or 2 when infeasible; nothing is written and nothing is lost."""

import subprocess
import sys
from pathlib import Path

import pytest

from moesim.recorded.step_file import RecordedOp, load_step, save_step

TENSOR = ((4096, 4096), "bfloat16", 2 * 4096**2)
OP = RecordedOp(name="mm", phase="forward", module="", reads=(TENSOR, TENSOR), writes=(TENSOR,))


def never(*args: object, **kwargs: object) -> None:
    raise AssertionError("the long work began")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["rnu", "small.yaml"], "unknown verb 'rnu'; did you mean 'run'?"),
        (["sweeep"], "unknown verb 'sweeep'"),
        (["run", "small.yaml", "--fo"], "unknown flag '--fo'; did you mean '--force'?"),
        (["run", "small.yaml", "--quite"], "did you mean '--quiet'?"),
        (["--versoin"], "did you mean '--version'?"),
        (["run"], "SCENARIO"),
        (["run", "small.yaml", "other.yaml"], "unexpected argument 'other.yaml'"),
        (["run", "small.yaml", "--set"], "--set"),
        (["run", "missing.yaml"], "missing.yaml"),
        (["run", "small.yaml", "--set", "seeed=1"], "seeed"),
        (["run", "small.yaml", "--set", "seed"], "key=value"),
        (["run", "small.yaml", "--set", "workload.global_batch=3"], "global_batch"),
        (["run", "small.yaml", "--out", "small.yaml"], "small.yaml"),
        (["run", "small.yaml", "--set", "routing={kind: trace, file: nowhere.npz}"], "nowhere.npz"),
        (["trace", "small.yaml", "--out", "small.yaml"], "--force"),
        (["trace", "small.yaml", "--set", "routing={kind: trace, file: small.yaml}"], "small.yaml"),
        (["model", "deepseek-v4"], "deepseek-v3"),
        (["model", "deepseek-v3", "--sequence-length", "0"], "--sequence-length"),
        (["topology", "small.yaml", "--out", "small.yaml", "--force"], "small.yaml does not end in .html"),
        (["calibrate", "--device", "cpu"], "--out"),
        (["calibrate", "--out", "p.json", "--budget", "-1"], "--budget"),
        (["calibrate", "--out", "p.json", "--device", "cpu", "--families", "gem"], "'gem'"),
        (["schema", "--out", "no/such/folder/schema.json"], "no/such/folder"),
    ],
)
def test_a_mistake_is_one_line(scenario: Path, moesim, monkeypatch, argv: list[str], said: str) -> None:
    before = {path: path.read_bytes() for path in scenario.parent.rglob("*") if path.is_file()}
    answer = moesim(*argv)
    assert answer.code == 1
    assert said in answer.complaint
    assert {path: path.read_bytes() for path in scenario.parent.rglob("*") if path.is_file()} == before


def test_more_ranks_than_gpus_is_infeasible(scenario: Path, moesim) -> None:
    answer = moesim("run", scenario, "--set", "cluster.gpus_per_node=1")
    assert answer.code == 2
    assert "GPU" in answer.complaint
    assert not (scenario.parent / "runs").exists()


def test_what_does_not_fit_runs_where_that_is_allowed(scenario: Path, moesim) -> None:
    large = ["run", str(scenario), "--set", "memory.reserved=1 TB"]
    assert moesim(*large).code == 2
    allowed = moesim(*large, "--allow-infeasible")
    assert allowed.code == 0
    assert "100% of the routing samples do not fit into memory" in allowed.out + allowed.err


def test_a_recorded_step_is_not_overwritten(tmp_path: Path, moesim) -> None:
    save_step(tmp_path / "step.json", [OP], source="here")
    (tmp_path / "other.json").write_text("kept")
    show = ["import-step", "--show", str(tmp_path / "step.json"), "--out", str(tmp_path / "other.json"), "--quiet"]
    answer = moesim(*show)
    assert answer.code == 1
    assert "--force" in answer.complaint
    assert (tmp_path / "other.json").read_text() == "kept"
    assert moesim(*show, "--force").code == 0
    assert load_step(tmp_path / "other.json") == ("here", [OP])


def test_a_step_that_looks_up_no_tokens_says_what_to_record(tmp_path: Path, moesim) -> None:
    save_step(tmp_path / "step.json", [OP], source="here")
    answer = moesim("import-step", "--show", tmp_path / "step.json", "--ranks", "8", "--spread", "ep")
    assert answer.code == 1 and "record a program that begins with torch.nn.Embedding" in answer.complaint


def test_a_folder_with_another_run_is_refused_before_the_work_begins(scenario: Path, moesim, monkeypatch) -> None:
    assert moesim("run", scenario, "--quiet").code == 0
    result = (scenario.parent / "runs/small/result.json").read_bytes()
    monkeypatch.setattr("moesim.run.simulate", never)
    answer = moesim("run", scenario, "--set", "seed=1")
    assert answer.code == 1
    assert "--force" in answer.complaint
    assert (scenario.parent / "runs/small/result.json").read_bytes() == result


def test_a_folder_that_cannot_be_written_is_refused_before_the_work_begins(scenario: Path, moesim, monkeypatch) -> None:
    monkeypatch.setattr("moesim.run.simulate", never)
    answer = moesim("run", scenario, "--out", scenario / "inside-a-file")
    assert answer.code == 1
    assert "cannot be written" in answer.complaint


def test_force_replaces_a_run_and_leaves_other_files(scenario: Path, moesim) -> None:
    out = scenario.parent / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "report.html").write_text("of a run that broke off")
    assert moesim("run", scenario, "--out", out).code == 1
    assert moesim("run", scenario, "--out", out, "--force", "--quiet").code == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "result.json").exists()


def test_a_bug_keeps_its_traceback(scenario: Path, moesim, monkeypatch) -> None:
    monkeypatch.setattr("moesim.run.simulate", never)
    with pytest.raises(AssertionError, match="the long work began"):
        moesim("run", scenario)


@pytest.mark.parametrize(("argv", "code"), [(["rnu"], 1), ([], 0)])
def test_the_process_leaves_with_the_code(argv: list[str], code: int) -> None:
    done = subprocess.run([sys.executable, "-m", "moesim", *argv], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert len(done.stderr.splitlines()) == (1 if code else 0)
