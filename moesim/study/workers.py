"""Where tasks run: processes of this machine, or the workers of a Dask cluster. Both answer with futures."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from importlib import import_module
from logging import CRITICAL, getLogger
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from pathlib import Path
from traceback import extract_tb
from typing import Any, NamedTuple, Protocol

from moesim.errors import InfeasibleError, MachineError, UserError, one_line
from moesim.processes import STOP_SIGNALS, environment, same_imports, signals_wait, without_main
from moesim.study.points import Point, PointRecord

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_CONNECT_SECONDS = 10
_NO_START = "a worker process could not start"
_GO_ON = "is memory or the number of processes short? What is finished is kept: run the same command again"
_ADDRESS = re.compile(r"(tcp|tls|ucx)://\S+:\d+")


class Lost(NamedTuple):
    """What came instead of an outcome: the process `pid` ended in the middle; `retry` when another try is due."""

    pid: int
    retry: bool


class Workers(Protocol):
    """What `run_points` needs to know about a place where tasks run."""

    @property
    def has_room(self) -> bool:
        """Whether one more task would start at once."""
        ...

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Start a task."""
        ...

    def collect(self, future: "Future[Any]") -> Any:
        """The outcome of a finished task, or Lost."""
        ...

    def stop(self) -> None:
        """End all work at once."""
        ...


class _Place(NamedTuple):
    """An executor of one process: when that process is killed, no other task ends with it."""

    executor: ProcessPoolExecutor
    pid: "Future[int]"


class Processes:
    """`count` processes of this machine; one that ends is replaced."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: list[_Place] = []
        self._busy: dict[Future[Any], _Place] = {}
        _start_fork_server()

    @property
    def has_room(self) -> bool:
        """Whether a process has nothing to do."""
        return len(self._busy) < self._count

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Start a task in a free process. Raises MachineError when no process starts."""
        with signals_wait(*STOP_SIGNALS):  # until the place is known: `stop` must find every process
            place = self._free.pop() if self._free else _new_place()
            try:
                future = place.executor.submit(function, *arguments)
            except BrokenProcessPool:  # it was killed while it had nothing to do
                place.executor.shutdown(wait=False)
                _started(place)
                return self.submit(function, *arguments)
            self._busy[future] = place
        return future

    def collect(self, future: "Future[Any]") -> Any:
        """The outcome of a finished task; Lost when its process was killed. Raises MachineError if it never started."""
        place = self._busy.pop(future)
        try:
            outcome = future.result()
        except BrokenProcessPool:
            place.executor.shutdown(wait=False)
            return Lost(_started(place), retry=True)
        self._free.append(place)
        return outcome

    def stop(self) -> None:
        """Kill what still works, let the others end, and wait until all are gone."""
        places = [*self._free, *self._busy.values()]
        for place in self._busy.values():
            if pid := _pid(place):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for place in places:
            place.executor.shutdown(cancel_futures=True)
        self._free, self._busy = [], {}


def _new_place() -> _Place:
    executor = ProcessPoolExecutor(1, mp_context=get_context("forkserver"), initializer=start_worker)
    try:
        with without_main():
            return _Place(executor, executor.submit(os.getpid))
    except (OSError, EOFError) as error:  # the fork server is gone, or the machine has no room for a process
        executor.shutdown(wait=False)
        raise MachineError(f"{_NO_START} ({type(error).__name__}); {_GO_ON}") from None


def _pid(place: _Place) -> int:
    """The process of a place; 0 when it ended before it could say."""
    try:
        return place.pid.result()
    except BrokenProcessPool:
        return 0


def _started(place: _Place) -> int:
    """The process of a place. Raises MachineError when it ended before it could say: no task was to blame."""
    pid = _pid(place)
    if not pid:
        raise MachineError(f"{_NO_START}: it ended at once; {_GO_ON}")
    return pid


def _start_fork_server() -> None:
    """One process imports the simulator once, and every worker is a copy of it: one thread each, no second import.

    Ctrl-C reaches the whole group of processes; only the parent answers it.
    """
    get_context("forkserver").set_forkserver_preload(["moesim.run", "moesim.study.workers"])
    with environment(dict.fromkeys(_ONE_THREAD, "1")), same_imports():
        resource_tracker.ensure_running()  # the fork server would start it, and that takes the mask back
        with signals_wait(signal.SIGINT):
            forkserver.ensure_running()


