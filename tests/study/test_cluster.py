"""The same points on a Dask cluster: a real scheduler and two workers, each a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moesim.errors import UserError
from moesim.study import Point, PointRecord, run_points

if not os.environ.get("CI"):  # where CI is set, what is missing must fail
    pytest.importorskip("distributed", reason="needs the extra: pip install 'moesim[cluster]'")


@dataclass(frozen=True)
class DaskCluster:
    """Processes of this machine."""

    address: str
    scheduler: "subprocess.Popen[bytes]"
    workers: list["subprocess.Popen[bytes]"]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[DaskCluster]:
    """A scheduler and two workers with one thread each, without a nanny that would start a killed one again."""
    file = tmp_path / "scheduler.json"
    common = ["--scheduler-file", str(file), "--no-dashboard"]
    log = (tmp_path / "log").open("wb")

    def start(module: str, *flags: str) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", f"distributed.cli.{module}", *common, *flags]
        return subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path)

    scheduler = start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-show")
    workers = [start("dask_worker", "--nthreads", "1", "--no-nanny", "--memory-limit", "0") for _ in range(2)]
    try:
        deadline = time.monotonic() + 90
        while not (file.exists() and (tmp_path / "log").read_text().count("Registered to:") == 2):
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        yield DaskCluster(json.loads(file.read_text())["address"], scheduler, workers)
    finally:
        for process in (scheduler, *workers):
            process.kill()
            process.wait()
        log.close()


@pytest.mark.slow
def test_a_killed_worker_loses_nothing_and_a_lost_scheduler_keeps_what_is_finished(points, cluster):
    made = points([{"seed": seed, "workload.global_batch": 64} for seed in range(8)])
    kept: list[PointRecord] = []

    def kill_its_worker(record: PointRecord) -> None:
        kept.append(record)
        if len(kept) == 1:
            os.kill(record.pid, signal.SIGKILL)

    records = run_points(made, on_record=kill_its_worker, cluster=cluster.address)
    assert kept == records
    assert sorted(record.number for record in records) == list(range(8))
    assert {record.status for record in records} == {"done"}
    assert {record.pid for record in records} <= {worker.pid for worker in cluster.workers}
    assert len({record.pid for record in records}) == 2

    kept.clear()

    def kill_the_scheduler(record: PointRecord) -> None:
        kept.append(record)
        if len(kept) == 1:
            cluster.scheduler.kill()

    with pytest.raises(UserError, match=r"scheduler at .* is gone; finished points are kept"):
        run_points(made, on_record=kill_the_scheduler, cluster=cluster.address)
    assert 0 < len(kept) < 8


class KilledWorker(Exception):
    """What Dask says of a task whose workers kept dying."""


@pytest.fixture
def told(monkeypatch) -> dict[int, Exception]:
    """A scheduler that runs every point but those with an exception here, by number: what Dask would say of them."""
    said: dict[int, Exception] = {}

    class Scheduler:
        def __init__(self, address: str, **settings: object) -> None:
            assert address == "tcp://127.0.0.1:9"

        def nthreads(self) -> dict[str, int]:
            return {"a worker": 1}

        def get_executor(self, *, pure: bool) -> "Scheduler":
            assert not pure, "the same point again is simulated again"
            return self

        def submit(self, function: Callable[..., Any], point: Point, *others: object) -> "Future[Any]":
            future: Future[Any] = Future()
            if point.number in said:
                future.set_exception(said[point.number])
            else:
                future.set_result(function(point, *others))
            return future

        def shutdown(self, *, wait: bool) -> None:
            assert not wait

        def close(self) -> None: ...

    module = SimpleNamespace(KilledWorker=KilledWorker, Client=Scheduler)
    monkeypatch.setitem(sys.modules, "distributed", module)
    return said


def test_what_dask_gives_up_is_a_failed_point_and_a_lost_scheduler_keeps_what_is_finished(points, told):
    made, kept = points([{"seed": seed} for seed in range(3)]), []
    told[1] = KilledWorker()
    run_points(made, on_record=kept.append, cluster="tcp://127.0.0.1:9")
    assert [record.status for record in sorted(kept, key=lambda record: record.number)] == ["done", "failed", "done"]
    (failed,) = (record for record in kept if record.status == "failed")
    assert failed.reason == "too many workers of the cluster died simulating it; was memory short?"
    kept.clear()
    told[1] = CancelledError()
    with pytest.raises(UserError, match=r"scheduler at tcp://127.0.0.1:9 is gone; finished points are kept"):
        run_points(made, on_record=kept.append, cluster="tcp://127.0.0.1:9")
    assert [record.number for record in kept] == [0]


@pytest.mark.parametrize("address", ["localhost", "tcp://localhost", "http://x:1"])
def test_what_is_no_address_is_refused(points, address):
    with pytest.raises(UserError, match="is not the address of a Dask scheduler"):
        run_points(points([{"seed": 1}]), on_record=lambda record: None, cluster=address)


def test_a_cluster_out_of_reach_is_one_line(points, monkeypatch):
    monkeypatch.setattr("moesim.study.workers._CONNECT_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9") as caught:
        run_points(points([{"seed": 1}]), on_record=lambda record: None, cluster="tcp://127.0.0.1:9")
    assert "\n" not in str(caught.value)


def test_without_the_package_the_remedy_is_named(points, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"pip install 'moesim\[cluster\]'"):
        run_points(points([{"seed": 1}]), on_record=lambda record: None, cluster="tcp://127.0.0.1:9")
