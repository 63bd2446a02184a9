"""`moesim volume`: bytes per token against the size of the expert group, for several limits of the router."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from moesim.cli.flags import add_cache, add_force, add_json, add_scenario, load
from moesim.cli.outputs import add_page, place_of_page, write_output
from moesim.cli.session import interrupts_say, kept_of_training, watched_training
from moesim.errors import UserError
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.report.volume import VolumeStudy
    from moesim.scenario import Scenario

NAME = "volume"
SUMMARY = "Count what a token sends as expert groups grow, for several limits M of groups per token; nothing is timed."

Item = TypeVar("Item")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SCENARIO, --set, --devices, --limits, --out, --cache, --json, --force."""
    add_scenario(parser)
    sizes = (
        "sizes of the expert group in ranks; by default 2 to 64 ranks, or nodes under dispatch.deduplicate: per_node"
    )
    parser.add_argument("--devices", metavar="8,16,32", help=sizes)
    limits = "limits M of groups (ranks or nodes) per token; 1,2,3,4,none by default"
    parser.add_argument("--limits", metavar="1,2,none", help=limits)
    add_page(parser, what="the plot", file=f"{NAME}.html")
    add_cache(parser)
    add_json(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Count, print, plot. Raises UserError, InfeasibleError and Interrupted."""
    devices = None if args.devices is None else _items(args.devices, _size, flag="--devices", example="8,16,32")
    limits = None if args.limits is None else _items(args.limits, _limit, flag="--limits", example="1,2,none")
    scenario = load(args)
    path = place_of_page(args, name=scenario.name, file=f"{NAME}.html")
    study = _study(scenario, devices, limits, args)
    from moesim.report.volume import print_volume, volume_json, volume_page

    if path is not None:
        write_output(volume_page(study), path, force=args.force)
    if args.json:
        print(json_text(volume_json(study), indent=1))
    else:
        print_volume(study)
        print(f"\nplotted in {path}")
    return 0


def _study(
    scenario: "Scenario", devices: list[int] | None, limits: list[int | None] | None, args: argparse.Namespace
) -> "VolumeStudy":
    from moesim.report.volume import study_volume

    with interrupts_say(lambda: kept_of_training(scenario, args.cache)), watched_training(quiet=args.json) as progress:
        return study_volume(scenario, devices=devices, limits=limits, progress=progress, cache_dir=args.cache)


def _items(text: str, read: Callable[[str], Item], *, flag: str, example: str) -> list[Item]:
    """The items of a list with commas. Raises UserError."""
    try:
        return [read(item.strip()) for item in text.split(",")]
    except ValueError:
        raise UserError(f"{flag} {text}: not a list of positive whole numbers; write e.g. {flag} {example}") from None


def _size(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(text)
    return int(text)


def _limit(text: str) -> int | None:
    return None if text == "none" else _size(text)
