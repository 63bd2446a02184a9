"""run_points: every point exactly once, whatever happens to the processes that work on them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moesim.errors import MachineError
from moesim.run import simulate
from moesim.study import Point, PointRecord, Progress, run_points
from moesim.study.workers import Processes

TRAINED = {
    "kind": "train",
    "router": {"kind": "deepseek_moe"},
    "steps": 2,
    "thin": {"layers": 1, "hidden": 16, "heads": 2, "expert_intermediate": 8, "context": 64, "tokens_per_step": 128},
}


class Deadly(Point):
    """A point that kills its process the first `lives` times that one receives it; `tally` counts."""

    tally: Path
    lives: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (self.tally, self.lives, dict(self.__dict__))

    @classmethod
    def from_point(cls, point: Point, *, tally: Path, lives: int) -> "Deadly":
        deadly = cls.__new__(cls)
        deadly.__dict__.update(point.__dict__, tally=tally, lives=lives)
        return deadly


def _receive(tally: Path, lives: int, fields: dict[str, Any]) -> Point:
    with tally.open("a") as file:
        file.write("x")
    if len(tally.read_text()) <= lives:
        os.kill(os.getpid(), signal.SIGKILL)
    return Point(**{name: fields[name] for name in Point.__dataclass_fields__})


def numbers(records: list[PointRecord]) -> list[int]:
    return sorted(record.number for record in records)


def test_every_point_is_simulated_once_in_another_process(points):
    made = points([{"seed": seed} for seed in range(4)])
    kept: list[PointRecord] = []
    records = run_points(made, on_record=kept.append, workers=2)
    assert kept == records
    assert numbers(records) == [0, 1, 2, 3]
    assert {record.status for record in records} == {"done"}
    assert os.getpid() not in {record.pid for record in records}
    first = next(record for record in records if record.number == 0)
    assert first.result == simulate(made[0].scenario).result
    assert first.seconds > 0


@pytest.mark.parametrize(("lives", "status"), [(1, "done"), (2, "failed")])
def test_a_killed_process_takes_no_other_point_with_it(points, tmp_path, lives, status):
    made = points([{"seed": seed} for seed in range(4)])
    made[1] = Deadly.from_point(made[1], tally=tmp_path / "tally", lives=lives)
    records = run_points(made, on_record=lambda record: None, workers=2)
    assert numbers(records) == [0, 1, 2, 3]
    assert {record.number: record.status for record in records} == {0: "done", 1: status, 2: "done", 3: "done"}
    assert len((tmp_path / "tally").read_text()) == 2
    if status == "failed":
        failed = next(record for record in records if record.number == 1)
        assert "killed 2 times; was memory short?" in failed.reason
        assert failed.result is None
        assert failed.pid > 0


def end_at_once() -> None:
    os._exit(3)


def test_a_process_that_dies_at_start_fails_the_call_and_no_point(points, monkeypatch):
    monkeypatch.setattr("moesim.study.workers.start_worker", end_at_once)
    kept: list[PointRecord] = []
    with pytest.raises(MachineError, match="a worker process could not start") as caught:
        run_points(points([{"seed": seed} for seed in range(3)]), on_record=kept.append, workers=2)
    assert kept == []
    assert "\n" not in str(caught.value)


def test_points_with_one_router_share_one_training(points, tmp_path):
    made = points([{"routing": TRAINED, "cluster.price_per_gpu_hour": price} for price in (1.0, 2.0, 3.0)])
    seen: list[Progress] = []
    records = run_points(made, on_record=lambda record: None, workers=2, cache_dir=tmp_path, watch=seen.append)
    assert [record.status for record in records] == ["done"] * 3
    assert (seen[0].routers, seen[0].running) == (1, 1)
    assert (seen[-1].trained, seen[-1].finished, seen[-1].running) == (1, 3, 0)
    assert len(list((tmp_path / "traces").iterdir())) == 1
    assert len({record.result["router"]["trace_hash"] for record in records}) == 1
    seen.clear()
    run_points(made[:1], on_record=lambda record: None, workers=1, cache_dir=tmp_path, watch=seen.append)
    assert seen[0].routers == 0


def test_what_cannot_be_simulated_is_a_record_with_its_reason(points, tmp_path):
    made = points(
        [
            {"seed": 1},
            {"routing": {**TRAINED, "thin": {"hidden": 13}}},
            {"workload.recompute": "selective", "implementation.kind": "torch_eager"},
            {"model.layers": 400, "model.hidden": 8192, "model.dense_intermediate": 65536},
        ]
    )
    records = run_points(made, on_record=lambda record: None, workers=2, cache_dir=tmp_path)
    by_number = {record.number: record for record in records}
    assert {number: record.status for number, record in by_number.items()} == {
        0: "done",
        1: "failed",
        2: "failed",
        3: "infeasible",
    }
    assert "routing.thin.hidden = 13" in by_number[1].reason
    assert "workload.recompute" in by_number[2].reason
    assert by_number[3].reason


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_end_in_the_middle_leaves_no_process_behind(points, is_alive, error):
    pids: list[int] = []

    def stop(record: PointRecord) -> None:
        pids.append(record.pid)
        raise error

    with pytest.raises(error):
        run_points(points([{"seed": seed} for seed in range(6)]), on_record=stop, workers=2)
    assert len(pids) == 1
    assert not is_alive(pids[0])


def test_a_process_that_was_killed_while_idle_is_replaced(is_alive):
    workers = Processes(1)
    try:
        first = workers.collect(_finished(workers.submit(os.getpid)))
        os.kill(first, signal.SIGKILL)
        while is_alive(first):
            time.sleep(0.01)
        future = _finished(workers.submit(os.getpid))
        second = workers.collect(future)
        if not isinstance(second, int):  # the executor had not noticed yet when the task came: it is tried again
            assert second.retry
            second = workers.collect(_finished(workers.submit(os.getpid)))
        assert second != first
    finally:
        workers.stop()


def _finished(future):
    future.exception()
    return future


UNGUARDED = """
import pathlib, sys
with pathlib.Path("started").open("a") as file:
    file.write("x")
