"""run_points: every point once, routers that points share trained first, and no point lost with another's process."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import extract_tb
from typing import Any, NamedTuple

from moesim.display import Display
from moesim.errors import InfeasibleError, MachineError, UserError, one_line
from moesim.routing.request import TrainingRequest, cache_directory, trace_path
from moesim.scenario.routing import TrainRouting
from moesim.study.points import Point, PointRecord
from moesim.study.workers import WorkerDied, Workers, opened_workers


class TrainingOutcome(NamedTuple):
    """How the training of a router ended: `reason` is None when its trace lies in the cache."""

    reason: str | None
    pid: int


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
