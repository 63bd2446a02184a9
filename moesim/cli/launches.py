"""Launches of Megatron-LM as scenarios (`moesim scenarios from-megatron`), and layouts as flags of training software.

The flags that other verbs have for either are here, too.
"""

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.cli.flags import Verb, add_force, add_json, add_overrides, add_quiet, check_writable, write_output
from moesim.errors import UserError
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.flags.from_megatron import Reading
    from moesim.scenario import Scenario

SOFTWARE = ("megatron", "torchtitan")  # the keys of `moesim.flags.software.WRITERS`, known without loading it


def add_launch(parser: argparse.ArgumentParser) -> None:
    """--gpu, --gpus, --routing, --var and --args: what flags do not say."""
    group = parser.add_argument_group("what the flags of a Megatron-LM launch do not say")
    group.add_argument("--gpu", metavar="NAME", help="kind of GPU, of `moesim gpus`; h100 by default")
    text = "GPUs in all, where the launcher's flags, variables or #SBATCH lines do not say it"
    group.add_argument("--gpus", metavar="N", type=int, help=text)
    text = (
        "routing to simulate with: a router of `moesim trace library:` (where one is laid out so), one trained as the "
        "flags say (else), or all experts alike"
    )
    group.add_argument("--routing", choices=("library", "train", "uniform"), help=text)
    text = "arguments of the script, as they would be written behind its name"
    group.add_argument("--args", dest="arguments", metavar='"WORDS"', help=text)
    text = "set a variable that the script takes from outside; may be repeated"
    group.add_argument("--var", dest="variables", metavar="NAME=VALUE", action="append", default=[], help=text)


def read_launch_of(args: argparse.Namespace, path: Path) -> "Reading":
    """The launch in the file at `path`, as --gpu, --gpus, --var and --set say. Raises UserError."""
    from moesim.flags.from_megatron import read_megatron

    if args.gpus is not None and args.gpus < 1:
        raise UserError(f"--gpus {args.gpus} is not a number of GPUs; use 1 or more")
    variables = _arguments(args.arguments or "") | _variables(args.variables)
    return read_megatron(
        path,
        gpu=args.gpu,
        gpus=args.gpus,
        variables=variables,
        routing=args.routing,
        overrides=args.overrides,
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


def add_software(parser: argparse.ArgumentParser, *, of: str) -> None:
    """--flags."""
    text = f"also print the command line of {of} for this software, and what its flags cannot say"
    parser.add_argument("--flags", choices=SOFTWARE, help=text)


def print_reading_summary(reading: "Reading") -> None:
    """One paragraph before the results: what was read, and what was assumed."""
    from moesim.report.catalogue_screens import print_summary

    print_summary(reading)


def print_command(command: Mapping[str, Any]) -> None:
    """A command line behind the results; it is as in their JSON."""
    from moesim.report.catalogue_screens import print_flags

    print_flags(command)


def flags_json(scenario: "Scenario", software: str | None) -> dict[str, Any]:
    """The command line of a scenario as a part of its result's JSON; nothing where none is asked for."""
    if software is None:
        return {}
    from moesim.flags.software import WRITERS

    return {"flags": {software: WRITERS[software](scenario).as_json()}}


def add_from_megatron_arguments(parser: argparse.ArgumentParser) -> None:
    """ARGS, --out, --gpu, --gpus, --routing, --var, --args, --set, --json, --quiet, --force."""
    text = "launch script (shell; read, never run), or YAML with Megatron-LM's arguments or Megatron-Bridge's fields"
    parser.add_argument("launch", metavar="ARGS.sh|yaml", type=Path, help=text)
    parser.add_argument("--out", metavar="FILE.yaml", type=Path, help="write the scenario here, for `moesim run`")
    add_launch(parser)
    add_overrides(parser)
    add_json(parser)
    add_quiet(parser)
    add_force(parser)


def execute_from_megatron(args: argparse.Namespace) -> int:
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
        print(json_text(_reading_json(reading), indent=1))
    elif not args.quiet:
        from moesim.report.catalogue_screens import print_reading

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


FROM_MEGATRON = Verb(
    "scenarios from-megatron",
    "Make a scenario of a Megatron-LM launch script or YAML file, and say what became of every flag.",
    add_from_megatron_arguments,
    execute_from_megatron,
)