from moesim.study.workers import Processes
import os
sys.path.append("/of/the/parent")
workers = Processes(1)
future = workers.submit(eval, "__import__('sys').path, [name for name in ('html', 'hijacked') if "
    "'HERE' in (getattr(__import__('sys').modules.get(name), '__file__', None) or '')]")
future.result()
print(*workers.collect(future), sep="\\n")
workers.stop()
"""


def test_processes_import_what_their_parent_does_and_nothing_of_the_working_folder(tmp_path):
    """Also where the script that starts them has no guard around what it does: it runs once."""
    here, script = tmp_path / "HERE", tmp_path / "script.py"
    (here / "moesim").mkdir(parents=True)
    for name in ("html", "selectors", "multiprocessing", "traceback"):
        (here / f"{name}.py").write_text("open('EXECUTED', 'a').write(__name__)\n")
    script.write_text(UNGUARDED)
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=here, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    path, foreign = ended.stdout.splitlines()
    assert "/of/the/parent" in path
    assert "''" not in path
    assert str(here) not in path
    assert foreign == "[]"
    assert not (here / "EXECUTED").exists()
    assert (here / "started").read_text() == "x"


ENDLESS = """
import sys, time
from moesim.study.workers import Processes
import os
if __name__ == "__main__":
    workers = Processes(1)
    print(workers.submit(os.getpid).result(), flush=True)
    workers.submit(time.sleep, 600)
    time.sleep(600)
"""


def test_processes_end_with_their_parent(tmp_path, is_alive):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    deadline = time.monotonic() + 20
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)


CTRL_C = """
import os, signal, time
from multiprocessing import forkserver
from moesim.study.workers import Processes
if __name__ == "__main__":
    workers = Processes(1)
    before = forkserver._forkserver._forkserver_pid
    try:
        os.killpg(0, signal.SIGINT)  # as a terminal does: the fork server is still importing
        while True:
            time.sleep(0.01)
    except KeyboardInterrupt:
        print("interrupted")
    future = workers.submit(os.getpid)
    future.result()
    assert workers.collect(future) != os.getpid()
    assert forkserver._forkserver._forkserver_pid == before, "the fork server took the signal too"
    workers.stop()
"""


def test_ctrl_c_reaches_the_parent_alone(tmp_path):
    script = tmp_path / "ctrl_c.py"
    script.write_text(CTRL_C)
    ended = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, start_new_session=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "interrupted\n", "")
