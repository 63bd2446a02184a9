"""The facts in one screen of a terminal; plain text when the output is a pipe or a file."""

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moesim.report import facts
from moesim.report.facts import Fact, Result

_STYLES = {"compute": "blue", "communication": "yellow", "waiting": "magenta", "overhead": "bright_black"}
_EIGHTHS = "▏▎▍▌▋▊▉█"
_PIPE_WIDTH = 100
_TWO_COLUMNS = 100  # terminal width from which everything else stands beside the attribution
_BAR_WIDTH = 16
_SMALL = 0.01  # parts of the step below this share are summed up in one line


def print_facts(result: Result, *, file: TextIO | None = None, width: int | None = None) -> None:
    """Print one screen of facts of `result` (the content of result.json) to `file`, stdout by default.

    `width` is the terminal's by default, and 100 columns where there is no terminal.
    """
    console = Console(file=file, width=width, highlight=False)
    if width is None and not console.is_terminal:
        console = Console(file=file, width=_PIPE_WIDTH, highlight=False)
    with console.capture() as captured:
        console.print(Group(*_screen(result, width=console.width, ascii_only=console.options.ascii_only)))
    for line in captured.get().splitlines():  # rich pads its tables: no trailing blanks in logs and diffs
        console.file.write(line.rstrip() + "\n")


def _screen(result: Result, *, width: int, ascii_only: bool) -> list[RenderableType]:
    head = Text(str(result["scenario_name"]), style="bold")
    head.append(f"  {result['gpus']} GPUs, {result['samples']} routing samples", style="dim")
    time = _section("where the time goes", _attribution(result, ascii_only=ascii_only))
    balance = _section("imbalance (max / mean)", _table(facts.balance(result), notes=False))
    traffic = _section("communication per step", _table(facts.communication(result), notes=False))
    router = _section("router", _table(facts.training(result), notes=False))
    sources = _section("estimates rest on", _table(facts.sources(result), notes=False))
    if width >= _TWO_COLUMNS:
        body: list[RenderableType] = [_side_by_side(time, Group(balance, traffic, router, sources))]
    else:
        body = [time, _side_by_side(Group(balance, sources), Group(traffic, router))]
    headline = _indented(_table(facts.headline(result), strong=True))
    return [head, headline, *body, *_warnings(result.get("warnings", ()))]


def _side_by_side(left: RenderableType, right: RenderableType) -> Table:
    grid = Table.grid(padding=(0, 4, 0, 0))
    grid.add_row(left, right)
    return grid


def _indented(content: RenderableType) -> Padding:
    return Padding(content, (0, 0, 0, 2))


def _section(title: str, content: RenderableType) -> Group:
    return Group(Text(f"\n{title}", style="bold"), _indented(content))


def _table(lines: Sequence[Fact], *, strong: bool = False, notes: bool = True) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold" if strong else "")
    table.add_column(style="dim")
    for line in lines:
        table.add_row(Text(line.label), Text(line.value), Text(line.note if notes else ""))
    return table


def _attribution(result: Result, *, ascii_only: bool) -> Table:
    parts = facts.attribution(result)
    shown = [part for part in parts if part[2] >= _SMALL]
    rest = sum(seconds for _, seconds, _ in parts[len(shown) :])
    scale = _BAR_WIDTH / max(share for _, _, share in parts)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right")
    table.add_column(no_wrap=True, justify="right")
    table.add_column()
    for category, seconds, share in shown:
        bar = Text(_bar(share * scale, ascii_only=ascii_only), style=_STYLES[category.family])
        table.add_row(category.label, facts.seconds(seconds), facts.percent(share), bar)
    if rest:
        table.add_row("smaller parts", facts.seconds(rest), facts.percent(rest / result["step_time_s"]), "")
    table.add_row(Text("step", style="bold"), facts.seconds(result["step_time_s"]), facts.percent(1.0), "")
    return table


def _bar(length: float, *, ascii_only: bool) -> str:
    """A bar of `length` columns, to an eighth where the encoding has the characters."""
    if ascii_only:
        return "#" * max(1, round(length))
    eighths = max(1, round(length * 8))
    return _EIGHTHS[7] * (eighths // 8) + (_EIGHTHS[eighths % 8 - 1] if eighths % 8 else "")


def _warnings(warnings: Sequence[str]) -> list[RenderableType]:
    return [Text(""), *(Text(f"warning: {warning}", style="bold yellow") for warning in warnings)] if warnings else []
