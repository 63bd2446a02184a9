"""The words of a shell script with their quotes and lines. Nothing is expanded here, and nothing is ever run."""

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from moesim.errors import UserError

MOST_CHARACTERS = 1_000_000
_OPERATORS = (";;", "&&", "||", ";", "|", "&", "(", ")", "\n")
_REDIRECTION = re.compile(r"[0-9]*(>>|>&|>|<<<|<&|<)&?")
_HERE_DOCUMENT = re.compile(r"[0-9]*<<(?!<)-?[ \t]*(['\"]?)(\w+)\1")
_ARRAY = re.compile(r"[A-Za-z_]\w*\+?=")
_TEST = re.compile(r"\[\[(?=\s)|\(\(")


@dataclass(frozen=True)
class Piece:
    """A run of characters of one word under one kind of quote: none, ' or \"."""

    text: str
    quote: str = ""


@dataclass(frozen=True)
class Word:
    """One word: `pieces` belong together without a blank. `line` counts from 1."""

    pieces: tuple[Piece, ...]
    line: int

    @property
    def plain(self) -> str | None:
        """The text of a word without quotes or escapes; None of any other."""
        return self.pieces[0].text if len(self.pieces) == 1 and not self.pieces[0].quote else None


@dataclass(frozen=True)
class Array:
    """`name=( ... )`, or with `more` `name+=( ... )`."""

    name: str
    words: tuple[Word, ...]
    more: bool
    line: int


@dataclass(frozen=True)
class Operator:
    """What ends a command: ; & | && || ( ) or the end of a line."""

    text: str
    line: int


Token = Word | Array | Operator


def tokens(text: str, *, source: str) -> tuple[Token, ...]:
    """The words, arrays and operators of a script, comments and redirections left out.

    Raises UserError with `source:line` for a quote or an array that is never closed.
    """
    if len(text) > MOST_CHARACTERS:
        raise UserError(f"{source}: {len(text):,} characters; a launch script has at most {MOST_CHARACTERS:,}")
    if "\x00" in text:
        raise UserError(f"{source}: holds a NUL character; it is no script")
    return tuple(_Lexer(text.replace("\r\n", "\n"), source).tokens(until=None))


class _Lexer:
    """Reads from left to right; `at` is the next character."""

    def __init__(self, text: str, source: str) -> None:
        self.text, self.source, self.at = text, source, 0
        self._ends = [index for index, char in enumerate(text) if char == "\n"]

    @property
    def line(self) -> int:
        return bisect_left(self._ends, self.at) + 1

    def tokens(self, *, until: str | None) -> Iterator[Token]:
        """Tokens up to the operator `until`, or to the end of the text."""
        begun = self.line
        while self._skip_blanks():
            if (here := _HERE_DOCUMENT.match(self.text, self.at)) is not None:
                self._skip_document(here)
                continue
            if (redirection := _REDIRECTION.match(self.text, self.at)) is not None:
                self.at = redirection.end()
                if self._skip_blanks() and self._operator() is None:
                    self._word()
                continue
            operator = None if _TEST.match(self.text, self.at) else self._operator()
            if operator is not None:
                line = self.line
                self.at += len(operator)
                if operator == until:
                    return
                yield Operator(operator, line)
            else:
                yield self._array() or self._word()
        if until is not None:
            raise UserError(f"{self.source}:{begun}: an opening bracket is never closed")

    def _skip_blanks(self) -> bool:
        """Go to the next token; False at the end."""
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in " \t":
                self.at += 1
            elif self.text.startswith("\\\n", self.at):
                self.at += 2
            elif char == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                return True
        return False

    def _operator(self) -> str | None:
        return next((operator for operator in _OPERATORS if self.text.startswith(operator, self.at)), None)

    def _skip_document(self, here: re.Match[str]) -> None:
        end = re.compile(rf"^\t*{here[2]}$", re.MULTILINE).search(self.text, here.end())
        self.at = len(self.text) if end is None else end.end()

    def _array(self) -> Array | None:
        head = _ARRAY.match(self.text, self.at)
        if head is None or not self.text.startswith("(", head.end()):
            return None
        line, name = self.line, head[0]
        self.at = head.end() + 1
        words = tuple(token for token in self.tokens(until=")") if isinstance(token, Word))
        return Array(name.rstrip("+="), words, more=name.endswith("+="), line=line)

    def _word(self) -> Word:
        line, begin, pieces, plain = self.line, self.at, list[Piece](), ""
        if (test := _TEST.match(self.text, self.at)) is not None:
            self.at = test.end()
            return Word((Piece(self._test(test[0]), "test"),), line)
        while self.at < len(self.text):
            char = self.text[self.at]
            if char in " \t;&|()\n<>":
                break
            if char in "'\"":
                if plain:
                    pieces.append(Piece(plain))
                    plain = ""
                pieces.append(Piece(self._quoted(char), char))
            elif char == "\\":
                if self.text.startswith("\\\n", self.at):
                    self.at += 2
                    continue
                if plain:
                    pieces.append(Piece(plain))
                    plain = ""
                pieces.append(Piece(self.text[self.at + 1 : self.at + 2], "'"))
                self.at += 2
            elif char in "$`" and (end := self._expansion_end()) is not None:
                plain += self.text[self.at : end]
                self.at = end
            else:
                plain += char
                self.at += 1
        if self.at == begin:
            raise UserError(f"{self.source}:{line}: {self.text[self.at]} has no place here")
        if plain or not pieces:
            pieces.append(Piece(plain))
        return Word(tuple(pieces), line)

    def _test(self, opening: str) -> str:
        """The inside of [[ ]] or (( )), as it is written."""
        closing = {"[[": "]]", "((": "))"}[opening]
        end = self.text.find(closing, self.at)
        if end < 0:
            raise UserError(f"{self.source}:{self.line}: {opening} is never closed")
        inside, self.at = self.text[self.at : end], end + 2
        return inside

    def _quoted(self, quote: str) -> str:
        """The inside of a quotation, escapes of double quotes resolved; goes behind it."""
        start, inside = self.line, ""
        self.at += 1
        while self.at < len(self.text):
            char = self.text[self.at]
            if char == quote:
                self.at += 1
                return inside
            if quote == '"' and char == "\\":
                following = self.text[self.at + 1 : self.at + 2]
                inside += "" if following == "\n" else following if following in '"\\' else f"\\{following}"
                self.at += 2
            elif quote == '"' and char in "$`" and (end := self._expansion_end()) is not None:
                inside += self.text[self.at : end]
                self.at = end
            else:
                inside += char
                self.at += 1
        raise UserError(f"{self.source}:{start}: the quote {quote} is never closed")

    def _expansion_end(self) -> int | None:
        """Where ${...}, $(...), $((...)) or `...` that begins here ends; None where nothing of that begins."""
        if self.text[self.at] == "`":
            end = self.text.find("`", self.at + 1)
            return None if end < 0 else end + 1
        if self.text[self.at + 1 : self.at + 2] not in ("{", "("):
            return None
        if (found := closing(self.text, self.at + 1)) is None:
            raise UserError(f"{self.source}:{self.line}: ${self.text[self.at + 1]} is never closed")
        return found


def closing(text: str, opening: int) -> int | None:
    """Where the bracket at `opening`, { or (, is closed: the place behind it; None where it never is."""
    pair, depth = {"{": "}", "(": ")"}[text[opening]], 0
    for index in range(opening, len(text)):
        depth += {text[opening]: 1, pair: -1}.get(text[index], 0)
        if depth == 0:
            return index + 1
    return None
