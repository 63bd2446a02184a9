"""Calibration on a CPU: resuming after an interrupt, budgets, shapes that cannot run, the command."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesim.cli import main
from moesim.errors import UserError
from moesim.kernels import (
    CalibratedModel,
    calibrate_command,
    command,
)
from moesim.kernels.benchmarks import calibrate, timing
from moesim.kernels.benchmarks.collectives import block_shapes, collective_shapes, contention_shapes
from moesim.kernels.benchmarks.device import Sampler
from moesim.kernels.benchmarks.session import Session, row_key
from moesim.kernels.benchmarks.shapes import CPU_LIMITS, GPU_LIMITS, family_shapes, kernel_flops
from moesim.kernels.benchmarks.timing import CpuTimer
from moesim.kernels.families import MEMORY_KINDS
from moesim.kernels.fitting import fit_profile
from moesim.kernels.profile import Profile, load_profile_file


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Clock:
    """Time that passes by a fixed step at each look."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"family": "gemm", "m": m, "k": 64, "n": 64, "dtype": "bf16", "direction": "forward"}
        for m in range(1, count + 1)
    ]


TIMED = {"p20": 1.0, "p50": 2.0, "p80": 3.0, "repeats": 5}


def test_a_family_stops_when_its_time_is_up(tmp_path: Path) -> None:
    session = Session(out=tmp_path / "p.json", clock=Clock(1.0))
    session.open()
    assert [row["m"] for row in session.within(rows(100), 5.0)] == [1, 2, 3, 4]
    session.close()


