"""`moesim calibrate` from the command line: a tiny run on the CPU, and one line for every mistake."""

from pathlib import Path

import pytest
import torch

from moesim.cli import main
from moesim.kernels import (
    Gemm,
    load_profile,
)
from moesim.kernels.profile import load_profile_file

FAMILIES = ("--families", "gemm,attention,memory_bound", "--budget", "0.4", "--quiet")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def call(*words: object) -> int:
    return main([str(word) for word in ("calibrate", *words)])


def test_a_tiny_budget_on_the_cpu_gives_a_profile_to_simulate_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cpu.json.gz"
    assert call("--device", "cpu", "--out", out, *FAMILIES) == 0
    profile = load_profile_file(out)
    assert {row["family"] for row in profile.rows} == {"gemm", "attention", "memory_bound"}
    assert all(row["p20"] <= row["p50"] <= row["p80"] for row in profile.rows if "visits" not in row)
    assert profile.sessions[0]["torch"] == torch.__version__
    with pytest.warns(UserWarning, match="no rows for grouped_gemm, host"):
        model = load_profile(out)
    assert 0 < float(model.seconds(Gemm(m=128, k=128, n=128)).seconds) < 1
    assert capsys.readouterr().out == ""


def test_the_report_of_a_derived_gpu_tells_its_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    """It has no rows; what is known of the GPU that it is derived from holds, and the clock where none is known."""
    assert call("--report", "--profile", "h800") == 0
    shown = capsys.readouterr().out
    assert "derived from h100" in shown and "Ranges of results on h800" in shown and "clock" not in shown
    assert call("--report", "--profile", "gb300") == 0
    assert "no sustained rate known" in " ".join(capsys.readouterr().out.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--out", "new.json", "--device", "cuda"), "no CUDA device here; run on a machine with one"),
        (("--out", "done.json", "--device", "cpu"), "done.json exists already; choose another --out, or --extend"),
        (("--out", "done.json", "--device", "cpu", "--extend"), "profile of schema version 7"),
        (("--report", "--profile", "done.json"), "profile of schema version 7"),
        (("--report", "--profile", "absent.json"), "cannot read this profile"),
        (("--report", "--profile", "h801"), "no profile 'h801'"),
    ],
)
def test_mistakes_leave_with_one_line_and_write_nothing(
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("done.json").write_text('{"schema_version": 7, "name": "p", "sessions": [], "rows": []}')
    before = Path("done.json").read_text()
    assert call(*words) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert printed.out == ""
    assert Path("done.json").read_text() == before
    assert not Path("new.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["done.json"]
