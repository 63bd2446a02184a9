"""HTML under construction: the elements of a page, which `page.html` writes as tags, every text escaped."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from plotly.offline import get_plotlyjs

from moesim import __version__
from moesim.report.facts import Fact
from moesim.strict_json import json_text

_FIGURE_CONFIG = {"displaylogo": False, "displayModeBar": False, "responsive": True}
_TOOLS_CONFIG = _FIGURE_CONFIG | {
    "displayModeBar": "hover",
    "modeBarButtons": [["toImage", "resetScale2d"]],
    "toImageButtonOptions": {"scale": 2},
}
_FOLDER = Path(__file__).parent
_HTML: Any = (
    Environment(autoescape=True, loader=FileSystemLoader(_FOLDER), trim_blocks=True, lstrip_blocks=True)
    .get_template("page.html")
    .module
)


class Page:
    """One HTML document called `name`, with what `about` and warnings say under it; `of`: what it shows, in its title.

    The methods append to it in reading order; `document` returns the whole.
    """

    def __init__(self, name: str, *about: str, warnings: Sequence[str] = (), of: str = "moesim") -> None:
        self._title = f"{name} - {of}"
        self._parts: list[str] = []
        self.heading(name, *about, level=1)
        for text in warnings:  # what a reader must know before trusting the numbers
            self.text("p", text, css="warning")

    def text(self, tag: str, text: str, *, css: str = "", **attributes: str) -> None:
        """One element with escaped text; `data_axis` names the attribute `data-axis`."""
        self._parts.append(_HTML.element(tag, text, _attributes(css, attributes)))

    @contextmanager
    def inside(self, tag: str, *, css: str = "", **attributes: str) -> Iterator[None]:
        """What is added in the block is inside an element, with attributes as in `text`."""
        self._parts.append(_HTML.begin(tag, _attributes(css, attributes)))
        yield
        self._parts.append(_HTML.end(tag))

    @contextmanager
    def details(self, summary: str) -> Iterator[None]:
        """What is added in the block is folded away under `summary`."""
        with self.inside("details"):
            self.text("summary", summary)
            yield

    def heading(self, title: str, *about: str, level: int = 2) -> None:
        """A heading and the paragraphs below it."""
        self.text(f"h{level}", title)
        for paragraph in about:
            self.text("p", paragraph)

    def tiles(self, facts: Sequence[tuple[str, str, str]], *, css: str = "") -> None:
        """(label, value, note) of the numbers that stand first, each in a frame; `css` is a class of the values."""
        self._parts.append(_HTML.tiles(facts, css))

    def data(self, value: Any, *, name: str) -> None:
        """Plain values for a script of the page, which finds them by the id `name`."""
        json = json_text(value, separators=(",", ":")).replace("<", "\\u003c")
        self._parts.append(_HTML.data(name, json))

    def code(self, script: str) -> None:
        """A script of our own, run when the page above it is there."""
        self._parts.append(_HTML.code(script))

    def figure(self, figure: Any, *, name: str, title: str = "", tools: bool = False) -> None:
        """A plotly figure under a small heading; `name` becomes the id of its element.

        With `tools` the pointer brings up buttons that save it as an image and that undo zooming.
        """
        config = _TOOLS_CONFIG if tools else _FIGURE_CONFIG
        with self.inside("div", css="wide plotted" if tools else "wide", id=name):
            if title:
                self.text("h3", title)
            self._parts.append(
                figure.to_html(full_html=False, include_plotlyjs=False, config=config, div_id=f"{name}-plot")
            )

    def facts(self, title: str, lines: Sequence[Fact]) -> None:
        """A table of facts under a small heading."""
        with self.inside("div"):
            rows = [(line.label, line.value, line.note) for line in lines]
            self.table((), rows, styles=("", "number", "note"), title=title, css="facts")

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        styles: Sequence[str] = (),
        title: str = "",
        name: str = "",
        css: str = "",
        row_attributes: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """A table; `styles` names the class of each column (number, note or nothing): by default text, then numbers.

        `title` is a small heading above it, `name` is the id of the table, `css` a class of the frame around it.
        """
        styles = styles or ("", *["number"] * (len(head) - 1))
        assert all(len(cells) == len(styles) for cells in rows), "a cell for every column"
        assert len(row_attributes) in (0, len(rows)), "attributes of every row, or of none"
        if title:
            self.text("h3", title)
        self._parts.append(_HTML.table(head, rows, styles, name, css, row_attributes))

    def bars(self, rows: Sequence[tuple[str, str, Sequence[str], float]], *, head: Sequence[str]) -> None:
        """A table of (colour, label, numbers, share of the longest bar) with a swatch and a bar per row."""
        self._parts.append(_HTML.bars(head, rows))

    def filter(self, index: int, name: str, texts: Sequence[str], *, title: str, single: bool) -> None:
        """A choice among `texts` for the script of the page: of one where `single`, else a tick box for each."""
        self._parts.append(_HTML.filter(index, name, title, texts, single))

    def document(self) -> str:
        """The finished file, with plotly in its head: it opens without a network."""
        style = (_FOLDER / "page.css").read_text(encoding="utf-8")
        return str(_HTML.document(self._title, style, get_plotlyjs(), self._parts, __version__))


def _attributes(css: str, attributes: Mapping[str, str]) -> dict[str, str | None]:
    return {"class": css or None} | {name.replace("_", "-"): value for name, value in attributes.items()}
