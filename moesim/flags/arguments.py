"""The flags of one launch, each looked up by the kind of value that the table gives it, and what became of each."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moesim.errors import UserError, closest, nearest, printable
from moesim.flags.expressions import Pattern, pattern
from moesim.flags.flag_table import READ
from moesim.flags.shell_values import is_unset, marks
from moesim.flags.unread_flags import LEFT_OUT, harmless

MOST_NAMED = 8  # unknown flags in one line
A_SLIP = 0.92  # likeness of names from which one is taken for the other
_SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Given:
    """A flag as it was given: the words behind it, and where."""

    name: str
    words: tuple[str, ...]
    where: str

    @property
    def shown(self) -> str:
        """The flag and its words, in few characters and without marks."""
        words = [
            f"${'...' if not is_unset(word) else marks(word)[0][1:]}" if marks(word) else word for word in self.words
        ]
        text = printable(" ".join([self.name, *words]))
        return text if len(text) <= _SHOWN + len(self.name) else f"{text[: _SHOWN + len(self.name)]}..."


def known_names() -> list[str]:
    """All names that have an entry of their own, for suggestions."""
    return [*READ, *LEFT_OUT]


class Arguments:
    """The flags of one launch by name; the last of several counts, as in argparse.

    `overridden` are keys of the scenario that the user sets beside them.

    Raises UserError for a flag whose name is that of another but for a slip, and for what is refused.
    """

    def __init__(self, given: Iterable[Given], *, source: str, overridden: Iterable[str] = ()) -> None:
        self.source, self.overridden = source, frozenset(overridden)
        self._given: dict[str, Given] = {}
        self.left_out: list[str] = []
        self.taken: list[str] = []  # what was assumed where nothing is said
        for flag in given:
            name = flag.name if is_known(flag.name) else flag.name.replace("_", "-")
            words = flag.words
            if name in READ and READ[name].kind == "bare" and words and words[0].lower() in ("true", "false"):
                if words[0].lower() == "false":  # as forks write what is off
                    continue
                words = ()
            self._given[name] = Given(name, words, flag.where)
        self.unknown = [flag for name, flag in self._given.items() if not is_known(name)]
        for flag in self.unknown:
            if (meant := nearest(flag.name, known_names(), likeness=A_SLIP)) is not None:
                raise UserError(f"{flag.where}: {flag.name} is no flag of Megatron-LM; did you mean {meant!r}?")
        self._leave_out()

    def _leave_out(self) -> None:
        for flag in self._given.values():
            left = LEFT_OUT.get(flag.name)
            if left is None or _says_nothing(flag):
                continue
            if left.refused:
                raise UserError(f"{flag.where}: {flag.shown}: {left.what}")
            self.note(flag.name, left.what)
        if self.unknown:
            more = f" and {len(self.unknown) - MOST_NAMED} more" if len(self.unknown) > MOST_NAMED else ""
            names = ", ".join(_with_nearest(flag.name) for flag in self.unknown[:MOST_NAMED])
            self.left_out.append(f"{self.source}: not known and left out: {names}{more}")

    def by_fate(self) -> dict[str, tuple[Given, ...]]:
        """The flags by what became of them: read, harmless, left_out or unknown."""
        found: dict[str, list[Given]] = {"read": [], "harmless": [], "left_out": [], "unknown": self.unknown}
        for name, flag in self._given.items():
            if name in READ:
                found["read"].append(flag)
            elif name in LEFT_OUT and not _says_nothing(flag):
                found["left_out"].append(flag)
            elif is_known(name):
                found["harmless"].append(flag)
        return {fate: tuple(flags) for fate, flags in found.items()}

    def note(self, name: str, what: str) -> None:
        """Keep what the simulated step does not have of a flag; of a flag that is not given, what is assumed."""
        flag = self._given.get(name)
        self.left_out.append(f"{self.source}: {flag.shown if flag else f'without {name}'}: {what}")

    def take(self, what: str) -> None:
        """Keep what was assumed where the launch says nothing."""
        self.taken.append(what)

    def refuse(self, name: str, what: str) -> UserError:
        """The error that names a flag, its value and its place."""
        flag = self._given.get(name)
        return UserError(f"{flag.where}: {flag.shown}: {what}" if flag else f"{self.source}: without {name}: {what}")

    def missing(self, name: str, remedy: str = "") -> UserError:
        """The error for a flag that is needed and not there."""
        text = f"has no {name}; add it{remedy}"
        near = [flag.name for flag in self.unknown if closest(name, [flag.name])]
        return UserError(f"{self.source} {text}" + (f" (is {near[0]} meant to be it?)" if near else ""))

    def has(self, name: str) -> bool:
        """Whether a flag is given."""
        assert name in READ, name
        return name in self._given

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number that is not negative; without a default it must be there."""
        assert READ[name].kind == "count"
        text = self._word(name)
        if text is None:
            if default is None:
                raise self.missing(name)
            return default
        if not text.isdecimal() or len(text) > 18:
            raise self.refuse(name, "must be a whole number that is not negative")
        return int(text)

    def positive(self, name: str, default: int | None = None) -> int:
        """A whole number above 0."""
        number = self.count(name, default)
        if number < 1:
            raise self.refuse(name, "must be at least 1")
        return number

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        assert READ[name].kind == "number"
        text = self._word(name)
        return default if text is None else self.finite(name, text)

    def finite(self, name: str, text: str) -> float:
        """The text of a flag as a finite number."""
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise self.refuse(name, "must be a finite number")
        return value

    def word(self, name: str, default: str) -> str:
        """One of the words that the flag takes, or any where it takes any."""
        choices = READ[name].choices
        text = self._word(name)
        if text is None:
            return default
        if choices and text not in choices:
            raise self.refuse(name, f"must be one of {', '.join(choices)}{closest(text, choices)}")
        return text

    def words(self, name: str, default: Sequence[str] = ()) -> tuple[str, ...]:
        """One or more words; those of a list in one text, too."""
        if not self.has(name):
            return tuple(default)
        flag = self._given[name]
        self._require_known(flag)
        return tuple(part for word in flag.words for part in word.strip("[]").replace(",", " ").split())

    def pattern(self, name: str) -> Pattern | None:
        """A number, or a list of numbers that is written as an expression."""
        assert READ[name].kind == "pattern"
        text = self._word(name)
        try:
            return None if text is None else pattern(text)
        except ValueError as error:
            raise self.refuse(name, f"must be a number or a list such as [0]*3+[1]*58: {error}") from None

    def _word(self, name: str) -> str | None:
        if not self.has(name):
            return None
        flag = self._given[name]
        self._require_known(flag)
        if not flag.words:
            raise self.refuse(name, "has no value behind it")
        return " ".join(flag.words) if READ[name].kind == "pattern" else flag.words[0]

    def _require_known(self, flag: Given) -> None:
        for word in flag.words:
            for mark in marks(word):
                if mark.startswith("$"):
                    name = mark[1:]
                    remedy = "give the arguments with --args" if name.isdecimal() else f"add --var {name}=VALUE"
                    what = f"takes ${name}, which the script does not set; {remedy}"
                    raise UserError(f"{flag.where}: {flag.name} {what}")
                raise UserError(f"{flag.where}: {flag.name}: {mark} is not known without running the script")


def why_harmless(flag: Given) -> str:
    """Why a flag changes nothing in a simulated step."""
    return harmless(flag.name) or "as it is without this flag"


def _says_nothing(flag: Given) -> bool:
    return bool(flag.words) and all(word in LEFT_OUT[flag.name].unless for word in flag.words)


def _with_nearest(name: str) -> str:
    near = nearest(name, known_names())
    return name if near is None else f"{name} ({near}?)"


def is_known(name: str) -> bool:
    """Whether a flag is one of Megatron-LM's or of its launchers'."""
    return name in READ or name in LEFT_OUT or harmless(name) is not None
