"""What became of the flags of a launch, and the command line of a layout, on a terminal."""

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moesim.flags.from_megatron import FlagFate, Reading
from moesim.report.screen import indented, section, show, warnings


def print_reading(reading: Reading, *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print every flag: what it became, why it changes nothing, what is not modelled, and what was assumed."""
    show(lambda _: _reading(reading), file=file, width=width)


def print_summary(reading: Reading, *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print how many flags were read, and what was assumed; what is not modelled is among the warnings of the run."""
    head = Text(reading.source, style="bold")
    head.append(f"  {_counts(reading)}", style="dim")
    lines = [indented(Text(f"assumed: {line}", style="dim")) for line in reading.taken]
    show(lambda _: [head, *lines, Text("")], file=file, width=width)


def print_flags(command: Mapping[str, Any], *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print a command line, as in the JSON of a result, so that it can be pasted into a shell, and what it lacks."""
    show(lambda _: [Text(f"\nflags for {command['software']}", style="bold")], file=file, width=width)
    print(command["command"], file=file)  # not wrapped: a line break inside would part a word
    if command["unsaid"]:
        show(lambda _: [section("what these flags cannot say", _unsaid(command))], file=file, width=width)


def _counts(reading: Reading) -> str:
    words = [f"{len(reading.read)} flags read", f"{len(reading.harmless)} change nothing"]
    return ", ".join([*words, f"{len(reading.left_out)} not modelled"])


def _reading(reading: Reading) -> list[RenderableType]:
    head = Text(reading.source, style="bold")
    head.append(f"  {_counts(reading)}", style="dim")
    blocks: list[RenderableType] = [head, section("read", _pairs([(e.flag, e.becomes) for e in reading.read]))]
    if reading.harmless:
        blocks.append(section("changes nothing in a simulated step", _by_reason(reading.harmless)))
    if reading.taken:
        blocks.append(section("assumed", _lines(reading.taken)))
    return blocks + warnings([f"not modelled: {line}" for line in reading.left_out])


def _unsaid(command: Mapping[str, Any]) -> RenderableType:
    return _pairs([(entry["key"], f"instead: {entry['instead']}") for entry in command["unsaid"]])


def _pairs(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(overflow="fold")
    table.add_column(overflow="fold", style="dim")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _by_reason(entries: Sequence[FlagFate]) -> Table:
    """The flags of every reason in one row."""
    names: dict[str, list[str]] = {}
    for entry in entries:
        names.setdefault(entry.becomes, []).append(entry.flag.split()[0])
    return _pairs([(reason, " ".join(found)) for reason, found in names.items()])


def _lines(texts: Sequence[str]) -> Table:
    table = Table.grid()
    table.add_column(overflow="fold")
    for text in texts:
        table.add_row(Text(text))
    return table
