"""Starting other Python processes: what they import, what they inherit, and signals that wait meanwhile."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, ModuleType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that processes started in the block inherit; the former ones come back."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def same_imports() -> Iterator[None]:
    """Python processes that start in the block look for modules where this one does, and never in the working folder.

    multiprocessing starts them with `python -c`, which looks in the working folder first: a file there that is named
    like a module would run.
    """
    paths = [path for path in sys.path if path and os.pathsep not in path]
    with environment({"PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}):
        yield


@contextmanager
def without_main() -> Iterator[None]:
    """Processes that start in the block do not import the script that started this one.

    They need nothing of it, and a script without `if __name__ == "__main__"` would run again in every one of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """While the block runs SIGTERM and SIGHUP raise KeyboardInterrupt, as Ctrl-C does, but where they are ignored.

    Nothing changes outside the main thread, where no signal arrives.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    caught = {number: handler for number, handler in before.items() if handler is signal.SIG_DFL}
    for number in caught:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in caught.items():
            signal.signal(number, handler)


@contextmanager
def signals_wait(*signals: signal.Signals) -> Iterator[None]:
    """Hold these signals back until the end of the block; processes and threads that start in it never see them."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
