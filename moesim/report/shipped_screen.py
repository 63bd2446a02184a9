"""What `moesim scenarios` prints: the shipped files by kind, each with its purpose and the verb that takes its name."""

from collections.abc import Sequence
from typing import TextIO

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from moesim.report.screen import section, show
from moesim.shipped import Shipped

Group = tuple[str, str, Sequence[Shipped]]  # head, verb, files


def print_shipped(groups: Sequence[Group], *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print one section per kind of file."""
    show(
        lambda _: [section(f"{head}: moesim {verb} NAME", _table(files)) for head, verb, files in groups],
        file=file,
        width=width,
    )


def _table(files: Sequence[Shipped]) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for each in files:
        table.add_row(Text(each.name, style="bold"), Text(each.purpose))
    return table
