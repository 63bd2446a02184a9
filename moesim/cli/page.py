"""The page that a verb draws beside what it prints: where it goes, and that it replaces nothing by accident."""

import argparse
from pathlib import Path

from moesim.cli.flags import check_writable
from moesim.errors import UserError


def add_page(parser: argparse.ArgumentParser, *, what: str, file: str) -> None:
    """--out for a page called `file` that shows `what`."""
    text = f"{what} as one HTML file that needs no network; runs/NAME/{file} by default, and none beside --json"
    parser.add_argument("--out", metavar="FILE.html", type=Path, help=text)


def place_of_page(args: argparse.Namespace, *, name: str, file: str) -> Path | None:
    """Where the page of the scenario `name` goes; None where none is asked for. Raises UserError."""
    if args.out is None and args.json:
        return None
    path: Path = args.out or Path("runs") / name / file
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file, such as {path / file}")
    check_writable(path)
    return path


def write_page(document: str, path: Path, *, force: bool) -> None:
    """Write the page, whole or not at all. Raises UserError where another file is in its place, unless `force`.

    A page that is there already is left alone: the same call twice is no mistake.
    """
    data = document.encode("utf-8")
    if path.exists() and not force:
        if path.read_bytes() == data:
            return
        raise UserError(f"{path} exists and differs; choose another --out, or --force to replace it")
    from moesim.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data, replace=force)
