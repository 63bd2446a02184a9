"""`moesim schema`: the JSON Schema of scenario, study, plan and serving files, for editors and other programs."""

import argparse
from pathlib import Path
from typing import Any

from moesim.strict_json import json_text

NAME = "schema"
SUMMARY = "Print the JSON Schema of scenario files, or of studies, plans or serving scenarios."
KINDS = ("scenario", "study", "plan", "serving")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """WHAT and --out."""
    parser.add_argument(
        "what", metavar="WHAT", nargs="?", choices=KINDS, default="scenario", help="whose keys: scenario if left out"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="write it there instead of printing it")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Print or write the schema."""
    text = json_text(_schema(args.what), indent=1)
    if args.out is None:
        print(text)
    else:
        from moesim.files import write_atomically

        write_atomically(args.out, (text + "\n").encode())
    return 0


def _schema(what: str) -> dict[str, Any]:
    if what == "plan":
        from moesim.planner.loading import any_plan_json_schema

        return any_plan_json_schema()
    if what == "serving":
        from moesim.serving.json_schema import serving_json_schema

        return serving_json_schema()
    if what == "study":
        from moesim.sweeper.study import study_json_schema

        return study_json_schema()
    from moesim.scenario.loader import json_schema

    return json_schema()
