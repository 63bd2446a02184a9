"""Files that appear whole or not at all, and folders that one process writes at a time."""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moesim.errors import MachineError, UserError

LOCK = ".lock"
_PARTIAL = ".partial"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of some file systems: then nothing is locked


def is_leftover(name: str) -> bool:
    """Whether a file of that name is what a killed process left behind, and may be ignored."""
    return name == LOCK or name.endswith(_PARTIAL)


def refused(path: Path, error: OSError) -> MachineError:
    """The one line for a file that the machine does not take."""
    reason = error.strerror or error
    return MachineError(f"{path}: cannot be written: {reason}; make room there, or choose another place")


@contextmanager
def whole_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A path to write to; when the block ends, that file replaces `path` at once. A failed block leaves nothing.

    Without `replace` there must be none: raises UserError where another call has written one meanwhile. Raises
    MachineError when the disk is full or the place refuses.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{_PARTIAL}")
    try:
        try:
            yield partial
            if replace or not _linked(partial, path):
                partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink()
    except OSError as error:
        raise refused(path, error) from error


def _linked(partial: Path, path: Path) -> bool:
    """Whether `path` now names the file too, which fails where there is one; not all file systems have such links."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise UserError(f"{path} exists by now; choose another --out, or --force to replace it") from None
    except OSError:
        return False
    return True


def write_atomically(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Replace the file as a whole: a reader finds the former content or the new one. Raises MachineError.

    Without `replace` it must be new: raises UserError where another call has written it meanwhile.
    """
    with whole_file(path, replace=replace) as partial:
        partial.write_bytes(data)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep `folder` (made where it is missing) for this process alone until the block ends.

    Folders that were made here and are still empty then go again. Raises UserError at once while another process holds
    it, and MachineError where none can be made.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(folder, error) from error
    descriptor = _locked(folder / LOCK, wait=False)
    if descriptor is None:
        raise UserError(f"{folder} is being written by another call; wait for it, or choose another --out")
    try:
        yield
    finally:
        _unlock(folder / LOCK, descriptor)
        with suppress(OSError):
            for place in made:
                place.rmdir()


@contextmanager
def turn(path: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Wait until no other process is in such a block for `path`; `on_wait` is called before a wait.

    Raises MachineError where the folder of `path` cannot be written.
    """
    lock = path.with_name(path.name + LOCK)
    descriptor = _locked(lock, wait=False)
    if descriptor is None:
        on_wait()
        descriptor = _locked(lock, wait=True)
    assert descriptor is not None
    try:
        yield
    finally:
        _unlock(lock, descriptor)


def _locked(lock: Path, *, wait: bool) -> int | None:
    """The open lock file, held by this process; None while another one holds it. Its end frees it, however it ends."""
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise refused(lock.parent, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                os.close(descriptor)
                raise refused(lock, error) from error
        except BaseException:  # Ctrl-C while waiting
            os.close(descriptor)
            raise
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        os.close(descriptor)  # its former holder took the file away: try again with the new one


def _unlock(lock: Path, descriptor: int) -> None:
    with suppress(OSError):
        lock.unlink()
    os.close(descriptor)
