"""Verbs that simulate no step: the fabric (`moesim topology`), bytes per token (`volume`), experts (`placement`).

`topology` is numbers and a drawing; `volume` goes along the size of the expert group, for several limits of the router;
`placement` says which rank holds which expert and its copies, for a scenario or for a server.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from moesim.cli.flags import (
    Verb,
    add_cache,
    add_force,
    add_json,
    add_page,
    add_quiet,
    add_scenario,
    check_new,
    interrupts_explained_by,
    load,
    page_path,
    training_left_in_cache,
    watched_training,
    write_output,
)
from moesim.errors import UserError
from moesim.strict_json import json_text

if TYPE_CHECKING:
    from moesim.report.volume import VolumeStudy
    from moesim.scenario import Scenario


def add_topology_arguments(parser: argparse.ArgumentParser) -> None:
    """SCENARIO, --set, --out, --json, --force."""
    add_scenario(parser)
    add_page(parser, what="the drawing", file="topology.html")
    add_json(parser)
    add_force(parser)


def execute_topology(args: argparse.Namespace) -> int:
    """Print and draw. Raises UserError."""
    scenario = load(args)
    path: Path | None = page_path(args, name=scenario.name, file="topology.html")
    from moesim.report.topology import fabric_json, fabric_page, print_fabric
    from moesim.report.topology_layout import fabric_parts

    parts = fabric_parts(scenario.cluster)
    if path is not None:
        write_output(fabric_page(scenario.name, parts), path, force=args.force)
    if args.json:
        print(json_text(fabric_json(parts), indent=1))
    else:
        print_fabric(scenario.name, parts)
        print(f"\ndrawn in {path}")
    return 0


TOPOLOGY = Verb(
    "topology",
    "Print and draw the fabric of a scenario: nodes, links, bisection, oversubscription, degraded parts.",
    add_topology_arguments,
    execute_topology,
)


Item = TypeVar("Item")


def add_volume_arguments(parser: argparse.ArgumentParser) -> None:
    """SCENARIO, --set, --devices, --limits, --out, --cache, --json, --force."""
    add_scenario(parser)
    sizes = (
        "sizes of the expert group in ranks; by default 2 to 64 ranks, or nodes under dispatch.deduplicate: per_node"
    )
    parser.add_argument("--devices", metavar="8,16,32", help=sizes)
    limits = "limits M of groups (ranks or nodes) per token; 1,2,3,4,none by default"
    parser.add_argument("--limits", metavar="1,2,none", help=limits)
    add_page(parser, what="the plot", file="volume.html")
    add_cache(parser)
    add_json(parser)
    add_force(parser)


def execute_volume(args: argparse.Namespace) -> int:
    """Count, print, plot. Raises UserError, InfeasibleError and Interrupted."""
    devices = None if args.devices is None else _items(args.devices, _size, flag="--devices", example="8,16,32")
    limits = None if args.limits is None else _items(args.limits, _limit, flag="--limits", example="1,2,none")
    scenario = load(args)
    path = page_path(args, name=scenario.name, file="volume.html")
    study = _counted(scenario, devices, limits, args)
    from moesim.report.volume import print_volume, volume_json, volume_page

    if path is not None:
        write_output(volume_page(study), path, force=args.force)
    if args.json:
        print(json_text(volume_json(study), indent=1))
    else:
        print_volume(study)
        print(f"\nplotted in {path}")
    return 0


def _counted(
    scenario: "Scenario", devices: list[int] | None, limits: list[int | None] | None, args: argparse.Namespace
) -> "VolumeStudy":
    from moesim.report.volume import study_volume

    with (
        interrupts_explained_by(lambda: training_left_in_cache(scenario, args.cache)),
        watched_training(quiet=args.json) as progress,
    ):
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


VOLUME = Verb(
    "volume",
    "Count what a token sends as expert groups grow, for several limits M of groups per token; nothing is timed.",
    add_volume_arguments,
    execute_volume,
)


SOFTWARE = ("sglang", "tensorrt-llm", "vllm", "vllm-ascend")  # the keys of `moesim.scenario.placement.WRITERS`


def add_placement_arguments(parser: argparse.ArgumentParser) -> None:
    """SCENARIO, --set, --out, --for, --over-training, --cache, --json, --quiet, --force."""
    add_scenario(parser)
    text = (
        "write the map of every layer there, for a server (.json for SGLang, .yaml for TensorRT-LLM, or as --for says) "
        "and for placement: {kind: explicit, file: FILE}"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help=text)
    parser.add_argument("--for", dest="software", choices=SOFTWARE, help="whose file --out writes")
    text = "also how placements age between the recorded training steps, and what placing anew moves"
    parser.add_argument("--over-training", action="store_true", help=text)
    add_cache(parser)
    add_json(parser)
    add_quiet(parser)
    add_force(parser)


def execute_placement(args: argparse.Namespace) -> int:
    """Place, write, show. Raises UserError, InfeasibleError and Interrupted."""
    from moesim.files import write_atomically
    from moesim.report.placement_view import (
        compare_placement_ages,
        drift_json,
        place,
        placement_json,
        placement_text,
        print_drift,
        print_placement,
    )
    from moesim.scenario.placement import WRITERS

    software = _software(args)
    scenario = load(args)
    if scenario.model.experts == 0:
        raise UserError(f"{scenario.name}: the model is dense (model.experts = 0), so there is nothing to place")
    from moesim.run import choose_placement, obtain_trace

    with (
        interrupts_explained_by(lambda: training_left_in_cache(scenario, args.cache)),
        watched_training(quiet=args.json) as progress,
    ):
        trace = obtain_trace(scenario, progress=progress, cache_dir=args.cache)
        scenario, _ = choose_placement(scenario, trace, progress=progress)
    assert trace is not None, "the model has experts"
    view = place(scenario, trace)
    aged = compare_placement_ages(scenario, trace) if args.over_training else []
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, placement_text(view, software).encode(), replace=args.force)
    if args.json:
        found = placement_json(view) | ({"over_training": drift_json(aged)} if aged else {})
        print(json_text(found, indent=1))
    elif not args.quiet:
        print_placement(view)
        if aged:
            print_drift(aged)
        if args.out is not None:
            print(f"\nwritten to {args.out} for {WRITERS[software][0]}")
    return 0


def _software(args: argparse.Namespace) -> str:
    """Whose file is written. Raises UserError where neither flag nor ending says so, and for a file that is there."""
    if args.out is None:
        if args.software is not None:
            raise UserError("--for says whose file --out writes; add --out FILE")
        return SOFTWARE[0]
    from moesim.scenario.placement import WRITERS

    ending = {".yml": ".yaml"}.get(args.out.suffix, args.out.suffix)
    fitting = [name for name, (_, own, _) in WRITERS.items() if own == ending]
    if args.software is None and not fitting:
        endings = ", ".join(dict.fromkeys(own for _, own, _ in WRITERS.values()))
        what = "the ending says whose file it is"
        raise UserError(f"{args.out}: {what}; use {endings}, or --for {'|'.join(SOFTWARE)}")
    software: str = args.software or fitting[0]
    if software not in fitting:
        name, own, _ = WRITERS[software]
        raise UserError(f"{args.out}: {name} reads {own}; change the ending or --for")
    check_new(args.out, force=args.force)
    return software


PLACEMENT = Verb(
    "placement",
    "Show which rank holds which expert and its copies; --out writes the map for SGLang, TensorRT-LLM or vLLM.",
    add_placement_arguments,
    execute_placement,
)
