"""The command line: one thin module per verb; nothing heavy is imported before a verb needs it."""

import os
import sys
from collections.abc import Sequence

from moesim.cli.interrupt import INTERRUPTED_EXIT_CODE, Interrupted
from moesim.cli.parser import parse
from moesim.errors import UserError

_BROKEN_PIPE_EXIT_CODE = 141  # 128 + SIGPIPE, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 user error, 2 infeasible, 130 interrupted.

    Errors of a user are one line on stderr; anything else is a bug and keeps its traceback.
    """
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        code: int = args.execute(args) if args is not None else 0
        sys.stdout.flush()  # here, where a broken pipe is still caught
        return code
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except Interrupted as error:
        return _fail(str(error), INTERRUPTED_EXIT_CODE)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", INTERRUPTED_EXIT_CODE)
    except BrokenPipeError:
        # The reader went away (`| head`). Python flushes stdout once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE_EXIT_CODE
    except OSError as error:
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}; check the path, its permissions and the space left", 1)


def _fail(message: str, code: int) -> int:
    print(f"moesim: {message}", file=sys.stderr)
    return code
