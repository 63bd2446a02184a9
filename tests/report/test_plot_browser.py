"""The pages in a real browser, without a network: no errors, the pointer, the filters, and whether it can be read.

Needs Chromium and playwright (an extra of `dev`); without them these tests are skipped, but fail where CI is set.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from plot_cases import GPU, LIMIT, NODES, PRICES, axis, clusters, limits, point, result_of, write_run, write_study

from moesim.report.plots import PlotRequest, plot_page
from moesim.report.report import render
from moesim.study.points import pareto_front

WIDTH = 1280
SMALLEST_TEXT = 11.0  # pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BOXES = """selector => [...document.querySelectorAll(selector)]
  .filter(e => e.tagName === 'text' && e.textContent.trim())
  .map(e => { const b = e.getBoundingClientRect(); return [e.textContent, b.left, b.right, b.top, b.bottom]; })
  .filter(b => b[2] > b[1])"""
FONT_SIZES = """() => [...document.querySelectorAll('.js-plotly-plot text')]
  .map(text => parseFloat(getComputedStyle(text).fontSize))"""
PLACE = """([x, y]) => {
  const div = document.getElementById('figure-0-plot'), box = div.getBoundingClientRect();
  const {xaxis, yaxis} = div._fullLayout, along = (axis, value) => axis._offset + axis.c2p(axis.d2c(value));
  return [box.left + along(xaxis, x), box.top + along(yaxis, y)];
}"""


def unavailable(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(f"{reason}, and CI is set")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        unavailable("no Chromium on this machine")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed")
    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


class Shown:
    """A page in the browser, and everything that went wrong in it."""

    def __init__(self, browser: Any, file: Path) -> None:
        self.complaints: list[str] = []
        self.fetched: list[str] = []
        context = browser.new_context(viewport={"width": WIDTH, "height": 900}, offline=True)
        context.set_default_timeout(120_000)  # a busy machine is slow, not wrong
        self.page = context.new_page()
        self.page.on("console", lambda message: self._complain(message.type, message.text))
        self.page.on("pageerror", lambda error: self._complain("error", str(error)))
        self.page.on("request", lambda request: self.fetched.append(request.url))
        self.page.goto(file.as_uri())

    def _complain(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)

    def eval(self, script: str, *args: Any) -> Any:
        return self.page.evaluate(script, *args)

    def data(self, number: int = 0) -> list[dict[str, Any]]:
        """What plotly draws now."""
        keys = "x y z text name customdata meta visible"
        return self.eval(
            f"""number => document.getElementById(`figure-${{number}}-plot`).data.map(trace => Object.fromEntries(
                '{keys}'.split(' ').map(key => [key, trace[key] === undefined ? null : trace[key]])))""",
            number,
        )

    def points(self) -> list[tuple[float, float]]:
        found = [trace for trace in self.data() if trace["meta"] and trace["meta"].get("role") == "points"]
        return [(x, y) for trace in found for x, y in zip(trace["x"], trace["y"], strict=True)]

    def tick(self, key: str, text: str) -> None:
        """Tick or untick one value of the filter of `key`."""
        self.page.locator(f'fieldset:has(legend[title="{key}"]) label', has_text=text).click()

    def rows(self) -> int:
        return self.eval("() => [...document.querySelectorAll('#points tr[data-group]')].filter(r => !r.hidden).length")

    def point_at(self, x: float, y: float) -> None:
        """Move the pointer to a point of the first figure."""
        self.page.locator("#figure-0").scroll_into_view_if_needed()
        left, top = self.eval(PLACE, [x, y])
        self.page.mouse.move(left - 3, top)
        self.page.mouse.move(left, top)
        self.page.wait_for_selector(".hoverlayer .hovertext")


@pytest.fixture(scope="module")
def show(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], str]], Shown]:
    """`show(name, make)` opens what `make(folder)` writes, once."""
    opened: dict[str, Shown] = {}

    def open_once(name: str, make: Callable[[Path], str]) -> Shown:
        if name not in opened:
            folder = tmp_path_factory.mktemp(name)
            (folder / "page.html").write_text(make(folder), encoding="utf-8")
            opened[name] = Shown(browser, folder / "page.html")
        return opened[name]

    return open_once


def plan(folder: Path) -> str:
    return plot_page([clusters(folder / "plan")], PlotRequest())


def curves(folder: Path) -> str:
    ys = ("router.validation_loss", "step_time_s", "tokens_per_second")
    return plot_page([limits(folder / "limits")], PlotRequest(kind="curves", x=LIMIT, ys=ys))


def heat(folder: Path) -> str:
    return plot_page(
        [clusters(folder / "heat", kind="sweep")], PlotRequest(kind="heat_map", x=NODES, ys=(GPU, "step_time_s"))
    )


def two_runs(folder: Path) -> str:
    runs = [
        write_run(folder / name, result_of(step), f"cluster: {{pools: [{{gpu: {gpu}, nodes: 1}}]}}\n")
        for name, step, gpu in (("first", 1.0, "h100"), ("second", 0.8, "b200"))
    ]
    return plot_page(runs, PlotRequest())


def settings(folder: Path) -> str:
    names = [
        f"coefficient-of-{part}-x{factor}" for part in ("experts", "devices", "traffic") for factor in (0, 0.1, 10)
    ]
    points = [point(i, {"$setting": name}, result_of(1 + 0.1 * i, loss=2.4 - 0.05 * i)) for i, name in enumerate(names)]
    folder = write_study(folder / "settings", points, axes=[axis("$setting", names)])
    return plot_page([folder], PlotRequest(kind="curves", x="router.validation_loss", ys=("step_time_s",)))


PAGES = {"settings": settings, "plan": plan, "curves": curves, "heat": heat, "two_runs": two_runs}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_drawn_without_errors_and_can_be_read(show, name: str) -> None:
    shown = show(name, PAGES[name])
    assert shown.complaints == []
    assert [url for url in shown.fetched if not url.startswith(("file:", "data:", "blob:"))] == []
    assert shown.eval("() => document.documentElement.scrollWidth") <= WIDTH
    assert shown.eval("() => document.querySelectorAll('.main-svg').length") >= 1
    assert min(shown.eval(FONT_SIZES)) >= SMALLEST_TEXT
    for selector in ("[class$=tick] > text", ".legendtext, .annotation-text", ".infolayer [class$=title]"):
        boxes = shown.eval(BOXES, f".js-plotly-plot :is({selector})")
        for place, one in enumerate(boxes):
            for other in boxes[:place]:
                apart = one[1] >= other[2] or other[1] >= one[2] or one[3] >= other[4] or other[3] >= one[4]
                assert apart, f"{one[0]!r} lies on {other[0]!r}"


def test_the_report_of_a_run_is_drawn_without_errors(show, make_record) -> None:
    shown = show("report", lambda _: render(make_record()))
    assert shown.complaints == []
    assert shown.eval("() => document.documentElement.scrollWidth") <= WIDTH


def test_the_pointer_brings_up_the_layout(show) -> None:
    shown = show("plan", plan)
    x, y = shown.points()[0]
    shown.point_at(x, y)
    text = shown.page.locator(".hoverlayer").first.text_content()
    for part in (
        "gpu: h100",
        "nodes: 1",
        "pipeline parallel: 2",
        "step time",
        "MFU",
        "peak memory",
        "80 % interpolated",
    ):
        assert part in text


def test_filters_take_points_away_and_the_front_follows(show) -> None:
    shown = show("plan", plan)
    before, all_rows = shown.points(), shown.rows()
    assert (len(before), all_rows) == (23, 24)
    shown.tick(GPU, "b200")
    left = shown.points()
    assert (len(left), shown.rows()) == (15, 16)
    assert set(left) < set(before)
    assert shown.page.locator("#shown").text_content() == "15 of 23 shown"
    front = next(trace for trace in shown.data() if trace["meta"].get("role") == "front")
    expected = [left[index] for index in pareto_front(left, better=(1, -1))]
    assert list(zip(front["x"], front["y"], strict=True)) == expected
    assert len(front["text"]) == len(expected)
    shown.page.locator("#all").click()
    assert (shown.points(), shown.rows()) == (before, all_rows)


def test_a_fragment_shows_one_figure_alone(show) -> None:
    shown = show("curves", curves)
    table, figure = (shown.page.locator(selector) for selector in ("#points", "#figure-0"))
    shown.eval("() => { location.hash = 'figure-0'; }")
    assert (table.is_visible(), figure.is_visible()) == (False, True)
    shown.eval("() => { location.hash = ''; }")
    assert (table.is_visible(), figure.is_visible()) == (True, True)


def test_lines_and_bands_lose_the_same_places(show) -> None:
    shown = show("curves", curves)
    shown.tick(LIMIT, "no limit")
    lines = [trace for trace in shown.data() if trace["meta"]["role"] == "points"]
    bands = [trace for trace in shown.data() if trace["meta"]["role"] == "band"]
    assert [len(line["x"]) for line in lines] == [4, 4, 4]
    assert [len(band["x"]) for band in bands] == [8, 8, 8]
    assert shown.rows() == 4
    shown.page.locator("#all").click()
    assert [len(line["x"]) for line in shown.data() if line["meta"]["role"] == "points"] == [5, 5, 5]


def test_a_heat_map_shows_the_chosen_value_of_the_other_axis(show) -> None:
    shown = show("heat", heat)
    first = shown.data()[0]["z"]
    assert first[0][0] is None and len(shown.data()[1]["x"]) == 1, "a cross where there is no result"
    shown.page.locator("select").select_option(index=1)
    second = shown.data()[0]["z"]
    assert second[0][0] is not None
    for row in range(len(PRICES)):
        assert second[row][1] == pytest.approx(first[row][1] / 0.93)
    assert shown.data()[1]["visible"] is False
    shown.page.locator("select").select_option(index=0)
    assert shown.data()[0]["z"] == first


def test_the_table_sorts_by_a_column(show) -> None:
    shown = show("plan", plan)
    column = "() => [...document.querySelectorAll('#points tr[data-group]')].map(r => r.cells[4].textContent)"
    shown.page.locator("#points th", has_text="tokens per second").click()
    ascending = [float(text.replace(",", "")) for text in shown.eval(column) if text]
    assert ascending == sorted(ascending) and len(ascending) == 23
    assert shown.eval(column)[-1] == "", "points without a result come last"
    shown.page.locator("#points th", has_text="tokens per second").click()
    descending = [float(text.replace(",", "")) for text in shown.eval(column) if text]
    assert descending == ascending[::-1]