class Cluster:
    """The workers of a Dask scheduler. Dask itself gives a task of a lost worker to another one."""

    def __init__(self, address: str) -> None:
        try:
            distributed: Any = import_module("distributed")
        except ImportError:
            raise UserError("--cluster needs the package distributed: pip install 'moesim[cluster]'") from None
        if not _ADDRESS.fullmatch(address):
            raise UserError(f"--cluster {address} is not the address of a Dask scheduler; write e.g. tcp://host:8786")
        getLogger("distributed.client").setLevel(CRITICAL)  # what goes wrong is said once, below
        self._address = address
        self._killed: type[Exception] = distributed.KilledWorker
        try:
            self._client = distributed.Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            text = f"no Dask scheduler answers at {address} ({error}); start one with `dask scheduler`"
            raise UserError(" ".join(text.split())) from None
        if not self._client.nthreads():
            self._client.close()
            raise UserError(f"the scheduler at {address} has no workers; start some with `dask worker {address}`")
        self._executor = self._client.get_executor(pure=False)

    @property
    def has_room(self) -> bool:
        """Always: the scheduler queues what no worker takes yet."""
        return True

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Future[Any]":
        """Give a task to the scheduler."""
        future: Future[Any] = self._executor.submit(function, *arguments)
        return future

    def collect(self, future: "Future[Any]") -> Any:
        """The outcome of a finished task; Lost when workers kept dying under it. Raises UserError without scheduler."""
        try:
            return future.result()
        except self._killed:
            return Lost(0, retry=False)
        except CancelledError:
            raise UserError(
                f"the scheduler at {self._address} is gone; finished points are kept, run the same command again"
            ) from None

    def stop(self) -> None:
        """Take back what is not finished and leave the cluster."""
        self._executor.shutdown(wait=False)
        self._client.close()


@contextmanager
def opened_workers(*, count: int | None, cluster: str | None) -> Iterator[Workers]:
    """Processes of this machine (as many as it has cores by default) or a cluster; stopped in any case."""
    workers: Workers = Cluster(cluster) if cluster else Processes(count or len(os.sched_getaffinity(0)))
    try:
        yield workers
    finally:
        workers.stop()


class Trained(NamedTuple):
    """How the training of a router ended: `reason` is None when its trace lies in the cache."""

    reason: str | None
    pid: int


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone: an orphan would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def train_point(point: Point, cache_dir: Path | None) -> Trained:
    """Train the router of the point and put its trace into the cache. Raises MachineError."""
    from moesim.run import obtain_trace

    try:
        obtain_trace(point.scenario, cache_dir=cache_dir)
    except MachineError:
        raise
    except UserError as error:
        return Trained(str(error), os.getpid())
    except Exception as error:  # a bug in one training must not end the others
        return Trained(describe(error), os.getpid())
    return Trained(None, os.getpid())


def simulate_point(point: Point, cache_dir: Path | None) -> PointRecord:
    """The record of the simulated point; whatever is wrong with it becomes its reason. Raises MachineError."""
    from moesim.run import simulate

    start, pid = time.perf_counter(), os.getpid()
    try:
        result = simulate(point.scenario, cache_dir=cache_dir).result
    except MachineError:
        raise
    except InfeasibleError as error:
        return point.record("infeasible", pid=pid, seconds=time.perf_counter() - start, reason=str(error))
    except UserError as error:
        return point.record("failed", pid=pid, seconds=time.perf_counter() - start, reason=str(error))
    except Exception as error:  # a bug at one point must not end the others
        return point.record("failed", pid=pid, seconds=time.perf_counter() - start, reason=describe(error))
    return point.record("done", pid=pid, seconds=time.perf_counter() - start, result=result)


def describe(error: Exception) -> str:
    """An unexpected error as one line with the place it came from."""
    frames = extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return one_line(f"{type(error).__name__}: {' '.join(str(error).split())}{place}")
