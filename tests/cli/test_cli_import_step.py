"""`moesim import-step` of a trace and of a program that a trace corrects."""

import gzip
import json
from functools import cache
from pathlib import Path

import pytest
from host_table import PROGRAMS
from measured_data import read

from moesim.importing.trace_file import read_trace
from moesim.recorded.step_file import parsed_ops, save_step
from moesim.strict_json import parse_json

DATA = Path(__file__).parent.parent / "data"
TRACE = DATA / "mixtral-8k.trace.json.gz"
READ = cache(read_trace)


@pytest.fixture(autouse=True)
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace is read once for all tests, to events that nothing changes."""
    monkeypatch.setattr("moesim.importing.traced_step.read_trace", READ)


@pytest.fixture
def kept(tmp_path: Path, moesim) -> Path:
    path = tmp_path / "mixtral.json"
    assert moesim("import-step", TRACE, "--out", path, "--quiet").code == 0
    return path


def test_a_trace_is_shown_and_kept(kept: Path, moesim) -> None:
    shown, again = moesim("import-step", TRACE), moesim("import-step", "--show", kept)
    assert shown.out == again.out
    assert "_grouped_mm" in shown.out and "MHz" in shown.out and "host ahead" in shown.out
    found = json.loads(moesim("import-step", TRACE, "--json").out)
    assert found["gpu"] == "h100" and found["times"]["kernels"] == 754
    assert sum(part["measured_s"] for part in found["parts"]) == pytest.approx(
        sum(each["measured_s"] for each in found["corrections"])
    )


def test_a_step_is_corrected_by_a_trace_and_by_what_was_kept_of_it(kept: Path, tmp_path: Path, moesim) -> None:
    step = parse_json(gzip.decompress((DATA / "hf_steps.json.gz").read_bytes()))["steps"][0]
    save_step(tmp_path / "recorded.json", parsed_ops(step["ops"], where="here"), source="here")
    call = ["import-step", "--show", tmp_path / "recorded.json", "--json"]
    plain = json.loads(moesim(*call).out)
    by_file, by_trace = (json.loads(moesim(*call, "--calibrate", path).out) for path in (kept, TRACE))
    assert by_file == by_trace and plain["corrected_by"] is None and by_file["corrected_by"] == TRACE.name
    assert by_file["kernels_s"] != pytest.approx(plain["kernels_s"])
    assert sum(op["count"] * op["seconds"] / op["factor"] for op in by_file["ops"]) == pytest.approx(plain["kernels_s"])
    assert {op["factor"] for op in plain["ops"]} == {1.0} and {op["factor"] for op in by_file["ops"]} != {1.0}


def test_a_step_that_its_host_paces_is_told_with_the_pace_of_hosts(tmp_path: Path, moesim) -> None:
    steps = {step["name"]: step for step in read(PROGRAMS)["steps"]}
    save_step(tmp_path / "own.json", parsed_ops(read(PROGRAMS)["programs"]["own"], where="here"), source="here")
    call = ["import-step", "--show", tmp_path / "own.json"]
    found, slow = (json.loads(moesim(*call, "--json", *more).out) for more in ((), ("--host-factor", "1.5")))
    least, most = found["step_time_by_host_s"]
    assert least < found["step_time_s"] < most and least < steps["own"]["sustained_s"] < most
    assert slow["host_s"] == pytest.approx(1.5 * found["host_s"])
    assert "by host" in moesim(*call).out
    for wrong in (("--host-factor", "0"), ("--host-factor", "2", "--host-per-op", "9")):
        answer = moesim(*call, *wrong)
        assert answer.code == 1 and "--host-factor" in answer.err


def test_a_trace_on_another_gpu_is_corrected_by_itself(kept: Path, moesim) -> None:
    shown = moesim("import-step", "--show", kept, "--gpu", "h200", "--json")
    assert json.loads(shown.out)["corrected_by"] == TRACE.name


def test_mistakes_are_one_line(kept: Path, tmp_path: Path, moesim) -> None:
    for arguments, said in (
        ((TRACE, "--calibrate", kept), "needs no --calibrate"),
        ((tmp_path / "nowhere.json",), "cannot read"),
        ((kept,), "--show"),
        ((tmp_path,), "is a folder"),
        (("nowhere",), "does not exist"),
        ((TRACE, "--rows", "0"), "--rows"),
        ((TRACE, "--gpu", "h1000"), "h100"),
        ((TRACE, "--out", kept), "--force"),
        (("--show", TRACE), "is a trace of torch's profiler"),
        (("no_such_module_here:step", "--calibrate", tmp_path / "nowhere.json"), "cannot read"),
    ):
        answer = moesim("import-step", *arguments)
        assert answer.code == 1 and said in answer.complaint, (arguments, answer)


def test_a_trace_stands_beside_its_prediction_part_by_part(kept: Path, moesim) -> None:
    plain = json.loads(moesim("validate", "--step", TRACE, "--json").out)
    assert json.loads(moesim("validate", "--step", kept, "--json").out) == plain
    assert {part["phase"] for part in plain["parts"]} == {"forward", "backward", "optimizer"}
    for side in ("measured_s", "predicted_s"):
        assert sum(part[side] for part in plain["parts"]) == pytest.approx(
            sum(op["count"] * op[{"measured_s": "measured_s", "predicted_s": "seconds"}[side]] for op in plain["ops"])
        )
    assert plain["corrected_by"] is None
    other = json.loads(moesim("validate", "--step", TRACE, "--calibrate", DATA / "ddp.trace.json.gz", "--json").out)
    assert other["corrected_by"] == "ddp.trace.json.gz" and other["parts"] != plain["parts"]
    shown = moesim("validate", "--step", TRACE).out
    assert "grouped gemm wgrad" in shown and "not corrected" in shown and "optimizer" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--calibrate", TRACE), "--step"),
        (("--step", "nowhere.json"), "cannot read"),
        (("--step", TRACE, "--calibrate", TRACE), "the step itself"),
        (("--step", TRACE, "--report"), "leave them out"),
        (("scenario.yaml", "--step", TRACE), "leave them out"),
        (("--step", __file__), "no whole JSON"),
        (("--step", TRACE, "--profile", "h1000"), "h1000"),
    ],
)
def test_mistakes_of_validate_are_one_line(moesim, arguments, said: str) -> None:
    answer = moesim("validate", *arguments)
    assert answer.code == 1 and said in answer.complaint
