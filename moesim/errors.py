"""The ways in which a user's request can fail; everything else is a bug and keeps its traceback."""

LONGEST_LINE = 300  # characters of a message
_CUT = " [...] "
_REPORT = ". This is a mistake of moesim, no result is written; please report it with the scenario"


def one_line(message: str) -> str:
    """`message` on one line of at most 300 printable characters; a long one is cut in the middle: the ends say where
    the mistake is and what helps.

    >>> one_line("a.yaml:1:1: name:\\nwrong")
    'a.yaml:1:1: name:\\\\nwrong'
    """
    line = printable(message)
    if len(line) <= LONGEST_LINE:
        return line
    tail = LONGEST_LINE // 3
    return line[: LONGEST_LINE - tail - len(_CUT)] + _CUT + line[-tail:]


def printable(text: str) -> str:
    """`text` with what no terminal should get (line breaks, escapes) written out."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class UserError(Exception):
    """Bad input: one line that says what, where and the remedy. Exit code 1."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConflictError(UserError):
    """A scenario whose every key is well-formed, but whose parts do not fit each other. Exit code 1."""


class InfeasibleError(UserError):
    """A well-formed scenario that cannot be laid out on its cluster. Exit code 2."""

    exit_code = 2


class InternalError(UserError):
    """A mistake of this program that it found itself, in one line. Exit code 1; no result is written."""

    def __init__(self, message: str) -> None:
        super().__init__(message if message.endswith(_REPORT) else f"{message}{_REPORT}")


class MachineError(UserError):
    """What this machine refuses, not the input: a full disk, a process that cannot start. Exit code 1.

    It ends the call and is no verdict on a scenario: nothing is recorded, and the same call goes on from what is kept.
    """
