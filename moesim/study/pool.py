"""run_points: every point once, routers that points share trained first, and no point lost with another's process.

Tasks run in processes of this machine or on the workers of a Dask cluster. Both answer with futures.
"""

import os
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from logging import CRITICAL, getLogger
from multiprocessing import forkserver, get_context, parent_process, resource_tracker
from pathlib import Path
from traceback import extract_tb
from typing import Any, NamedTuple

from moesim.display import Display
from moesim.errors import InfeasibleError, MachineError, UserError, one_line
from moesim.processes import STOP_SIGNALS, environment, same_imports, signals_wait, without_main
from moesim.routing.request import TrainingRequest, cache_directory, trace_path
from moesim.scenario.routing import TrainRouting
from moesim.study.points import Point, PointRecord

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


class TrainingOutcome(NamedTuple):
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


def train_point(point: Point, cache_dir: Path | None) -> TrainingOutcome:
    """Train the router of the point and put its trace into the cache. Raises MachineError."""
    from moesim.run import obtain_trace

    try:
        obtain_trace(point.scenario, cache_dir=cache_dir)
    except MachineError:
        raise
    except UserError as error:
        return TrainingOutcome(str(error), os.getpid())
    except Exception as error:  # a bug in one training must not end the others
        return TrainingOutcome(describe(error), os.getpid())
    return TrainingOutcome(None, os.getpid())


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


TRIES = 2  # of a task whose process is killed


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Counts of points and of routers to train first; `running` counts both."""

    points: int
    done: int = 0
    failed: int = 0
    infeasible: int = 0
    routers: int = 0
    trained: int = 0
    running: int = 0

    @property
    def finished(self) -> int:
        """Points with a record."""
        return self.done + self.failed + self.infeasible


Watch = Callable[[Progress], None]


def show_points(display: Display) -> Watch:
    """What shows routers trained and points finished on the display."""

    def show(progress: Progress) -> None:
        counts = {"routers": (progress.trained, progress.routers), "points": (progress.finished, progress.points)}
        for name, (completed, total) in counts.items():
            if total:
                display.show(name, completed=completed, total=total, note=_note(name, progress))

    return show


def _note(name: str, progress: Progress) -> str:
    if name != "points":
        return ""
    counts = {"running": progress.running, "infeasible": progress.infeasible, "failed": progress.failed}
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


def run_points(
    points: Sequence[Point],
    *,
    on_record: Callable[[PointRecord], None],
    workers: int | None = None,
    cluster: str | None = None,
    cache_dir: Path | None = None,
    watch: Watch | None = None,
) -> list[PointRecord]:
    """Simulate the points and return their records in the order in which they finished.

    `on_record` is called with each record at once, in this thread; what it raises ends the work. `workers` processes of
    this machine do the work (one per core by default), or the workers of the Dask scheduler at the address `cluster`.
    Points that need the same router wait for one training of it, whose trace goes to `cache_dir`; on a cluster all
    workers should see that folder, or else each trains for itself. A killed process loses only its own task, which is
    tried once more. Raises UserError for a cluster out of reach, and KeyboardInterrupt after ending all processes.
    """
    queue = _Queue(cache_dir=cache_dir or cache_directory())
    records: list[PointRecord] = []

    def keep(new: Sequence[PointRecord]) -> None:
        for record in new:
            on_record(record)
            records.append(record)

    keep(queue.fill(points))
    if queue.ready:
        with opened_workers(count=workers, cluster=cluster) as place:
            for new in _worked_off(queue, place, watch=watch):
                keep(new)
    return records


@dataclass
class _Task:
    """A point to simulate, or whose router to train; `tries` so far."""

    point: Point
    training: Path | None = None  # the trace to be
    tries: int = 0


@dataclass
class _Queue:
    """What is to be done: tasks that may start, and points that wait for a trace."""

    cache_dir: Path
    ready: deque[_Task] = field(default_factory=deque)
    waiting: dict[Path, list[Point]] = field(default_factory=dict)
    progress: Progress = field(default_factory=lambda: Progress(points=0))

    def fill(self, points: Sequence[Point]) -> list[PointRecord]:
        """Queue the points, trainings first; records of those whose router cannot be trained as it stands."""
        self.progress = Progress(points=len(points))
        refused: list[PointRecord] = []
        at_once: list[Point] = []
        for point in points:
            try:
                trace = _missing_trace(point, self.cache_dir)
            except UserError as error:
                refused.append(point.record("failed", pid=os.getpid(), reason=str(error)))
                continue
            if trace is None:
                at_once.append(point)
            else:
                self.waiting.setdefault(trace, []).append(point)
        self.progress = replace(self.progress, routers=len(self.waiting))
        self.ready.extend(_Task(waiters[0], training=trace) for trace, waiters in self.waiting.items())
        self.ready.extend(_Task(point) for point in at_once)
        return self._counted(refused)

    def settle(self, task: _Task, outcome: PointRecord | TrainingOutcome | WorkerDied) -> list[PointRecord]:
        """The records that follow from the outcome of a task; what can go on now is queued."""
        if isinstance(outcome, PointRecord):
            return self._counted([outcome])
        if isinstance(outcome, WorkerDied) and outcome.retry and task.tries < TRIES:
            self.ready.appendleft(task)
            return []
        if isinstance(outcome, WorkerDied):
            work = "training its router" if task.training else "simulating it"
            reason: str | None = f"the process {work} was killed {task.tries} times; was memory short?"
            if not outcome.retry:
                reason = f"too many workers of the cluster died {work}; was memory short?"
        else:
            reason = outcome.reason
        waiters = [task.point] if task.training is None else self.waiting.pop(task.training)
        self.progress = replace(self.progress, trained=self.progress.trained + (task.training is not None))
        if reason is None:
            self.ready.extend(_Task(point) for point in waiters)
            return []
        return self._counted([point.record("failed", pid=outcome.pid, reason=reason) for point in waiters])

    def _counted(self, records: list[PointRecord]) -> list[PointRecord]:
        for record in records:
            count = {record.status: getattr(self.progress, record.status) + 1}
            self.progress = replace(self.progress, **count)
        return records


def _missing_trace(point: Point, cache_dir: Path) -> Path | None:
    """The trace that must be trained before the point can be simulated; None when it is there or none is needed."""
    scenario = point.scenario
    if scenario.model.experts == 0 or not isinstance(scenario.routing, TrainRouting):
        return None
    path = trace_path(TrainingRequest.from_scenario(scenario), cache_dir)
    return None if path.exists() else path


def _worked_off(queue: _Queue, workers: Workers, *, watch: Watch | None) -> Iterator[list[PointRecord]]:
    """Run tasks until none is left, and yield the records of every task that ends."""
    running: dict[Future[Any], _Task] = {}
    while queue.ready or running:
        while queue.ready and workers.has_room:
            task = queue.ready.popleft()
            task.tries += 1
            function = simulate_point if task.training is None else train_point
            running[workers.submit(function, task.point, queue.cache_dir)] = task
        _tell(watch, queue.progress, running=len(running))
        finished, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in sorted(finished, key=lambda future: running[future].point.number):
            yield queue.settle(running.pop(future), workers.collect(future))
    _tell(watch, queue.progress, running=0)


def _tell(watch: Watch | None, progress: Progress, *, running: int) -> None:
    if watch is not None:
        watch(replace(progress, running=running))
