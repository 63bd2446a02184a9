"""`moesim scenarios from-megatron`: read a launch script of Megatron-LM, and write the scenario that it is."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from moesim.cli.flags import add_force, add_json, add_overrides, add_quiet, check_writable
from moesim.cli.launches import add_launch, read_launch_of
from moesim.cli.outputs import write_output
from moesim.errors import UserError
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.flags.from_megatron import Reading

NAME = "scenarios from-megatron"
SUMMARY = "Make a scenario of a Megatron-LM launch script or YAML file, and say what became of every flag."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """ARGS, --out, --gpu, --gpus, --routing, --var, --args, --set, --json, --quiet, --force."""
    text = "launch script (shell; read, never run), or YAML with Megatron-LM's arguments or Megatron-Bridge's fields"
    parser.add_argument("launch", metavar="ARGS.sh|yaml", type=Path, help=text)
    parser.add_argument("--out", metavar="FILE.yaml", type=Path, help="write the scenario here, for `moesim run`")
    add_launch(parser)
    add_overrides(parser)
    add_json(parser)
    add_quiet(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Read the launch, show what became of its flags, write the scenario. Raises UserError."""
    if args.out is not None and args.out.is_dir():
        raise UserError(f"{args.out} is a folder; name a file such as {args.out / 'my.yaml'}")
    if args.out is not None:
        check_writable(args.out)
    reading = read_launch_of(args, args.launch)
    if args.out is not None:
        from moesim.flags.from_megatron import scenario_text

        write_output(scenario_text(reading), args.out, force=args.force)
    if args.json:
        print(json_text(_content(reading), indent=1))
    elif not args.quiet:
        from moesim.report.catalogue_screens import print_reading

        print_reading(reading)
        told = f"written to {args.out}: moesim run {args.out}" if args.out else "--out FILE.yaml writes the scenario"
        print(f"\n{told}")
    return 0


def _content(reading: "Reading") -> dict[str, object]:
    return {
        "source": reading.source,
        "scenario": reading.scenario.model_dump(mode="json"),
        "read": [asdict(entry) for entry in reading.read],
        "harmless": [asdict(entry) for entry in reading.harmless],
        "left_out": list(reading.left_out),
        "assumed": list(reading.taken),
    }
