"""`moesim scenarios`: list the scenarios, studies and plans that ship with the package, or copy them."""

import argparse
from pathlib import Path

from moesim.cli.flags import add_force, add_json, add_quiet
from moesim.errors import UserError
from moesim.shipped import KINDS, VERBS, copy, shipped
from moesim.strict_json import json_text

NAME = "scenarios"
SUMMARY = "List the scenarios, studies and plans that ship with moesim; `scenarios copy NAME|all DIR` copies them."
HEADS = {"scenario": "scenarios", "study": "studies", "plan": "plans", "serving": "serving"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """copy NAME|all DIR, --json, --quiet, --force."""
    text = "copy NAME|all DIR: put a shipped file, with what it refers to, into a folder; without it: list them"
    parser.add_argument("words", metavar="copy NAME DIR", nargs="*", help=text)
    add_json(parser)
    add_quiet(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """List or copy. Raises UserError for words that are neither, and for what `copy` refuses."""
    if not args.words:
        _list(as_json=args.json, quiet=args.quiet)
        return 0
    action, *rest = args.words
    if action != "copy" or len(rest) != 2:
        raise UserError(
            f"`scenarios {' '.join(args.words)}`: write `scenarios copy NAME DIR`, `scenarios copy all DIR` "
            "or `scenarios from-megatron ARGS.sh`"
        )
    places = copy(rest[0], Path(rest[1]), force=args.force)
    if args.json:
        print(json_text([str(place) for place in places], indent=1))
    elif not args.quiet:
        print("\n".join(str(place) for place in places))
    return 0


def _list(*, as_json: bool, quiet: bool) -> None:
    files = shipped()
    if as_json:
        rows = [{"kind": f.kind, "name": f.name, "file": f.place.as_posix(), "purpose": f.purpose} for f in files]
        print(json_text(rows, indent=1))
    elif not quiet:
        from moesim.report.catalogue_screens import print_shipped

        print_shipped([(HEADS[kind], VERBS[kind], [f for f in files if f.kind == kind]) for kind in KINDS])
