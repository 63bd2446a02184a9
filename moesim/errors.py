"""The ways in which a user's request can fail, and what a misspelt word may mean.

Everything else is a bug and keeps its traceback.
"""

import difflib
import re
from collections.abc import Iterable

LONGEST_LINE = 1_000  # characters of a message: more than any of ours, so that only what a user wrote is cut
_CUT = " [...] "
_REPORT = ". This is a mistake of moesim, no result is written; please report it with the scenario"


def one_line(message: str) -> str:
    """`message` on one line of at most 1,000 printable characters; a longer one, which quotes a long text of a user,
    is cut in the middle: the ends say where the mistake is and what helps.

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
    if text.isprintable():
        return text
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


def closest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'run'?` for a near miss, else nothing."""
    near = nearest(word, known)
    return "" if near is None else f"; did you mean {near!r}?"


def nearest(word: str, known: Iterable[str], *, likeness: float = 0.6) -> str | None:
    """The known word that is most like `word`, of those with at least `likeness` (1: the same); None without one."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=likeness)
    return near[0] if near else None


def same_product(word: str, known: Iterable[str]) -> str | None:
    """The name of `known` that `word` writes in another way, or None; never another product.

    Products of a family differ by a digit or a letter, so that spelling says nothing: an h20 is no h200 and a
    deepseek-v3.2 no deepseek-v3. Numbers must be the same in the same order, one or two letters between them too;
    only words of three letters and more may be misspelt.

    >>> same_product("Mixtral_8x7B", ["mixtral-8x7b"]), same_product("h20", ["h200"])
    ('mixtral-8x7b', None)
    """
    parts = _parts(word)
    for name in known:
        others = _parts(name)
        if len(parts) == len(others) and all(map(_same_part, parts, others)):
            return name
    return None


def _parts(name: str) -> list[str]:
    """Runs of digits and runs of letters, separators left out."""
    return re.findall(r"[0-9]+|[a-z]+", re.sub(r"[^a-z0-9]", "", name.lower()))


def _same_part(part: str, other: str) -> bool:
    is_word = min(len(part), len(other)) > 2 and not part.isdigit()
    return part == other or (is_word and bool(difflib.get_close_matches(part, [other], n=1, cutoff=0.85)))
