"""From a launch script to the words of its launch command. The script is read, never run.

Assignments, arrays, defaults and arithmetic are followed, and an `if` whose test compares texts or numbers that are
known. What is set under any other condition, in a loop or in a function, is not known, and refused where it is needed.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from moesim.errors import UserError
from moesim.flags.flag_table import READ
from moesim.flags.shell_values import Variables, is_unset, unknown, verdict
from moesim.flags.shell_words import Array, Operator, Piece, Token, Word, tokens

Command = list[Word | Array]

_BLOCKS = {"for": "done", "while": "done", "until": "done", "select": "done", "case": "esac"}
_DECLARE = ("export", "declare", "local", "readonly", "typeset")
_PRINTS = ("echo", "printf", "cat", "tee", "mkdir", "cd", "rm", "cp", "ls", "set", "trap", "exit", "return", "wait")
_SCRIPT_HINT = "a Megatron-LM launch command such as `torchrun ... pretrain_gpt.py --num-layers 32 ...`"


@dataclass(frozen=True)
class SpokenWord:
    """A word of the launch command as the program would get it, and the line that it stands on."""

    text: str
    line: int


@dataclass(frozen=True)
class Launch:
    """The words of the launch command, and the script's variables at its end, texts alone."""

    words: tuple[SpokenWord, ...]
    variables: Mapping[str, str]
    batch_words: tuple[SpokenWord, ...] = ()


def read_launch(text: str, *, source: str, given: Mapping[str, str]) -> Launch:
    """The launch command of a script; `given` are variables from outside, arguments of the script by number.

    Raises UserError for a script without one, or with several.
    """
    reading = _Reading(source, Variables.given(given))
    reading.run(tokens(text, source=source))
    found = reading.launches
    if not found:
        if reading.doubtful:
            raise UserError(f"{source}: the launch command stands under a condition that only a run would know")
        words = [word for array in reading.arrays.values() for word in array if _is_flags(array)]
        if not words:
            raise UserError(f"{source}: found no launch command; expected {_SCRIPT_HINT}, or arrays of its flags")
        found = [words]
    different = {tuple(word.text for word in words) for words in found}
    if len(different) > 1:
        lines = ", ".join(str(words[0].line) for words in found)
        raise UserError(f"{source}: launch commands at lines {lines}; keep the one that is meant in a copy")
    texts = {name: value for name, value in reading.variables.values.items() if isinstance(value, str)}
    return Launch(tuple(found[-1]), texts, batch_words(text))


