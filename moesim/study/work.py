"""What a worker process does: train the router of a point, or simulate it. It never writes to the study's folder."""

import os
import signal
import threading
import time
from multiprocessing import parent_process
from pathlib import Path
from traceback import extract_tb
from typing import NamedTuple

from moesim.errors import InfeasibleError, MachineError, UserError, one_line
from moesim.study.point import Point, PointRecord


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
