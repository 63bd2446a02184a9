"""Run the commands of the documentation's pages and hold, or renew, the output that the pages show.

A block of a page that is fenced as `console` holds commands, each behind `$ `, and under each what it prints (both
streams). A line `...` stands for lines that the page leaves out. Commands of a page run in one folder of their own, one
after the other; a line that begins with `> ` goes on with the command above it; one that fails must say so in a line
that begins with `moesim: `. A block of another language whose first line is `# NAME`, with an ending, is that file in
the folder.

    python tools/page_outputs.py [PAGE...]           # writes what the commands print into the pages
    python tools/page_outputs.py --check [PAGE...]   # says where a page shows something else; exit code 1

A check lets numbers differ by 5 % (a router trained on another machine differs in its last digits), words not at all.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
WIDTH = 98  # columns of a page's block of code
LEFT_OUT = "..."
TOLERANCE = 0.05
_FENCE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"^```\w+\n(# ([\w-]+\.\w+)\n.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
_BARS = re.compile(r"[▏▎▍▌▋▊▉█]+")


@dataclass(frozen=True)
class Shown:
    """A command of a page and the lines that the page shows under it."""

    command: str
    lines: tuple[str, ...]


class PageError(Exception):
    """A page and what its commands print do not go together."""


def pages_with_commands() -> list[Path]:
    """The pages of docs/ and the README, where they hold commands that run."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [page for page in pages if _FENCE.search(page.read_text(encoding="utf-8"))]


def shown_in(block: str) -> Iterator[Shown]:
    """The commands of one block with what is shown under each."""
    command, lines = "", list[str]()
    for line in [*block.splitlines(), "$ "]:
        if line.startswith("> ") and command and not lines:
            command += "\n" + line[2:]
        elif not line.startswith("$ "):
            lines.append(line)
        else:
            if command:
                yield Shown(command, tuple(lines))
            command, lines = line[2:], []


def printed_by(command: str, folder: Path) -> tuple[str, ...]:
    """The lines that a command prints in `folder`. Raises PageError where it fails without an error of moesim's."""
    environment = {**os.environ, "COLUMNS": str(WIDTH), "PYTHONWARNINGS": "ignore", "PYTHONUTF8": "1"}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    text = done.stdout.replace(str(ROOT) + "/", "")
    if done.returncode and not text.startswith("moesim: "):
        raise PageError(f"`{command}` ends with {done.returncode}: {text}")
    return tuple(line.rstrip() for line in text.rstrip("\n").splitlines())


def abridged(shown: Sequence[str], printed: Sequence[str]) -> tuple[str, ...]:
    """`printed` without what `shown` leaves out.

    Behind a `...` the page goes on at the printed line that begins with the same words. Raises PageError without one.
    """
    if not shown or LEFT_OUT not in [line.strip() for line in shown]:
        return tuple(printed)
    kept: list[str] = []
    at = 0
    for number, part in enumerate(_parts(shown)):
        if number:
            kept.append(LEFT_OUT)
            at = _next(part, printed, at) if part else len(printed)
        kept += printed[at : at + len(part)]
        at += len(part)
    return tuple(kept)


def _parts(shown: Sequence[str]) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for line in shown:
        if line.strip() == LEFT_OUT:
            parts.append([])
        else:
            parts[-1].append(line)
    return parts


def _next(part: Sequence[str], printed: Sequence[str], start: int) -> int:
    words = _label(part[0])
    for at in range(start, len(printed)):
        if _label(printed[at]) == words:
            return at
    raise PageError(f"no line of the output begins as {part[0].strip()!r} does")


def _label(line: str) -> str:
    """The words with which a line begins, up to a gap or a number."""
    return re.split(r"\s{2,}|\d", line.strip())[0]


def differs(shown: Sequence[str], printed: Sequence[str]) -> str:
    """What of the shown lines is not printed so, as one line; empty where all is."""
    for ours, theirs in zip(shown, printed, strict=False):
        if _words(ours) != _words(theirs) or not _near(ours, theirs):
            return f"shows {ours.strip()!r}, and {theirs.strip()!r} is printed"
    if len(shown) != len(printed):
        return f"shows {len(shown)} lines, and {len(printed)} are printed"
    return ""


def _words(line: str) -> list[str]:
    return _NUMBER.sub("#", _BARS.sub("", line)).split()


def _near(ours: str, theirs: str) -> bool:
    pairs = zip(_NUMBER.findall(ours), _NUMBER.findall(theirs), strict=True)
    numbers = [(float(a.replace(",", "")), float(b.replace(",", ""))) for a, b in pairs]
    return all(abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) for a, b in numbers)


def renewed(page: Path, *, check: bool) -> tuple[str, list[str]]:
    """The text of a page with what its commands print now, and where it shows something else."""
    found: list[str] = []
    before = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        for content, name in _FILE.findall(before):
            (Path(folder) / name).write_text(content, encoding="utf-8")

        def block(match: re.Match[str]) -> str:
            lines = []
            for shown in shown_in(match[1]):
                printed = abridged(shown.lines, printed_by(shown.command, Path(folder)))
                difference = differs(shown.lines, printed) if check else ""
                if difference:
                    found.append(f"{page.relative_to(ROOT)}: `{shown.command}` {difference}")
                lines += ["$ " + shown.command.replace("\n", "\n> "), *printed]
            return "```console\n" + "".join(line + "\n" for line in lines) + "```"

        text = _FENCE.sub(block, before)
    return text, found


def main(argv: Sequence[str]) -> int:
    """Hold or renew the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE", help="README.md and docs/*.md by default")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is out of date")
    args = parser.parse_args(argv)
    found = []
    for page in [path.resolve() for path in args.pages] or pages_with_commands():
        try:
            text, differences = renewed(page, check=args.check)
        except PageError as error:
            text, differences = page.read_text(encoding="utf-8"), [f"{page.relative_to(ROOT)}: {error}"]
        found += differences
        if not args.check:
            page.write_text(text, encoding="utf-8")
        print(page.relative_to(ROOT), "differs" if differences else "holds" if args.check else "renewed", flush=True)
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
