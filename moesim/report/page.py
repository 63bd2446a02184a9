"""HTML under construction: every text is escaped here, and only here are tags written."""

import html
from collections.abc import Sequence
from typing import Any

from moesim.report.facts import Fact
from moesim.report.style import STYLE

_FIGURE_CONFIG = {"displaylogo": False, "displayModeBar": False, "responsive": True}


class Page:
    """One HTML document. The methods append to it in reading order; `document` returns the whole."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def text(self, tag: str, text: str, *, css: str = "") -> None:
        """One element with escaped text."""
        self._parts.append(f"<{tag}{_class(css)}>{html.escape(text)}</{tag}>")

    def open(self, tag: str, *, css: str = "") -> None:
        """Begin an element that `close` ends."""
        self._parts.append(f"<{tag}{_class(css)}>")

    def close(self, tag: str) -> None:
        """End an element."""
        self._parts.append(f"</{tag}>")

    def figure(self, figure: Any, *, name: str, title: str = "") -> None:
        """A plotly figure under a small heading; `name` becomes the id of its element."""
        self._parts.append(f'<div class="wide" id="{html.escape(name)}">')
        if title:
            self.text("h3", title)
        self._parts.append(
            figure.to_html(full_html=False, include_plotlyjs=False, config=_FIGURE_CONFIG, div_id=f"{name}-plot")
        )
        self.close("div")

    def facts(self, title: str, lines: Sequence[Fact]) -> None:
        """A table of facts under a small heading."""
        self.open("div")
        self.text("h3", title)
        self.table((), [(line.label, line.value, line.note) for line in lines], styles=("", "number", "note"))
        self.close("div")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], *, styles: Sequence[str]) -> None:
        """A table; `styles` names the class of each column (number, note or nothing)."""
        self.open("div", css="scroll")
        self.open("table")
        if head:
            self._parts.append(f"<thead>{_row('th', head, styles)}</thead>")
        self._parts.extend(_row("td", row, styles) for row in rows)
        self._parts.append("</table></div>")

    def bars(self, rows: Sequence[tuple[str, str, Sequence[str], float]], *, head: Sequence[str]) -> None:
        """A table of (colour, label, numbers, share of the longest bar) with a swatch and a bar per row."""
        styles = ["", *["number"] * (len(head) - 2), ""]
        self._parts.append(f'<div class="scroll"><table><thead>{_row("th", head, styles)}</thead>')
        for colour, label, numbers, length in rows:
            cells = "".join(f'<td class="number">{html.escape(number)}</td>' for number in numbers)
            swatch = f'<span class="swatch" style="background:{colour}"></span>{html.escape(label)}'
            bar = f'<td class="bar"><div style="background:{colour};width:{100 * length:.2f}%"></div></td>'
            self._parts.append(f"<tr><td>{swatch}</td>{cells}{bar}</tr>")
        self._parts.append("</table></div>")

    def document(self, *, title: str, script: str) -> str:
        """The finished file; `script` is embedded once, in the head."""
        lines = [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{STYLE}</style>",
            f"<script>{script}</script>",
            "</head>\n<body>\n<main>",
            *self._parts,
            "</main>\n</body>\n</html>\n",
        ]
        return "\n".join(lines)


def _class(name: str) -> str:
    return f' class="{html.escape(name)}"' if name else ""


def _row(tag: str, cells: Sequence[str], styles: Sequence[str]) -> str:
    inside = "".join(
        f"<{tag}{_class(style)}>{html.escape(cell)}</{tag}>" for cell, style in zip(cells, styles, strict=True)
    )
    return f"<tr>{inside}</tr>"
