"""The command line of a layout for one software, and what that software's flags cannot say."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moesim.scenario import Scenario

_WIDTH = 110  # characters of a line


@dataclass(frozen=True)
class Unsaid:
    """A key of a scenario that no flag says, and what the software does instead."""

    key: str
    instead: str


@dataclass(frozen=True, kw_only=True)
class Command:
    """The flags of one layout: every entry is a flag with its words. launcher: the words before them."""

    software: str
    launcher: tuple[str, ...]
    flags: tuple[tuple[str, ...], ...]
    unsaid: tuple[Unsaid, ...] = ()

    @property
    def text(self) -> str:
        """The command for a shell, over several lines."""
        lines, line = [], shlex.join(self.launcher)
        for flag in self.flags:
            word = shlex.join(flag)
            if len(line) + len(word) + 1 > _WIDTH:
                lines.append(line)
                line = f"    {word}"
            else:
                line += f" {word}"
        return " \\\n".join([*lines, line])

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "software": self.software,
            "launcher": list(self.launcher),
            "flags": [list(flag) for flag in self.flags],
            "command": self.text,
            "unsaid": [{"key": entry.key, "instead": entry.instead} for entry in self.unsaid],
        }


@dataclass
class Draft:
    """A command that is being written: `say` adds a flag, `leave` a key that none says."""

    flags: list[tuple[str, ...]] = field(default_factory=list)
    unsaid: list[Unsaid] = field(default_factory=list)

    def say(self, name: str, *words: object, when: bool = True) -> None:
        """Add a flag with its words."""
        if when:
            self.flags.append((name, *(shown(word) for word in words)))

    def say_all(self, flags: Mapping[str, object]) -> None:
        """Add flags of one word."""
        for name, word in flags.items():
            self.say(name, word)

    def leave(self, key: str, instead: str, *, when: bool = True) -> None:
        """Add a key that no flag says, once."""
        if when and key not in {entry.key for entry in self.unsaid}:
            self.unsaid.append(Unsaid(key, instead))


def shown(word: object) -> str:
    """A word of a flag: numbers in as few digits as tell them apart."""
    if isinstance(word, float) and word.is_integer() and abs(word) < 1e15:
        return f"{word:.1f}"
    return str(word)


def launch_words(scenario: Scenario) -> tuple[str, ...]:
    """torchrun's flags for the ranks of a scenario: whole nodes of its first pool, or one smaller node."""
    ranks, per_node = scenario.parallelism.world_size, scenario.cluster.main_pool.gpus_per_node
    nodes, rest = divmod(ranks, per_node)
    if rest:
        nodes, per_node = (1, ranks) if ranks < per_node else (ranks, 1)
    return "--nproc_per_node", str(per_node), "--nnodes", str(nodes)
