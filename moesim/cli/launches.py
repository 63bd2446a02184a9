"""Launches of training software: `moesim scenarios from-megatron`, and the flags that other verbs have for them.

A launch of Megatron-LM becomes a scenario, for a file or in place of one; a layout becomes the command line of a
software.
"""

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.flags import (
    FORCE,
    JSON,
    OVERRIDES,
    QUIET,
    Flag,
    Group,
    check_writable,
    verb,
    wants_screen,
    write_output,
)
from moesim.errors import UserError

if TYPE_CHECKING:
    from moesim.flags.megatron import Reading
    from moesim.scenario import Scenario

SOFTWARE = ("megatron", "torchtitan")  # the keys of `moesim.flags.WRITERS`, known without loading it


LAUNCH = Group(
    title="what the flags of a Megatron-LM launch do not say",
    flags=(
        Flag("--gpu", metavar="NAME", help="kind of GPU, of `moesim gpus`; h100 by default"),
        Flag(
            "--gpus",
            metavar="N",
            type=int,
            help="GPUs in all, where the launcher's flags, variables or #SBATCH lines do not say it",
        ),
        Flag(
            "--routing",
            choices=("library", "train", "uniform"),
            help="routing to simulate with: a router of `moesim trace library:` (where one is laid out so), one "
            "trained as the flags say (else), or all experts alike",
        ),
        Flag(
            "--args",
            dest="arguments",
            metavar='"WORDS"',
            help="arguments of the script, as they would be written behind its name",
        ),
        Flag(
            "--var",
            dest="variables",
            metavar="NAME=VALUE",
            action="append",
            default=[],
            help="set a variable that the script takes from outside; may be repeated",
        ),
    ),
)


def read_launch_of(args: argparse.Namespace, path: Path) -> "Reading":
    """The launch in the file at `path`, as --gpu, --gpus, --var and --set say. Raises UserError."""
    from moesim.flags.megatron import read_megatron

    if args.gpus is not None and args.gpus < 1:
        raise UserError(f"--gpus {args.gpus} is not a number of GPUs; use 1 or more")
    variables = _arguments(args.arguments or "") | _variables(args.variables)
    return read_megatron(
        path, gpu=args.gpu, gpus=args.gpus, variables=variables, routing=args.routing, overrides=args.overrides
    )


def _arguments(text: str) -> dict[str, str]:
    """The words of --args by their numbers."""
    try:
        return {str(number): word for number, word in enumerate(shlex.split(text), start=1)}
    except ValueError as error:
        raise UserError(f"--args {text}: {error}") from None


def _variables(given: list[str]) -> dict[str, str]:
    for text in given:
        name, equals, _ = text.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--var {text}: write NAME=VALUE, e.g. --var TP=2")
    return {text.partition("=")[0]: text.partition("=")[2] for text in given}


def software_flag(*, of: str) -> Flag:
    """--flags."""
    text = f"also print the command line of {of} for this software, and what its flags cannot say"
    return Flag("--flags", choices=SOFTWARE, help=text)


def print_reading_summary(reading: "Reading") -> None:
    """One paragraph before the results: what was read, and what was assumed."""
    from moesim.report.catalogue_view import print_summary

    print_summary(reading)


def print_command(command: Mapping[str, Any]) -> None:
    """A command line behind the results; it is as in their JSON."""
    from moesim.report.catalogue_view import print_flags

    print_flags(command)


def flags_json(scenario: "Scenario", software: str | None) -> dict[str, Any]:
    """The command line of a scenario as a part of its result's JSON; nothing where none is asked for."""
    if software is None:
        return {}
    from moesim.flags import WRITERS

    return {"flags": {software: WRITERS[software](scenario).as_json()}}


@verb(
    "scenarios from-megatron",
    "Make a scenario of a Megatron-LM launch script or YAML file, and say what became of every flag.",
    Flag(
        "launch",
        metavar="ARGS.sh|yaml",
        type=Path,
        help="launch script (shell; read, never run), or YAML with Megatron-LM's arguments or Megatron-Bridge's fields",
    ),
    Flag("--out", metavar="FILE.yaml", type=Path, help="write the scenario here, for `moesim run`"),
    LAUNCH,
    OVERRIDES,
    JSON,
    QUIET,
    FORCE,
)
def from_megatron(args: argparse.Namespace) -> int:
    """Read the launch, show what became of its flags, write the scenario. Raises UserError."""
    if args.out is not None and args.out.is_dir():
        raise UserError(f"{args.out} is a folder; name a file such as {args.out / 'my.yaml'}")
    if args.out is not None:
        check_writable(args.out)
    reading = read_launch_of(args, args.launch)
    if args.out is not None:
        from moesim.flags.megatron import scenario_text

        write_output(scenario_text(reading), args.out, force=args.force)
    if wants_screen(args, _reading_json(reading)):
        from moesim.report.catalogue_view import print_reading

        print_reading(reading)
        told = f"written to {args.out}: moesim run {args.out}" if args.out else "--out FILE.yaml writes the scenario"
        print(f"\n{told}")
    return 0


def _reading_json(reading: "Reading") -> dict[str, object]:
    return {
        "source": reading.source,
        "scenario": reading.scenario.model_dump(mode="json"),
        "read": [asdict(entry) for entry in reading.read],
        "harmless": [asdict(entry) for entry in reading.harmless],
        "left_out": list(reading.left_out),
        "assumed": list(reading.taken),
    }
