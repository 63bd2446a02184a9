"""The flags that several verbs share, and the checks that belong to them."""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import UserError

if TYPE_CHECKING:
    from moesim.scenario import Scenario
    from moesim.shipped import Kind


def add_scenario(
    parser: argparse.ArgumentParser,
    *,
    text: str = "scenario file (YAML), or the name of one that ships",
    optional: bool = False,
) -> None:
    """SCENARIO and --set; `optional`: something else may stand for the scenario."""
    add_file(parser, "scenario", text=text, optional=optional)
    add_overrides(parser)


def add_file(parser: argparse.ArgumentParser, kind: "Kind", *, text: str, optional: bool = False) -> None:
    """SCENARIO, STUDY or PLAN, completed by the names that ship; see `resolve`."""
    nargs = "?" if optional else None
    argument: Any = parser.add_argument(kind, metavar=kind.upper(), type=Path, nargs=nargs, help=text)
    argument.completer = partial(_files_and_names, kind)  # read by argcomplete alone


def _files_and_names(kind: "Kind", prefix: str, **_: object) -> list[str]:
    from argcomplete.completers import FilesCompleter

    from moesim.shipped import names

    return [*names(kind), *FilesCompleter(("yaml", "yml"))(prefix)]


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """--set."""
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override one key, e.g. --set routing.steps=50; may be repeated",
    )


def add_cache(parser: argparse.ArgumentParser) -> None:
    """--cache."""
    text = "where trained routers are kept; $MOESIM_CACHE or ~/.cache/moesim by default"
    parser.add_argument("--cache", metavar="DIR", type=Path, help=text)


def add_json(parser: argparse.ArgumentParser) -> "argparse._MutuallyExclusiveGroup":
    """--json; what is returned takes the flags that exclude it."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    return group


def add_csv(group: "argparse._MutuallyExclusiveGroup") -> None:
    """--csv, beside --json."""
    text = "print the result as CSV and nothing else: a row per item, columns named as in the JSON"
    group.add_argument("--csv", action="store_true", help=text)


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """--quiet."""
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors (and --json or --csv)")


def add_force(parser: argparse.ArgumentParser) -> None:
    """--force."""
    parser.add_argument("--force", action="store_true", help="replace what an earlier call wrote there")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """--workers and --cluster; see check_workers."""
    parser.add_argument("--workers", metavar="N", type=int, help="processes that simulate; one per core by default")
    text = "simulate on the workers of this Dask scheduler instead, e.g. tcp://host:8786"
    parser.add_argument("--cluster", metavar="ADDRESS", help=text)


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

    return load_scenario(resolve(args.scenario, "scenario"), args.overrides)


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
