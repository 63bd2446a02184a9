"""Whether a test of a script holds, where that follows from its text: [ ], [[ ]], (( )), true and false."""

import re
import shlex
from collections.abc import Callable, Sequence

from moesim.flags.expressions import whole_number
from moesim.flags.shell_values import Variables, if_unset_empty
from moesim.flags.shell_words import Piece, Word

_NUMBERS: dict[str, Callable[[int, int], bool]] = {
    "-eq": lambda a, b: a == b,
    "-ne": lambda a, b: a != b,
    "-lt": lambda a, b: a < b,
    "-le": lambda a, b: a <= b,
    "-gt": lambda a, b: a > b,
    "-ge": lambda a, b: a >= b,
}
_IN_BRACKETS = {"==": "-eq", "!=": "-ne", "<": "-lt", "<=": "-le", ">": "-gt", ">=": "-ge"}
_COMPARISON = re.compile(r"(.*?)(==|!=|<=|>=|<|>)(.*)", re.DOTALL)


def verdict(words: Sequence[Word], variables: Variables) -> bool | None:
    """Whether the test of a command holds; None for what is no test, or for one that only a run would decide."""
    if not words:
        return None
    if words[0].pieces[0].quote == "test":
        inside = words[0].pieces[0].text
        opening = inside.lstrip()
        return _double(opening, variables) if len(words) == 1 else None
    texts = [_text(word, variables) for word in words]
    match texts:
        case ["true"]:
            return True
        case ["false"]:
            return False
        case ["[", *within, "]"] | ["test", *within]:
            return _single(within)
    return None


def _text(word: Word, variables: Variables) -> str | None:
    return if_unset_empty(variables.text(word))


def _single(texts: Sequence[str | None]) -> bool | None:
    if texts and texts[0] == "!":
        inner = _single(texts[1:])
        return None if inner is None else not inner
    if any(text is None for text in texts):
        return None
    match texts:
        case ["-z", str(value)]:
            return value == ""
        case ["-n", str(value)] | [str(value)]:
            return value != ""
        case ["-z"] | []:
            return bool(texts)
        case [str(left), "=" | "==", str(right)]:
            return left == right
        case [str(left), "!=", str(right)]:
            return left != right
        case [str(left), str(operator), str(right)] if operator in _NUMBERS:
            return _compare(left, operator, right)
    return None


def _compare(left: str, operator: str, right: str) -> bool | None:
    try:
        return _NUMBERS[operator](whole_number(left or "0"), whole_number(right or "0"))
    except ValueError:
        return None


def _double(inside: str, variables: Variables) -> bool | None:
    """The inside of [[ ]] or (( )): one comparison; of several joined ones nothing is said."""
    if "&&" in inside or "||" in inside:
        return None
    try:
        parts = shlex.split(inside, posix=False)
    except ValueError:
        return None
    words = [Word((_piece(part),), 0) for part in parts]
    if len(words) == 3 and words[1].pieces[0].text in ("==", "=", "!=") and any(c in parts[2] for c in "*?["):
        return None  # a pattern
    found = _single([_text(word, variables) for word in words])
    if found is not None and not (len(parts) == 3 and parts[1] in ("<", ">")):
        return found
    comparison = _COMPARISON.fullmatch(inside.strip())
    if comparison is None:
        return None
    sides = [_text(Word((Piece(f"$(({side}))"),), 0), variables) for side in (comparison[1], comparison[3])]
    if None in sides:
        return None
    return _compare(str(sides[0]), _IN_BRACKETS[comparison[2]], str(sides[1]))


def _piece(part: str) -> Piece:
    quoted = len(part) > 1 and part[0] == part[-1] and part[0] in "'\""
    return Piece(part[1:-1], part[0]) if quoted else Piece(part)