def batch_words(text: str) -> tuple[SpokenWord, ...]:
    """The words of `#SBATCH` lines."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#SBATCH"):
            found += [SpokenWord(word, number) for word in line.split("#", 2)[1].split()[1:]]
    return tuple(found)


def _is_flags(words: Sequence[SpokenWord]) -> bool:
    return bool(words) and words[0].text.startswith("--")


@dataclass
class _Frame:
    """A conditional or a block; `live`: whether what stands in it happens, None where that is not known."""

    closing: str
    live: bool | None
    done: bool | None = False  # whether a branch before was taken
    testing: bool = False
    verdict: bool | None = None
    opened: bool = True  # a function's { has been seen


@dataclass
class _Reading:
    """Goes through the commands of a script in order."""

    source: str
    variables: Variables
    launches: list[list[SpokenWord]] = field(default_factory=list)
    arrays: dict[str, list[SpokenWord]] = field(default_factory=dict)
    doubtful: bool = False
    frames: list[_Frame] = field(default_factory=list)
    guard: bool | None = True  # of what follows && or ||

    @property
    def live(self) -> bool | None:
        states = [frame.live for frame in self.frames] + [self.guard]
        return False if False in states else None if None in states else True

    def run(self, found: Sequence[Token]) -> None:
        for command, ending, before in _commands(found):
            self._command(command, ending, before)

    def _command(self, command: Command, ending: str, before: str) -> None:
        head = command[0].plain if command and isinstance(command[0], Word) else None
        if head in ("if", "elif", "then", "else", "fi", "do", "done", "esac", "}", "{"):
            self._keyword(str(head))
            if head in ("then", "else", "do", "if", "elif", "{") and len(command) > 1:
                self._command(command[1:], ending, "")
            return
        if head in _BLOCKS:
            self.frames.append(_Frame(_BLOCKS[str(head)], self._runs(str(head), command[1:])))
            return
        if head == "function" or before == "function":
            in_command = isinstance(last := command[-1] if command else None, Word) and last.plain == "{"
            self.frames.append(_Frame("}", None, opened=in_command))
            return
        testing = bool(self.frames) and self.frames[-1].testing
        if testing or ending in ("&&", "||"):
            self._test(command, ending, before, testing=testing)
            return
        self._simple(command)
        self.guard = True

    def _runs(self, head: str, rest: Command) -> bool | None:
        """Whether a block runs at all: False of a loop over nothing or whose test fails, else None."""
        words = [word for word in rest if isinstance(word, Word)]
        if head == "while":
            return False if verdict(words, self.variables) is False else None
        listed = words[2:] if head == "for" and len(words) > 2 and words[1].plain == "in" else []
        entries = [text for word in listed for text in self.variables.fields(word)]
        return False if listed and all(is_unset(text) for text in entries) else None

    def _keyword(self, head: str) -> None:
        self.guard = True
        if head == "if":
            self.frames.append(_Frame("fi", False, testing=True, verdict=None))
        elif head == "{" and self.frames and not self.frames[-1].opened:
            self.frames[-1].opened = True
        elif head == "{":
            self.frames.append(_Frame("}", True))
        elif head in ("fi", "done", "esac", "}"):
            if self.frames and self.frames[-1].closing == head:
                self.frames.pop()
        elif self.frames and self.frames[-1].closing == "fi":
            frame = self.frames[-1]
            if head == "elif":
                frame.done = _either(frame.done, frame.live)
                frame.testing, frame.live, frame.verdict = True, False, None
            elif head == "then":
                frame.testing, frame.live = False, _both(_opposite(frame.done), frame.verdict)
            elif head == "else":
                frame.done = _either(frame.done, frame.live)
                frame.live = _opposite(frame.done)

    def _test(self, command: Command, ending: str, before: str, *, testing: bool) -> None:
        """A command whose success decides: after `if`, or before && or ||."""
        words = [word for word in command if isinstance(word, Word)]
        result = verdict(words, self.variables) if len(words) == len(command) else None
        if testing:
            frame = self.frames[-1]
            joined = {"&&": _both, "||": _either}.get(before)
            frame.verdict = result if joined is None else joined(frame.verdict, result)
            return
        if result is None and not _is_test(words):
            self._simple(command)  # `A=1 && B=2`: it happens whatever follows
            self.guard = True
            return
        self.guard = result if ending == "&&" else _opposite(result)

    def _simple(self, command: Command) -> None:
        live = self.live
        if live is False or not command:
            return
        rest = self._assign(command, known=live is True)
        if not rest or not all(isinstance(word, Word) for word in rest):
            return
        spoken = self._spoken([word for word in rest if isinstance(word, Word)])
        spoken = _inner(spoken)
        if spoken and spoken[0].text not in _PRINTS and _launches(spoken):
            self.doubtful |= live is None
            if live:
                self.launches.append(spoken)

    def _spoken(self, words: Sequence[Word]) -> list[SpokenWord]:
        """What words become; an entry of an array keeps the line that it stands on there."""
        lines = {word.text: word.line for array in self.arrays.values() for word in array}
        return [
            SpokenWord(text, lines.get(text, word.line) if text != word.plain else word.line)
            for word in words
            for text in self.variables.fields(word)
        ]

    def _assign(self, command: Command, *, known: bool) -> Command:
        """Make the assignments at the beginning of a command; returns what is behind them."""
        for index, word in enumerate(command):
            if isinstance(word, Array):
                self._set_array(word, known=known)
                continue
            if word.plain in _DECLARE or (index and (word.plain or "").startswith("-") and _declares(command)):
                continue
            text = word.pieces[0].text if not word.pieces[0].quote else ""
            name, equals, begin = text.partition("=")
            bare = name.removesuffix("+")
            if not equals or not bare.isidentifier():
                return [] if _declares(command) else command[index:]
            value = Word((Piece(begin), *word.pieces[1:]), word.line)
            new = self.variables.text(value) if known else self._doubt(bare, word.line)
            old = self.variables.values.get(bare, "")
            if name.endswith("+") and isinstance(old, str):
                new = old + new
            self.variables.values[bare] = new
        return []

    def _set_array(self, array: Array, *, known: bool) -> None:
        spoken = [SpokenWord(text, word.line) for word in array.words for text in self.variables.fields(word)]
        if not known:
            spoken = [SpokenWord(self._doubt(array.name, array.line), array.line)]
        before = self.arrays.get(array.name, []) if array.more else []
        self.arrays[array.name] = before + spoken
        self.variables.values[array.name] = [word.text for word in before + spoken]

    def _doubt(self, name: str, line: int) -> str:
        return unknown(f"{name} is set at line {line} under a condition that only a run would know")


def _commands(found: Sequence[Token]) -> Iterator[tuple[Command, str, str]]:
    """Every command with the operator behind and before it; "function" before the body of one."""
    command: Command = []
    before = ""
    for index, token in enumerate(found):
        if not isinstance(token, Operator):
            command.append(token)
            continue
        following = found[index + 1] if index + 1 < len(found) else None
        if token.text == "(" and len(command) == 1 and isinstance(following, Operator) and following.text == ")":
            yield [], "", "function"
            command = []
            continue
        if token.text == ")" and before == "(" and not command:
            before = ""
            continue
        if command:
            yield command, token.text, before
        before = token.text if token.text != "\n" or command else before
        command = []
    if command:
        yield command, "", before


def _is_test(words: Sequence[Word]) -> bool:
    return bool(words) and (words[0].plain in ("[", "test", "true", "false") or words[0].pieces[0].quote == "test")


def _declares(command: Command) -> bool:
    return isinstance(command[0], Word) and command[0].plain in _DECLARE


def _inner(words: list[SpokenWord]) -> list[SpokenWord]:
    """The command that `eval` or `bash -c` is given as text, in place of the last word."""
    texts = [word.text for word in words]
    if texts[:1] == ["eval"]:
        return _resplit([SpokenWord(" ".join(texts[1:]), words[0].line)])
    for shell in ("bash", "sh"):
        for index in range(len(texts) - 2):
            if texts[index].rpartition("/")[2] == shell and texts[index + 1] in ("-c", "-lc"):
                return words[:index] + _resplit(words[index + 2 : index + 3])
    return words


def _resplit(words: Sequence[SpokenWord]) -> list[SpokenWord]:
    found = []
    for word in words:
        try:
            found += [SpokenWord(text, word.line) for text in shlex.split(word.text)]
        except ValueError:
            found.append(word)
    return found


def _launches(words: Sequence[SpokenWord]) -> bool:
    """Whether the words start a program in Python with flags, or are such a program's flags in a variable."""
    texts = [word.text for word in words]
    programs = [index for index, text in enumerate(texts) if text.endswith(".py")]
    if programs:
        return sum(text.startswith("--") for text in texts[programs[0] :]) >= 2
    return sum(text.partition("=")[0].replace("_", "-") in READ for text in texts) >= 3


def _opposite(value: bool | None) -> bool | None:
    return None if value is None else not value


def _both(one: bool | None, other: bool | None) -> bool | None:
    return False if False in (one, other) else None if None in (one, other) else True


def _either(one: bool | None, other: bool | None) -> bool | None:
    return True if True in (one, other) else None if None in (one, other) else False
