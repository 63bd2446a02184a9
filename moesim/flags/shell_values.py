"""What a word of a script comes to: its variables put in, without anything being run.

What only a run would know is kept as a mark in the text: `unset` of a variable that the script does not set, `unknown`
of a command's output or of what depends on it. Whoever needs the value refuses the mark; all others may ignore it.
Whether a test holds ([ ], [[ ]], (( )), true and false) is told where it follows from the text.
"""

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moesim.flags.expressions import whole_number
from moesim.flags.shell_words import Piece, Word, closing

_MARK = re.compile("\x00([^\x00]*)\x00")
_UNSET = "$"  # how the mark of a variable begins that the script does not set
_NAME = re.compile(r"[A-Za-z_]\w*|[0-9@*#?$!-]")
_BRACED = re.compile(r"([A-Za-z_]\w*|[0-9]{1,4}|[@*#])(?:\[([@*]|[0-9]{1,6})\])?(?:(:?[-=+])(.*))?", re.DOTALL)
_BARE_NAME = re.compile(r"[A-Za-z_]\w*")
_DEEPEST = 20  # defaults inside of defaults


def unknown(reason: str) -> str:
    """The mark of a value that only a run would know."""
    return f"\x00{reason}\x00"


def marks(text: str) -> list[str]:
    """Why parts of a value are not known, in order."""
    return _MARK.findall(text)


def is_unset(text: str) -> bool:
    """Whether the text is nothing but variables that the script does not set."""
    return bool(text) and not _MARK.sub("", text) and all(mark.startswith(_UNSET) for mark in marks(text))


def if_unset_empty(text: str) -> str | None:
    """The text with unset variables as a shell has them: empty; None where a part is not known."""
    return None if any(not mark.startswith(_UNSET) for mark in marks(text)) else _MARK.sub("", text)


