"""HTML under construction: every text is escaped here, and only here are tags written."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moesim.report.facts import Fact
from moesim.strict_json import json_text

_FIGURE_CONFIG = {"displaylogo": False, "displayModeBar": False, "responsive": True}
_TOOLS_CONFIG = _FIGURE_CONFIG | {
    "displayModeBar": "hover",
    "modeBarButtons": [["toImage", "resetScale2d"]],
    "toImageButtonOptions": {"scale": 2},
}


class Page:
    """One HTML document. The methods append to it in reading order; `document` returns the whole."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def text(self, tag: str, text: str, *, css: str = "", **attributes: str) -> None:
        """One element with escaped text; `data_axis` names the attribute `data-axis`."""
        self._parts.append(f"<{tag}{_class(css)}{_attributes(attributes)}>{html.escape(text)}</{tag}>")

    def open(self, tag: str, *, css: str = "", **attributes: str) -> None:
        """Begin an element that `close` ends, or one that has no end, with attributes as in `text`."""
        self._parts.append(f"<{tag}{_class(css)}{_attributes(attributes)}>")

    def close(self, tag: str) -> None:
        """End an element."""
        self._parts.append(f"</{tag}>")

    def data(self, value: Any, *, name: str) -> None:
        """Plain values for a script of the page, which finds them by the id `name`."""
        text = json_text(value, separators=(",", ":")).replace("<", "\\u003c")
        self._parts.append(f'<script type="application/json" id="{html.escape(name)}">{text}</script>')

    def code(self, script: str) -> None:
        """A script of our own, run when the page above it is there."""
        self._parts.append(f"<script>{script}</script>")

    def figure(self, figure: Any, *, name: str, title: str = "", tools: bool = False) -> None:
        """A plotly figure under a small heading; `name` becomes the id of its element.

        With `tools` the pointer brings up buttons that save it as an image and that undo zooming.
        """
        self.open("div", css="wide plotted" if tools else "wide", id=name)
        if title:
            self.text("h3", title)
        self._parts.append(
            figure.to_html(
                full_html=False,
                include_plotlyjs=False,
                config=_TOOLS_CONFIG if tools else _FIGURE_CONFIG,
                div_id=f"{name}-plot",
            )
        )
        self.close("div")

    def facts(self, title: str, lines: Sequence[Fact]) -> None:
        """A table of facts under a small heading."""
        self.open("div")
        self.text("h3", title)
        rows = [(line.label, line.value, line.note) for line in lines]
        self.table((), rows, styles=("", "number", "note"), css="facts")
        self.close("div")

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        styles: Sequence[str],
        name: str = "",
        css: str = "",
        row_attributes: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """A table; `styles` names the class of each column (number, note or nothing).

        `name` is the id of the table, `css` a class of the frame around it.
        """
        self.open("div", css=f"scroll {css}".strip())
        self.open("table", **({"id": name} if name else {}))
        if head:
            self._parts.append(f"<thead>{_row('th', head, styles, {})}</thead>")
        own = row_attributes or [{}] * len(rows)
        self._parts.extend(_row("td", row, styles, more) for row, more in zip(rows, own, strict=True))
        self._parts.append("</table></div>")

    def bars(self, rows: Sequence[tuple[str, str, Sequence[str], float]], *, head: Sequence[str]) -> None:
        """A table of (colour, label, numbers, share of the longest bar) with a swatch and a bar per row."""
        styles = ["", *["number"] * (len(head) - 2), ""]
        self._parts.append(f'<div class="scroll"><table><thead>{_row("th", head, styles, {})}</thead>')
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
            f"<style>{_style()}</style>",
            f"<script>{script}</script>",
            "</head>\n<body>\n<main>",
            *self._parts,
            "</main>\n</body>\n</html>\n",
        ]
        return "\n".join(lines)


def _class(name: str) -> str:
    return f' class="{html.escape(name)}"' if name else ""


def _attributes(attributes: Mapping[str, str]) -> str:
    return "".join(f' {name.replace("_", "-")}="{html.escape(value)}"' for name, value in attributes.items())


def _row(tag: str, cells: Sequence[str], styles: Sequence[str], attributes: Mapping[str, str]) -> str:
    inside = "".join(
        f"<{tag}{_class(style)}>{html.escape(cell)}</{tag}>" for cell, style in zip(cells, styles, strict=True)
    )
    return f"<tr{_attributes(attributes)}>{inside}</tr>"


def _style() -> str:
    return (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
