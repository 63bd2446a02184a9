"""What verbs share, and what surrounds every one.

Ctrl-C, closed or full standard streams, and the progress of training on stderr; what a verb is, its flags and checks,
and what it leaves beside its screen, a page or CSV.
"""

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from moesim.errors import UserError
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.routing.request import ProgressCallback
    from moesim.scenario import Scenario
    from moesim.shipped import Kind

INTERRUPTED_EXIT_CODE = 130  # 128 + SIGINT


class Interrupted(Exception):
    """The user stopped the work; the message says what was kept and how to resume."""


@contextmanager
def interrupts_explained_by(what_was_kept: Callable[[], str]) -> Iterator[None]:
    """Turn Ctrl-C inside the block into Interrupted with the text that `what_was_kept` gives then."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; {what_was_kept()}") from None


def training_left_in_cache(scenario: "Scenario", cache_dir: Path | None) -> str:
    """What the cache holds of this scenario's router: the trace, a checkpoint, or nothing."""
    again = "run the same command again"
    if scenario.routing.kind != "train":
        return f"nothing was written; {again} to start over"
    from moesim.routing.request import TrainingRequest, checkpoint_path, trace_path

    request = TrainingRequest.from_scenario(scenario)
    trace = trace_path(request, cache_dir)
    if trace.exists():
        return f"the trained router is kept in {trace}; {again} to go straight to the simulation"
    checkpoint = checkpoint_path(request, cache_dir)
    if checkpoint.exists():
        return f"the training so far is kept in {checkpoint}; {again} to resume it"
    return f"no training step was kept; {again} to start over"


def open_closed_streams() -> None:
    """Give every closed standard stream a place that takes all: else the next file opened would get its number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > number and not _is_open(number):
            os.dup2(descriptor, number)
            os.close(descriptor)
            descriptor = number
        setattr(sys, name, open(descriptor, mode, encoding="utf-8"))  # noqa: SIM115 - for the life of the process


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def discard_output(stream: TextIO) -> None:
    """What is still buffered goes nowhere: Python writes it once more at its end, and would complain again."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def write_stderr(line: str) -> None:
    """A line on standard error, where somebody can read it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard_output(sys.stderr)


@contextmanager
def watched_training(*, quiet: bool) -> "Iterator[ProgressCallback | None]":
    """What to call after every training step: it shows nothing for a cached router; None when quiet."""
    from moesim.display import opened_display
    from moesim.routing.request import show_training

    with opened_display(quiet=quiet) as display:
        yield None if display is None else show_training(display)


@contextmanager
def watched_training_of(
    scenario: "Scenario", args: argparse.Namespace, *, quiet: bool
) -> "Iterator[ProgressCallback | None]":
    """As `watched_training`, of the router of one scenario; Ctrl-C says what the cache keeps of it."""
    with (
        interrupts_explained_by(lambda: training_left_in_cache(scenario, args.cache)),
        watched_training(quiet=quiet) as progress,
    ):
        yield progress


class Flag:
    """An argument of a verb: its words and settings as argparse takes them; `completer` is argcomplete's alone."""

    def __init__(self, *words: str, completer: Callable[..., Any] | None = None, **settings: Any) -> None:
        self.words, self.completer, self.settings = words, completer, settings

    def add(self, parser: Any) -> None:
        """Add it to a parser or a group of one."""
        argument = parser.add_argument(*self.words, **self.settings)
        if self.completer is not None:
            argument.completer = self.completer


class Group(NamedTuple):
    """Arguments that exclude each other, or with a `title` stand under it in the help."""

    flags: Sequence[Flag]
    title: str = ""

    def add(self, parser: Any) -> None:
        """Add them to a parser."""
        group = parser.add_argument_group(self.title) if self.title else parser.add_mutually_exclusive_group()
        for flag in self.flags:
            flag.add(group)


class Verb(NamedTuple):
    """One verb: the word or two that call it, the line that explains it, its flags in the order of its help, and its
    work, which returns the exit code."""

    name: str
    summary: str
    flags: Sequence[Flag | Group]
    execute: Callable[[argparse.Namespace], int]


def verb(name: str, summary: str, *flags: Flag | Group) -> Callable[[Callable[[argparse.Namespace], int]], Verb]:
    """Makes a verb of the function that does its work."""
    return lambda execute: Verb(name, summary, flags, execute)


def shipped_file(kind: "Kind", text: str, *, optional: bool = False) -> Flag:
    """SCENARIO, STUDY or PLAN, completed by the names that ship; `optional`: something else may stand for it."""
    nargs = "?" if optional else None
    completer = partial(_files_and_names, kind)
    return Flag(kind, metavar=kind.upper(), type=Path, nargs=nargs, help=text, completer=completer)


def _files_and_names(kind: "Kind", prefix: str, **_: object) -> list[str]:
    from argcomplete.completers import FilesCompleter

    from moesim.shipped import names

    return [*names(kind), *FilesCompleter(("yaml", "yml"))(prefix)]