@dataclass
class Variables:
    """The variables of a script while it is read; a list is an array."""

    values: dict[str, str | list[str]] = field(default_factory=dict)

    @classmethod
    def given(cls, values: Mapping[str, str]) -> "Variables":
        """Variables that the user sets from outside; numbers are arguments of the script, all of them."""
        numbers = sorted((name for name in values if name.isdecimal()), key=int)
        positions: list[str] = [values[name] for name in numbers]
        return cls({**values, "#": str(len(numbers)), "@": positions, "*": list(positions)})

    def fields(self, word: Word) -> list[str]:
        """The words that `word` becomes: none, one, or several where an unquoted value has blanks."""
        if len(word.pieces) == 1 and self._is_empty_array(word.pieces[0]):
            return []
        done = [""]
        any_quotes = False
        for piece in word.pieces:
            any_quotes |= piece.quote != ""
            first, *rest = self._fields(piece)
            done[-1] += first
            done += rest
        return done if any_quotes else [text for text in done if text]

    def _is_empty_array(self, piece: Piece) -> bool:
        parts = list(self._parts(piece.text, 0)) if piece.quote == '"' else []
        return len(parts) == 1 and parts[0] == (True, [])

    def text(self, word: Word) -> str:
        """What is assigned by `word`: one text, blanks and all."""
        return "".join(
            piece.text if piece.quote == "'" else " ".join(self._expanded(piece.text)) for piece in word.pieces
        )

    def _fields(self, piece: Piece) -> list[str]:
        if piece.quote == "'":
            return [piece.text]
        expanded = self._expanded(piece.text)
        if piece.quote == '"':
            return expanded or [""]
        fields = [""]
        for number, text in enumerate(expanded):
            parts = _split(text)
            if number and parts:
                fields.append("")
            for index, part in enumerate(parts):
                if index:
                    fields.append("")
                fields[-1] += part
        return fields

    def _expanded(self, text: str, depth: int = 0) -> list[str]:
        """The text with its variables put in; several texts where it is or has an array."""
        done = [""]
        for is_array, values in self._parts(text, depth):
            if not is_array:
                done[-1] += values[0]
            elif values:
                done[-1] += values[0]
                done += values[1:]
        return done

    def _parts(self, text: str, depth: int) -> Iterator[tuple[bool, list[str]]]:
        at = 0
        while at < len(text):
            if text.startswith("\\$", at) or text.startswith("\\`", at):
                yield False, [text[at + 1]]
                at += 2
            elif text[at] == "`":
                end = text.find("`", at + 1)
                end = len(text) - 1 if end < 0 else end
                yield False, [unknown("the output of a command")]
                at = end + 1
            elif text[at] == "$":
                end, is_array, values = self._variable(text, at, depth)
                yield is_array, values
                at = end
            else:
                end = next((i for i in range(at + 1, len(text)) if text[i] in "\\$`"), len(text))
                yield False, [text[at:end]]
                at = end

    def _variable(self, text: str, at: int, depth: int) -> tuple[int, bool, list[str]]:
        """Where the expansion at `at` ends, whether it is an array, and its values."""
        opening = text[at + 1 : at + 2]
        if opening in ("{", "("):
            end = closing(text, at + 1) or len(text)
            inside = text[at + 2 : end - 1]
            if opening == "{":
                return (end, *self._braced(inside, depth))
            if inside.startswith("(") and inside.endswith(")"):
                return end, False, [self._arithmetic(inside[1:-1], depth)]
            return end, False, [unknown("the output of a command")]
        name = _NAME.match(text, at + 1)
        if name is None:
            return at + 1, False, ["$"]
        values = self.values.get(name[0])
        if name[0] in "@*" and isinstance(values, list):
            return name.end(), True, values
        if isinstance(values, list):  # the first entry of an array alone, as in a shell
            return name.end(), False, [values[0] if values else ""]
        return name.end(), False, [f"\x00{_UNSET}{name[0]}\x00" if values is None else values]

    def _braced(self, inside: str, depth: int) -> tuple[bool, list[str]]:
        found = _BRACED.fullmatch(inside)
        if found is None or depth > _DEEPEST:
            return False, [unknown(f"the expansion ${{{inside}}}")]
        name, index, operator, word = found.groups()
        values = self.values.get(name)
        if index is not None and index.isdecimal() and isinstance(values, list):
            values = values[int(index)] if int(index) < len(values) else ""
        present = values if values is not None and (values or not (operator or "").startswith(":")) else None
        if operator is not None:
            if operator.endswith("+"):
                present = None if present is None else " ".join(self._expanded(word, depth + 1))
                return False, ["" if present is None else present]
            if present is None:
                default = " ".join(self._expanded(_unquoted(word), depth + 1))
                if operator.endswith("="):
                    self.values[name] = default
                return False, [default]
        if present is None:
            return False, ["" if values is not None else f"\x00{_UNSET}{name}\x00"]
        if isinstance(present, list):
            return (True, present) if index else (False, present[:1] or [""])
        return False, [present]

    def _arithmetic(self, text: str, depth: int) -> str:
        text = " ".join(self._expanded(text, depth + 1))
        for _ in range(_DEEPEST):
            if marks(text) or not _BARE_NAME.search(text):
                break
            text = _BARE_NAME.sub(lambda name: self._number(name[0]), text)
        if marks(text):
            return "".join(f"\x00{mark}\x00" for mark in marks(text))
        try:
            return str(whole_number(text))
        except ValueError:
            return unknown(f"the sum $(({text}))")

    def _number(self, name: str) -> str:
        value = self.values.get(name)
        if isinstance(value, list) or value is None:
            return f"\x00{_UNSET}{name}\x00"
        return f"({value})" if value.strip() else "0"


def _split(text: str) -> list[str]:
    """Parts between blanks, marks kept whole; an empty part at an end that is blank."""
    parts, last = [""], 0
    for mark in _MARK.finditer(text):
        _add(parts, text[last : mark.start()])
        parts[-1] += mark[0]
        last = mark.end()
    _add(parts, text[last:])
    return parts


def _add(parts: list[str], text: str) -> None:
    first, *rest = re.split(r"[ \t\n]+", text)
    parts[-1] += first
    parts += rest


def _unquoted(text: str) -> str:
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


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
