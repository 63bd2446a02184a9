"""Real runs on the CPU: what they record, and that the simulation of a case follows the same routing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moesim.errors import UserError
from moesim.validation.cases import CPU_MODEL, Case, build_case, forced_ids
from moesim.validation.measurement import Clock, Effort, Marks, measure_rank
from moesim.validation.prediction import RecordedRows, predict
from moesim.validation.real_runs import check_device, measure_cases, run_as

TINY = {**CPU_MODEL, "hidden": 32, "heads": 2, "kv_heads": 2, "head_dim": 16, "expert_intermediate": 16, "vocab": 64}
QUICK = Effort(seconds=0.0, least=2, most=2, warm=1, instrumented=1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def tiny(gpus: int, skew: str = "skewed", layers: int = 2) -> Case:
    return build_case("tiny", {**TINY, "layers": layers}, gpus=gpus, tokens=64, skew=skew)


@pytest.mark.parametrize(("skew", "layers"), [("skewed", 2), ("uniform", 3)])
def test_forced_ids_are_the_sample_that_is_simulated(skew: str, layers: int) -> None:
    """Also where two thin layers stand for three, each with its experts in another order."""
    case = tiny(2, skew, layers)
    sample = case.sample()
    assert sample is not None
    for rank in range(2):
        for layer, ids_TK in enumerate(forced_ids(sample, rank=rank)[0]):
            assert ids_TK.shape == (64, 2) and (ids_TK[:, 0] != ids_TK[:, 1]).all()
            rows_E = np.bincount(ids_TK.reshape(-1), minlength=8)
            assert rows_E.tolist() == sample.arrays(0, layer).rows_BRE[0, rank].tolist()


def test_recorded_rows_give_the_traffic_of_the_sample() -> None:
    case = tiny(2)
    sample = case.sample()
    assert sample is not None
    rows_RBLE = np.stack([[[sample.arrays(0, layer).rows_BRE[0, rank] for layer in range(2)]] for rank in range(2)])
    recorded = RecordedRows(case.scenario, rows_RBLE)
    for layer in range(2):
        ours, theirs = recorded.arrays(0, layer), sample.arrays(0, layer)
        assert (ours.slot_rows_BDP(recorded.placement) == theirs.slot_rows_BDP(sample.placement)).all()
        assert (ours.routed_rows_B == theirs.routed_rows_B).all()


def test_one_process_is_measured_in_parts() -> None:
    case = tiny(1)
    ids = forced_ids(case.sample(), rank=0)
    result = measure_rank(case.scenario, ids, rank=0, device=torch.device("cpu"), effort=QUICK)
    parts = result["parts"]
    assert all(parts[part] > 0 for part in ("forward", "backward", "optimizer", "host"))
    assert parts["forward"] + parts["backward"] < parts["step"] * 1.5
    assert result["rows"][0][0] == np.bincount(ids[0][0].reshape(-1), minlength=8).tolist()
    predicted = predict(case, [result["rows"]])
    assert set(result["layer_parts"]) == set(predicted["layer_parts"])
    assert sum(predicted["parts"].values()) == pytest.approx(predicted["step"], rel=1e-9)


@pytest.mark.slow
def test_two_processes_run_resume_and_are_predicted(tmp_path: Path) -> None:
    case = tiny(2)
    said: list[str] = []
    first = measure_cases([case], device="cpu", folder=tmp_path, effort=QUICK, log=said.append)[case.name]
    rows_RBLE = np.array(first["rows"])
    assert rows_RBLE.shape == (2, 1, 2, 8) and rows_RBLE.sum() == 2 * 2 * 64 * 2
    sample = case.sample()
    assert sample is not None
    assert rows_RBLE[1, 0, 1].tolist() == sample.arrays(0, 1).rows_BRE[0, 1].tolist()
    assert {"forward.dispatch", "backward.combine"} <= set(first["layer_parts"])
    predicted = predict(case, first["rows"])
    assert set(predicted["layer_parts"]) == set(first["layer_parts"])
    path = tmp_path / f"{case.name}.json"
    before = path.read_bytes()
    again = measure_cases([case], device="cpu", folder=tmp_path, effort=QUICK, log=said.append)[case.name]
    assert again == first and path.read_bytes() == before, "what was measured is not measured again"


def test_a_kept_skip_is_said_and_not_run_again(tmp_path: Path) -> None:
    case = tiny(1)
    kept = {"scenario": run_as(case), "skipped": "out of memory on the device"}
    (tmp_path / f"{case.name}.json").write_text(json.dumps(kept))
    said: list[str] = []
    assert "skipped" in measure_cases([case], device="cpu", folder=tmp_path, effort=QUICK, log=said.append)[case.name]
    assert said == [f"{case.name}: skipped, out of memory on the device"]


def test_marks_time_the_parts_of_both_passes() -> None:
    marks = Marks(Clock(torch.device("cpu")))
    x = torch.ones(4, requires_grad=True)
    y = marks(x * 1.0, "start")
    y = marks(y.exp(), "router")
    y = marks(y * 2, "experts")
    y.sum().backward()
    assert list(marks.part_seconds()) == ["forward.router", "forward.experts", "backward.experts", "backward.router"]
    assert all(seconds > 0 for seconds in marks.part_seconds().values())
    assert x.grad is not None and torch.allclose(x.grad, 2 * x.detach().exp())


def test_missing_devices_are_named() -> None:
    found = torch.cuda.device_count()
    with pytest.raises(UserError, match="--device cpu" if found == 0 else f"--gpus {found}"):
        check_device("cuda", found + 1)
    check_device("cpu", 7)
