"""The building blocks of terminal output: sections of aligned lines, plain text when the output is no terminal."""

from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moesim.report.facts import Fact

_PIPE_WIDTH = 100
_EIGHTHS = "▏▎▍▌▋▊▉█"
_LEVELS = " ▁▂▃▄▅▆▇█"
_ASCII_LEVELS = "012345678"


def show(
    build: Callable[[ConsoleOptions], Sequence[RenderableType]], *, file: TextIO | None = None, width: int | None = None
) -> None:
    """Print what `build` makes of the terminal's options to `file`, stdout by default.

    `width` is the terminal's by default, and 100 columns where there is no terminal.
    """
    console = Console(file=file, width=width, highlight=False)
    if width is None and not console.is_terminal:
        console = Console(file=file, width=_PIPE_WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(Group(*build(console.options)))
    encoding = console.encoding
    for line in captured.get().splitlines():  # rich pads its tables: no trailing blanks in logs and diffs
        console.file.write(line.rstrip().encode(encoding, "replace").decode(encoding) + "\n")


def indented(content: RenderableType) -> Padding:
    """`content` two columns to the right."""
    return Padding(content, (0, 0, 0, 2))


def section(title: str, content: RenderableType) -> Group:
    """`content` under a heading."""
    return Group(Text(f"\n{title}", style="bold"), indented(content))


def side_by_side(left: RenderableType, right: RenderableType) -> Table:
    """Two blocks beside each other."""
    grid = Table.grid(padding=(0, 4, 0, 0))
    grid.add_row(left, right)
    return grid


def fact_table(lines: Sequence[Fact], *, strong: bool = False, notes: bool = True) -> Table:
    """Label, value and note of every fact; nothing in them is read as markup."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold" if strong else "")
    for line in lines:
        note = [Text(line.note, style="dim")] if notes else []
        table.add_row(Text(line.label), Text(line.value), *note)
    return table


def number_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Columns of right-aligned numbers under their names; the first column is text."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for index in range(len(head)):
        table.add_column(no_wrap=True, justify="right" if index else "left")
    table.add_row(*(Text(name, style="dim") for name in head))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def warnings(texts: Sequence[str]) -> list[RenderableType]:
    """What a reader must know before trusting the numbers, a line each; nothing where there is nothing."""
    return [Text(""), *(Text(f"warning: {text}", style="bold yellow") for text in texts)] if texts else []


def bar(length: float, *, ascii_only: bool) -> str:
    """A bar of `length` columns, to an eighth where the encoding has the characters."""
    if ascii_only:
        return "#" * max(1, round(length))
    eighths = max(1, round(length * 8))
    return _EIGHTHS[7] * (eighths // 8) + (_EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def profile(values: Sequence[float], *, full: float, ascii_only: bool) -> str:
    """One character per value, 0 empty and `full` or more a full column."""
    levels = _ASCII_LEVELS if ascii_only else _LEVELS
    return "".join(levels[min(8, max(0, round(8 * value / full)))] for value in values)
