# PYTHON_ARGCOMPLETE_OK
"""The command line: verbs that belong together share a module; nothing heavy is imported before a verb needs it."""

import errno
import gc
import os
import sys
from collections.abc import Sequence

from moesim.cli.flags import INTERRUPTED_EXIT_CODE, Interrupted, discard_output, open_closed_streams, write_stderr
from moesim.cli.parser import build, parse
from moesim.errors import UserError, one_line
from moesim.processes import signals_interrupt

MADE_PER_COLLECTION = 50_000  # Python's 700 objects take a twelfth of a large run, to find next to nothing
_BROKEN_PIPE_EXIT_CODE = 141  # 128 + SIGPIPE, as shells report it
# What the machine alone is the reason of, wherever it comes up: full disks, too few files or processes, no memory.
_SHORTAGES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EAGAIN)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 user error, 2 infeasible, 130 interrupted.

    Errors of a user are one line on stderr; anything else is a bug and keeps its traceback. SIGTERM and SIGHUP act like
    Ctrl-C.
    """
    open_closed_streams()
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    try:
        with signals_interrupt():
            return _run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except Interrupted as error:
        return _fail(str(error), INTERRUPTED_EXIT_CODE)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:
        return _without_reader()
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # rich leaves so
            return _without_reader()
        raise
    except OSError as error:
        if error.filename is not None:
            return _fail(f"{error.filename}: {error.strerror}; check the path, its permissions and the space left", 1)
        if error.errno not in _SHORTAGES:
            raise
        discard_output(sys.stdout)
        return _fail(f"{error.strerror}: make room on the disk (standard output included) or in memory, then again", 1)


def _run(argv: Sequence[str]) -> int:
    args = parse(argv)
    gc.set_threshold(MADE_PER_COLLECTION)
    code: int = args.execute(args) if args is not None else 0
    sys.stdout.flush()  # here, where a broken pipe is still caught
    return code


def _complete() -> None:
    """Answer the shell, which asks what may follow, and leave; see `moesim completion`."""
    import argcomplete

    argcomplete.autocomplete(build()[0], exclude=["-v", "-V"])


def _fail(message: str, code: int) -> int:
    write_stderr(f"moesim: {one_line(message)}")
    return code


def _without_reader() -> int:
    """The reader of standard output or error went away (`| head`)."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            discard_output(stream)
    return _BROKEN_PIPE_EXIT_CODE
