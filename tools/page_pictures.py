"""Make the pictures of the documentation again: parts of a report, and the plot of each study that a page shows.

    python tools/page_pictures.py --runs FOLDER [NAME...]   # sweeps and runs stay in FOLDER, a rerun goes on with them

NAME is that of a study, or `report`; all of them by default. It needs playwright and a Chromium, as the tests of pages
do, and prints the table of each study, with which docs/studies.md is held.
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs/pictures"
REPORT = "report"
WIDTH = 1000  # of the window, in pixels


def studies() -> list[str]:
    """The studies whose plots the pages show."""
    text = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("*.md"))
    shown = set(re.findall(r"\(pictures/([\w-]+)\.png\)", text))
    return sorted(path.stem for path in (ROOT / "scenarios/studies").glob("*.yaml") if path.stem in shown)


def moesim(*words: str, folder: Path) -> None:
    """Run a command there; what it prints goes to the screen."""
    environment = {**os.environ, "COLUMNS": "160"}
    subprocess.run([sys.executable, "-m", "moesim", *words], cwd=folder, env=environment, check=True)


def draw_report(browser: Any, folder: Path) -> None:
    """The head of the quickstart's report, and its heat map of experts."""
    moesim("run", "quickstart", "--quiet", "--force", folder=folder)
    page = browser.new_page(viewport={"width": 1180, "height": 900})
    page.goto(f"file://{folder}/runs/quickstart/report.html")
    page.wait_for_selector(".js-plotly-plot .main-svg")

    def top(heading: str) -> float:
        found: float = page.get_by_role("heading", name=heading, exact=True).bounding_box()["y"]
        return found

    until = page.locator(".js-plotly-plot").first.bounding_box()
    ends = {
        "report": (0.0, until["y"] + until["height"]),
        "expert-load": (top("Expert load") - 16, top("Imbalance") - 8),
    }
    for name, (begin, end) in ends.items():
        clip = {"x": 0, "y": begin, "width": 1180, "height": end - begin}
        page.screenshot(path=PICTURES / f"{name}.png", clip=clip, full_page=True)


def draw_study(browser: Any, name: str, folder: Path) -> None:
    """The plot of a study, without the page around it."""
    moesim("sweep", name, folder=folder)
    moesim("plot", f"runs/{name}", "--quiet", "--force", folder=folder)
    page = browser.new_page(viewport={"width": WIDTH, "height": 900})
    page.goto(f"file://{folder}/runs/{name}/plot.html")
    page.wait_for_selector(".js-plotly-plot .main-svg")
    page.locator(".js-plotly-plot").first.screenshot(path=PICTURES / f"{name}.png")


def main(argv: Sequence[str]) -> int:
    """Draw what is asked for."""
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--runs", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args(argv)
    args.runs.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"))
        for name in args.names or [REPORT, *studies()]:
            if name == REPORT:
                draw_report(browser, args.runs.resolve())
            else:
                draw_study(browser, name, args.runs.resolve())
            print(f"{name}: drawn", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
