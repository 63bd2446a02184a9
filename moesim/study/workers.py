"""Where tasks run: in processes of this machine, or on the workers of a Dask cluster. Both answer with futures.

A killed process loses its own task alone, and none outlives its parent.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from importlib import import_module
from logging import CRITICAL, getLogger
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from typing import Any, NamedTuple

from moesim.errors import MachineError, UserError
from moesim.processes import STOP_SIGNALS, environment, same_imports, signals_wait, without_main

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_CONNECT_SECONDS = 10
_NO_START = "a worker process could not start"
_GO_ON = "is memory or the number of processes short? What is finished is kept: run the same command again"
_ADDRESS = re.compile(r"(tcp|tls|ucx)://\S+:\d+")


class WorkerDied(NamedTuple):
    """What came instead of an outcome: the process `pid` ended in the middle; `retry` when another try is due."""

    pid: int
    retry: bool


class _SingleProcess(NamedTuple):
    """An executor of one process: when that process is killed, no other task ends with it."""

    executor: ProcessPoolExecutor
    pid: "Future[int]"


class Processes:
    """`count` processes of this machine; one that ends is replaced."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free: list[_SingleProcess] = []
        self._busy: dict[Future[Any], _SingleProcess] = {}
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
        """The outcome of a finished task, or WorkerDied. Raises MachineError for a process that never started."""
        place = self._busy.pop(future)
        try:
            outcome = future.result()
        except BrokenProcessPool:
            place.executor.shutdown(wait=False)
            return WorkerDied(_started(place), retry=True)
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


def _new_place() -> _SingleProcess:
    executor = ProcessPoolExecutor(1, mp_context=get_context("forkserver"), initializer=start_worker)
    try:
        with without_main():
            return _SingleProcess(executor, executor.submit(os.getpid))
    except (OSError, EOFError) as error:  # the fork server is gone, or the machine has no room for a process
        executor.shutdown(wait=False)
        raise MachineError(f"{_NO_START} ({type(error).__name__}); {_GO_ON}") from None


def _pid(place: _SingleProcess) -> int:
    """The process of a place; 0 when it ended before it could say."""
    try:
        return place.pid.result()
    except BrokenProcessPool:
        return 0


def _started(place: _SingleProcess) -> int:
    """The process of a place. Raises MachineError when it ended before it could say: no task was to blame."""
    pid = _pid(place)
    if not pid:
        raise MachineError(f"{_NO_START}: it ended at once; {_GO_ON}")
    return pid


def _start_fork_server() -> None:
    """One process imports the simulator once, and every worker is a copy of it: one thread each, no second import.

    Ctrl-C reaches the whole group of processes; only the parent answers it.
    """
    get_context("forkserver").set_forkserver_preload(["moesim.run", "moesim.study.pool"])
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
        """The outcome of a finished task; WorkerDied when workers kept dying. Raises UserError without scheduler."""
        try:
            return future.result()
        except self._killed:
            return WorkerDied(0, retry=False)
        except CancelledError:
            raise UserError(
                f"the scheduler at {self._address} is gone; finished points are kept, run the same command again"
            ) from None

    def stop(self) -> None:
        """Take back what is not finished and leave the cluster."""
        self._executor.shutdown(wait=False)
        self._client.close()


Workers = Processes | Cluster  # where tasks run


@contextmanager
def opened_workers(*, count: int | None, cluster: str | None) -> Iterator[Workers]:
    """Processes of this machine (as many as it has cores by default) or a cluster; stopped in any case."""
    workers: Workers = Cluster(cluster) if cluster else Processes(count or len(os.sched_getaffinity(0)))
    try:
        yield workers
    finally:
        workers.stop()


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent is gone: an orphan would wait for work for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
