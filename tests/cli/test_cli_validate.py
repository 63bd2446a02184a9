"""`moesim validate` on the command line: mistakes are one line, and nothing runs before they are found."""

import json
from pathlib import Path

import pytest

from moesim.cli import main
from moesim.scenario import dump_scenario
from moesim.validation.cases import CPU_MODEL, build_case

SCENARIO = build_case("tiny", CPU_MODEL, gpus=1, tokens=512, skew="uniform").scenario


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(dump_scenario(SCENARIO))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "moesim calibrate"),
        (["--gpus", "0"], "--gpus 0"),
        (["--gpus", "999"], "CUDA device"),
        (["--device", "cpu", "--profile", "here", "--only", "nonesuch"], "nonesuch"),
        (["tiny.yaml", "--device", "cpu", "--gpus", "2"], "uses 1 ranks"),
        (["tiny.yaml", "--device", "cpu", "--set", "implementation.kind=fused"], "torch_eager"),
        (["nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["validate", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err
    assert not list(folder.glob("**/*.json"))


def test_a_kept_measurement_is_shown_without_running(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The measurement lies in the folder already, so that only the prediction is made."""
    from moesim.validation.cases import Case
    from moesim.validation.real_runs import run_as

    case = Case(SCENARIO.name, SCENARIO)
    rows = [[[[128] * 8] * SCENARIO.model.moe_layers]]
    parts = {"forward": 0.5, "backward": 1.0, "reduction": 0.0, "optimizer": 0.1}
    measured = {"scenario": run_as(case), "step": 2.0, "rows": rows, "parts": parts, "layer_parts": {}}
    kept = folder / "kept"
    kept.mkdir()
    (kept / f"{SCENARIO.name}.json").write_text(json.dumps(measured))
    assert main(["validate", "tiny.yaml", "--device", "cpu", "--profile", "h200", "--out", "kept", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)
    (row,) = table["rows"]
    assert row["measured"]["step"] == 2.0 and 0 < row["predicted"]["step"] < 2.0
    assert row["error"] == pytest.approx(row["predicted"]["step"] / 2.0 - 1, abs=1e-5)
    assert (kept / "table.json").exists()
