"""Checkpoints of a training run and interrupts that wait for the end of a step: what exact resume needs."""

import io
import pickle
import signal
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from moesim.errors import MachineError
from moesim.files import write_atomically
from moesim.processes import STOP_SIGNALS

State = dict[str, Any]


def save_checkpoint(path: Path, state: State) -> None:
    """Write `state` whole or not at all: a crash while writing leaves the checkpoint before it.

    Raises MachineError that says what is kept, for example when the disk is full.
    """
    content = io.BytesIO()  # torch.save to a full disk raises errors of its own
    torch.save(state, content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content.getvalue())
    except (MachineError, OSError) as error:
        kept = "an earlier checkpoint is kept" if path.exists() else "the training so far is lost"
        raise MachineError(f"{error} with MOESIM_CACHE; {kept}") from error


def load_checkpoint(path: Path, *, training_hash: str) -> State | None:
    """The state at `path`, or None where there is none.

    A damaged file, or one of another training, is reported on stderr and left out: training then starts over.
    """
    if not path.exists():
        return None
    try:
        state: State = torch.load(path, weights_only=True, map_location="cpu")
        if state["training_hash"] == training_hash:
            return state
        reason = "it belongs to another scenario"
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, zipfile.BadZipFile, OSError) as error:
        reason = f"it is damaged ({type(error).__name__})"
    print(f"{path.name}: checkpoint not used, {reason}; training starts over", file=sys.stderr)
    return None


class Interrupt:
    """Whether Ctrl-C was pressed, or the end asked for by a signal, since the deferral began."""

    pending = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Hold back the first signal to stop (read `.pending`), so that no training step is torn in two; a second strikes.

    Outside the main thread, where signals never arrive, nothing is held back.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    caught = [number for number, handler in previous.items() if callable(handler)]  # others end the process, or nothing

    def defer(number: int, frame: FrameType | None) -> None:
        if interrupt.pending:
            raise KeyboardInterrupt
        interrupt.pending = True

    for number in caught:
        signal.signal(number, defer)
    try:
        yield interrupt
    finally:
        for number in caught:
            signal.signal(number, previous[number])
