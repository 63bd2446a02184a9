"""The building blocks of terminal output: sections of aligned lines, plain text when the output is no terminal."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TextIO, cast

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moesim.report.facts import Fact

_PIPE_WIDTH = 100
_EIGHTHS = "▏▎▍▌▋▊▉█"
_LEVELS = " ▁▂▃▄▅▆▇█"
_ASCII_LEVELS = "012345678"

Screen = Sequence[RenderableType]  # blocks below each other
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Sized:
    """Blocks that depend on the terminal's options, such as its width."""

    build: Callable[[ConsoleOptions], Screen]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Screen:
        return self.build(options)


def prints(build: Callable[Arguments, Screen]) -> Callable[Arguments, None]:
    """Makes of what builds a screen what prints it; `file` and `width` are further arguments, those of `show`."""

    @wraps(build)
    def printed(*args: Any, file: TextIO | None = None, width: int | None = None, **named: Any) -> None:
        show(build(*args, **named), file=file, width=width)

    return cast("Callable[Arguments, None]", printed)


def show(screen: Screen, *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print a screen to `file`, stdout by default.

    `width` is the terminal's by default, and 100 columns where there is no terminal.
    """
    console = Console(file=file, width=width, highlight=False)
    if width is None and not console.is_terminal:
        console = Console(file=file, width=_PIPE_WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(Group(*screen))
    encoding = console.encoding
    for line in captured.get().splitlines():  # rich pads its tables: no trailing blanks in logs and diffs
        console.file.write(line.rstrip().encode(encoding, "replace").decode(encoding) + "\n")


def indented(content: RenderableType) -> Padding:
    """`content` two columns to the right."""
    return Padding(content, (0, 0, 0, 2))


def heading(name: str, about: str = "") -> Text:
    """The first line of a screen: what it is of, and a word on it."""
    return Text.assemble((name, "bold"), (f"  {about}", "dim"))


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


def number_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words: int = 1,
    wrapped: int | None = None,
    marked: int | None = None,
) -> Table:
    """Columns of right-aligned numbers under their names, behind the first `words` ones of text.

    wrapped: the column that may wrap; marked: the row that is bold.
    """
    table = Table.grid(padding=(0, 2, 0, 0))
    for index in range(len(head)):
        table.add_column(no_wrap=index != wrapped, justify="right" if index >= words else "left")
    table.add_row(*(Text(name, style="dim") for name in head))
    for number, row in enumerate(rows):
        table.add_row(*(Text(cell, style="bold" if number == marked else "") for cell in row))
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
