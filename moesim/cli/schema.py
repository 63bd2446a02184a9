"""`moesim schema`: the JSON Schema of scenario files, for editors and other programs."""

import argparse
from pathlib import Path

from moesim.strict_json import json_text

NAME = "schema"
SUMMARY = "Print the JSON Schema of scenario files."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--out."""
    parser.add_argument("--out", metavar="FILE", type=Path, help="write it there instead of printing it")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Print or write the schema."""
    from moesim.scenario.json_schema import json_schema

    text = json_text(json_schema(), indent=1)
    if args.out is None:
        print(text)
    else:
        from moesim.files import write_atomically

        write_atomically(args.out, (text + "\n").encode())
    return 0
