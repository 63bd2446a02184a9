"""The building blocks of terminal output: sections of aligned lines, plain text when the output is no terminal."""

from collections.abc import Callable, Iterable, Mapping, Sequence
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


def grid(rows: Iterable[Sequence[RenderableType]], *columns: Mapping[str, Any], apart: int = 2) -> Table:
    """Rows of cells in columns, each with the settings of rich's; nothing in a text is read as markup."""
    table = Table.grid(padding=(0, apart, 0, 0))
    for column in columns:
        table.add_column(**column)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    return table


def side_by_side(left: RenderableType, right: RenderableType) -> Table:
    """Two blocks beside each other."""
    return grid([(left, right)], {}, {}, apart=4)


def fact_table(lines: Sequence[Fact], *, strong: bool = False, notes: bool = True) -> Table:
    """Label, value and note of every fact."""
    columns: list[dict[str, Any]] = [
        {"no_wrap": True},
        {"no_wrap": True, "style": "bold" if strong else ""},
        {"style": "dim"},
    ]
    return grid([(line.label, line.value, line.note)[: 2 + notes] for line in lines], *columns[: 2 + notes])


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
    styles = ["dim", *("bold" if number == marked else "" for number in range(len(rows)))]
    cells = [[Text(cell, style=style) for cell in row] for style, row in zip(styles, (head, *rows), strict=True)]
    columns = [{"no_wrap": n != wrapped, "justify": "right" if n >= words else "left"} for n in range(len(head))]
    return grid(cells, *columns)


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
