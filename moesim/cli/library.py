"""`moesim trace library:...`: list the library of trained routing, or show one entry."""

import argparse
import fnmatch
from dataclasses import asdict
from typing import TYPE_CHECKING

from moesim.errors import UserError
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.trace.library import LibraryEntry


def show_library(args: argparse.Namespace) -> int:
    """List the entries that match (`library:`, `library:64x6/*`), or show or save one. Raises UserError."""
    from moesim.scenario.routing import LIBRARY_PREFIX
    from moesim.trace import save_trace
    from moesim.trace.library import find_entry, library_entries, load_library

    name = str(args.scenario).removeprefix(LIBRARY_PREFIX)
    if args.overrides:
        raise UserError(f"--set changes a scenario, and {args.scenario} is none; leave it out")
    if not name or any(sign in name for sign in "*?["):
        _list([entry for entry in library_entries() if fnmatch.filter(entry.names, name or "*")], args)
        return 0
    entry = find_entry(name)
    trace = load_library(name)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        save_trace(trace, args.out, replace=args.force)
    if args.json or not args.quiet:
        from moesim.report.catalogue_screens import entry_facts, print_entry

        if args.json:
            print(json_text(entry_facts(entry, trace), indent=1))
        else:
            print_entry(entry, trace)
    return 0


def _list(entries: "list[LibraryEntry]", args: argparse.Namespace) -> None:
    if args.out is not None:
        raise UserError("--out saves one trace; name one entry, e.g. library:64x6/published")
    if not entries:
        raise UserError(f"{args.scenario}: no entry has such a name; `moesim trace library:` lists all")
    if args.json:
        print(json_text([asdict(entry) for entry in entries], indent=1))
    elif not args.quiet:
        from moesim.report.catalogue_screens import print_entries

        print_entries(entries)