_OF_A_SCENARIO = "scenario file (YAML), or the name of one that ships"
SCENARIO = shipped_file("scenario", _OF_A_SCENARIO)
OPTIONAL_SCENARIO = shipped_file("scenario", _OF_A_SCENARIO, optional=True)
OVERRIDES = Flag(
    "--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[],
    help="override one key, e.g. --set routing.steps=50; may be repeated",
)  # fmt: skip
CACHE = Flag(
    "--cache",
    metavar="DIR",
    type=Path,
    help="where trained routers are kept; $MOESIM_CACHE or ~/.cache/moesim by default",
)
JSON = Flag("--json", action="store_true", help="print the result as JSON and nothing else")
_CSV = "print the result as CSV and nothing else: a row per item, columns named as in the JSON"
JSON_OR_CSV = Group((JSON, Flag("--csv", action="store_true", help=_CSV)))
QUIET = Flag("--quiet", action="store_true", help="print nothing but errors (and --json or --csv)")
FORCE = Flag("--force", action="store_true", help="replace what an earlier call wrote there")
WORKERS = (  # see check_workers
    Flag("--workers", metavar="N", type=int, help="processes that simulate; one per core by default"),
    Flag("--cluster", metavar="ADDRESS",
         help="simulate on the workers of this Dask scheduler instead, e.g. tcp://host:8786"),
)  # fmt: skip


def page_flag(*, what: str, file: str) -> Flag:
    """--out for a page called `file` that shows `what`."""
    text = f"{what} as one HTML file that needs no network; runs/NAME/{file} by default, and none beside --json"
    return Flag("--out", metavar="FILE.html", type=Path, help=text)


def wants_screen(args: argparse.Namespace, result: Any, rows: Sequence[Mapping[str, Any]] | None = None) -> bool:
    """Print the result for --json, or its rows (itself if None) for --csv; whether a screen is wanted instead."""
    if args.json:
        print(json_text(result, indent=1))
    elif getattr(args, "csv", False):
        print_csv([result] if rows is None else rows)
    else:
        return not getattr(args, "quiet", False)
    return False


def check_workers(args: argparse.Namespace) -> None:
    """Refuse a number of processes that is none, or one beside a cluster. Raises UserError."""
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers {args.workers} is not a number of processes; use 1 or more")
    if args.cluster is not None and args.workers is not None:
        raise UserError("--workers counts processes of this machine; leave it out beside --cluster")


def load(args: argparse.Namespace) -> "Scenario":
    """The scenario of a call. Raises UserError."""
    from moesim.scenario import load_scenario
    from moesim.shipped import resolve
    from moesim.trace.store import is_trace_file

    path = resolve(args.scenario, "scenario")
    if is_trace_file(path):
        taken = f"--set 'routing={{kind: trace, file: {path}}}'"
        raise UserError(f"{path} is a routing trace, no scenario; name a scenario of its model, and add {taken}")
    return load_scenario(path, args.overrides)


def check_new(path: Path, *, force: bool) -> None:
    """Refuse a file that is there, unless `force`, and a place that cannot be written to. Raises UserError."""
    if path.exists() and not force:
        raise UserError(f"{path} exists; choose another --out, or --force to replace it")
    check_writable(path)


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse numbers below 1 among flags, which may be absent. Raises UserError."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be 1 or more")


def check_writable(path: Path) -> None:
    """Refuse a place that cannot be written to, before any long work. Raises UserError."""
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK) or (existing != path.absolute() and not existing.is_dir()):
        raise UserError(f"{path} cannot be written: {existing} is not a writable folder; choose another --out")


def page_path(args: argparse.Namespace, *, name: str, file: str) -> Path | None:
    """Where the page of the scenario `name` goes; None where none is asked for. Raises UserError."""
    if args.out is None and args.json:
        return None
    path: Path = args.out or Path("runs") / name / file
    check_page(path, file=file)
    return path


def check_page(path: Path, *, file: str) -> None:
    """Refuse a place where a page cannot be written, or would not be known for one. Raises UserError."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file, such as {path / file}")
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{path} does not end in .html, as a page must; use --out {path.with_suffix('.html')}")
    check_writable(path)


def write_output(text: str, path: Path, *, force: bool) -> None:
    """Write a file, whole or not at all. Raises UserError where another file is in its place, unless `force`.

    A file of the same content is left alone: the same call twice is no mistake.
    """
    data = text.encode("utf-8")
    if path.exists() and not force:
        if path.read_bytes() == data:
            return
        raise UserError(f"{path} exists and differs; choose another --out, or --force to replace it")
    from moesim.files import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data, replace=force)


def write_page(page: str, numbers: Mapping[str, Any], path: Path, *, force: bool) -> None:
    """Write a page, and its numbers beside it. Raises UserError as `write_output`."""
    write_output(page, path, force=force)
    write_output(json_text(numbers, indent=1) + "\n", path.with_suffix(".json"), force=force)


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a head and the rows, each flattened; a cell of a row that lacks the column stays empty."""
    flat = [dict(_cells(row)) for row in rows]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)


def texts(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a study chose for a point, each value in one cell: plain ones as they are, others as JSON."""
    plain = (str, int, float, bool, type(None))
    return {key: value if isinstance(value, plain) else json_text(value) for key, value in values.items()}


def _cells(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        if not any(str(key).isdecimal() for key in value):  # those are numbers per rank
            for key, child in value.items():
                yield from _cells(child, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        if path.endswith("_range_s") and len(value) == 2:
            yield from zip((f"{path}.low", f"{path}.high"), value, strict=True)
    elif isinstance(value, bool):
        yield path, str(value).lower()
    else:
        yield path, value