def test_a_session_goes_on_where_an_interrupted_one_stopped(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    first = Session(out=out)
    first.open()
    for row in rows(10)[:4]:
        first.add(row | TIMED)
    first.close()  # the process dies: nothing was merged
    torn = next(first.partial.glob("*.jsonl"))
    torn.write_text(torn.read_text() + '{"family": "ge')

    second = Session(out=out)
    second.open()
    assert [row["m"] for row in second.within(rows(10), 100.0)] == [5, 6, 7, 8, 9, 10]
    for row in rows(10)[4:]:
        second.add(row | TIMED)
    second.close()
    profile = second.merge(name="p", environment={"device": "x"})
    assert [row["m"] for row in profile.rows] == list(range(1, 11))
    assert not second.partial.exists()

    third = Session(out=out)
    third.open()
    assert list(third.within(rows(10), 100.0)) == []
    third.close()


def test_visits_of_a_shape_become_one_row_of_medians(tmp_path: Path) -> None:
    session = Session(out=tmp_path / "p.json")
    session.open()
    for visit, p50 in enumerate((2.0, 9.0, 3.0)):
        session.visit = visit
        assert session.wants(rows(1)[0])
        session.add(rows(1)[0] | TIMED | {"p50": p50})
    session.close()
    (row,) = session.merge(name="p", environment={}).rows
    assert row["p50"] == 3.0
    assert row["visits"] == [2.0, 9.0, 3.0]
    assert row["repeats"] == 15


def test_keys_ignore_what_was_measured() -> None:
    row = rows(1)[0]
    assert row_key(row | TIMED | {"clock_mhz": 1500, "rank": 1}) == row_key(row)
    assert row_key(row) != row_key(row | {"m": 9})


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_half_of_what_is_measured_between_gpus_is_for_fits(ranks: int) -> None:
    """Every kind of call and every kernel beside a transfer has rows on either side, and none is on both."""
    calls = [*collective_shapes(ranks), *block_shapes(ranks)]
    assert len({row_key({**shape, "held_out": 0}) for shape in calls}) == len(calls)
    for kind in {shape["kind"] for shape in calls}:
        sides = {bool(shape.get("held_out")) for shape in calls if shape["kind"] == kind}
        assert sides == {False, True}, kind
    overlaps = contention_shapes(ranks)
    kernels = {row_key(row["compute"]) for row in overlaps}
    for kernel in kernels:
        held = [bool(row.get("held_out")) for row in overlaps if row_key(row["compute"]) == kernel]
        assert 0.3 < np.mean(held) < 0.7
    for shape in calls:
        if "bytes_matrix" in shape:
            sent_RR = np.array(shape["bytes_matrix"])
            assert sent_RR.shape == (ranks, ranks) and (sent_RR >= 0).all()
            assert (sent_RR.sum(axis=1) <= shape["bytes"] * 1.01 + 4096 * ranks).all()


def test_what_is_held_out_is_not_measured_twice(tmp_path: Path) -> None:
    session = Session(out=tmp_path / "mine.json.gz")
    session.open()
    row = {"family": "collective", "kind": "all_reduce", "bytes": 1 << 20, "ranks": 2}
    session.add(row | {"p50": 1e-5})
    assert not session.wants(row) and not session.wants(row | {"held_out": 1})
    session.close()


def test_the_timer_reads_its_clock_and_counts_calls() -> None:
    calls: list[int] = []
    timing = CpuTimer(clock=Clock(1.0)).time_fixed(calls.append, warm=2, groups=3, inner=4)
    assert timing.p50 == 1.0 / 4
    assert timing.as_row()["repeats"] == 12
    assert calls == list(range(14))


@pytest.mark.parametrize("family", list(GPU_LIMITS.counts))
def test_shapes_are_distinct_within_limits_and_cover_the_range(family: str) -> None:
    shapes = family_shapes(family, GPU_LIMITS)
    assert family_shapes(family, CPU_LIMITS) == family_shapes(family, CPU_LIMITS)
    keys = {json.dumps(shape, sort_keys=True) for shape in shapes}
    assert len(keys) == len(shapes) >= (100 if family == "sustained" else 400)
    if family == "gemm":
        m = np.array([shape["m"] for shape in shapes])
        assert m.min() == 1 and m.max() > 32768
        assert max(shape["n"] for shape in shapes) >= 100_000
        assert {shape["direction"] for shape in shapes} == {"forward", "dgrad", "wgrad"}
    if family == "grouped_gemm":
        assert {len(shape["rows_per_expert"]) for shape in shapes} >= {1, 8, 64, 256}
        assert any(0 in shape["rows_per_expert"] for shape in shapes)
        assert max(sum(shape["rows_per_expert"]) for shape in shapes) > 90_000
    if family == "memory_bound":
        assert {shape["kind"] for shape in shapes} == {kind for kind, facts in MEMORY_KINDS.items() if not facts.apart}
        assert all(shape["rows"] % 64 == 0 for shape in shapes if shape["kind"].startswith("optimizer"))
    if family == "sustained":
        assert {shape["of"]["family"] for shape in shapes} == {"gemm", "grouped_gemm", "attention"}
        assert min(kernel_flops(shape["of"]) for shape in shapes) >= 1e10
    assert len(family_shapes(family, CPU_LIMITS)) >= CPU_LIMITS.counts[family]


def test_what_does_not_run_is_skipped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise torch.OutOfMemoryError("no more")

    said: list[str] = []
    monkeypatch.setitem(calibrate._PREPARE, "attention", exhausted)
    monkeypatch.setattr(calibrate, "Session", lambda **given: Session(**(given | {"report": said.append})))
    profile = calibrate.run_calibration(
        device="cpu", out=tmp_path / "p.json", budget=0.5, families=("attention",), visits=1, quiet=True
    )
    assert profile is not None
    assert profile.rows == []
    assert len(said) == len(family_shapes("attention", CPU_LIMITS))
    assert all("out of memory" in line and "sequence" in line for line in said)


def test_an_interrupt_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.json"
    measured: list[Any] = []

    def prepare(*given: Any) -> Any:
        measured.append(given)
        return (lambda index: None), {}

    def interrupted(*given: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        return prepare(*given)

    monkeypatch.setitem(calibrate._PREPARE, "gemm", interrupted)
    assert calibrate_command(device="cpu", out=out, budget=9.0, families="gemm", quiet=True) == 130
    assert not out.exists()
    kept = [path.read_text().count("\n") for path in (tmp_path / "p.json.partial").glob("*.jsonl")]
    assert kept == [2]
    assert "2 rows kept" in capsys.readouterr().err
    monkeypatch.setitem(calibrate._PREPARE, "gemm", prepare)
    assert calibrate_command(device="cpu", out=out, budget=20.0, families="gemm", quiet=True) == 0
    assert "going on with the interrupted calibration" in capsys.readouterr().err
    assert len(load_profile_file(out).rows) == len(family_shapes("gemm", CPU_LIMITS))


def test_a_full_device_is_one_line_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(calibrate, "Pool", full)
    with pytest.raises(UserError, match="no room for 0 GiB of operands; stop what else uses the device"):
        calibrate_command(device="cpu", out=tmp_path / "p.json", families="gemm", quiet=True)
    assert list(tmp_path.iterdir()) == []


def test_a_sustained_row_has_its_rate_and_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clocked:
        def since(self, begin: float) -> dict[str, float]:
            return {"watts": 650, "clock_mhz": 1500}

    issued: list[int] = []

    def run(call: object, count: int) -> float:
        issued.append(count)
        return count * 2e-3

    monkeypatch.setattr(timing, "_issued", run)
    row = timing.measure_sustained(print, flops=1e12, probe=lambda call: 1e-3, sampler=Clocked())  # type: ignore[arg-type]
    assert row == {"p50": 2e-3, "repeats": 150, "flops_per_second": 5e14, "watts": 650, "clock_mhz": 1500}
    assert issued == [150, 150]
    with pytest.raises(RuntimeError, match="no SM clock"):
        timing.measure_sustained(print, flops=1e12, probe=lambda call: 1e-3, sampler=Sampler(None))


def test_sustained_rows_make_a_cap_when_a_profile_is_fitted(h200: CalibratedModel) -> None:
    rows = h200.profile.family("attention")[::3] + h200.profile.family("sustained")
    profile = Profile(name="part", sessions=h200.profile.sessions, rows=rows)
    fit_profile(profile)
    assert profile.fits["sustained"]["slope"] > 0
    assert profile.fits["sustained"]["free"] == pytest.approx(h200.profile.fits["sustained"]["free"], abs=0.15)


def test_a_finished_profile_is_extended_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.json"
    call: dict[str, Any] = {"device": "cpu", "out": out, "budget": 0.1, "quiet": True}
    assert calibrate_command(families="gemm", **call) == 0
    before = out.read_bytes()
    with pytest.raises(UserError, match="exists already; choose another --out, or --extend"):
        calibrate_command(families="attention", **call)
    assert out.read_bytes() == before
    assert calibrate_command(families="attention", extend=True, **call) == 0
    profile = load_profile_file(out)
    assert {row["family"] for row in profile.rows} == {"gemm", "attention"}
    assert len(profile.sessions) == 2
    assert "going on" not in capsys.readouterr().err


def test_mistakes_are_one_line_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        calibrate_command(device="cuda", out=tmp_path / "p.json")
    with pytest.raises(UserError, match="use cuda or cpu"):
        calibrate_command(device="tpu", out=tmp_path / "p.json")
    with pytest.raises(UserError, match="unknown family"):
        calibrate_command(device="cpu", out=tmp_path / "p.json", families="gem")
    with pytest.raises(UserError, match="--out"):
        calibrate_command(device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_the_report_shows_every_family_with_its_target(
    h200: CalibratedModel, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "load_profile", lambda name: h200)  # keeps the errors that other tests computed
    assert main(["calibrate", "--report"]) == 0
    printed = capsys.readouterr().out
    for name in ("gemm", "gemm fp8", "grouped_gemm", "attention", "memory_bound", "3% / 10%", "4% / 12%"):
        assert name in printed
    assert "NCCL's calls as h200 measured them" in printed
