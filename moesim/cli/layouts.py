"""Verbs on the layout of one scenario, which simulate no step: `moesim topology`, `volume` and `placement`.

`topology` shows the fabric, `volume` what a token sends along the size of the expert group, for several limits of the
router, and `placement` which rank holds which expert and its copies.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from moesim.cli.flags import (
    CACHE,
    FORCE,
    JSON,
    OVERRIDES,
    QUIET,
    SCENARIO,
    Flag,
    check_new,
    load,
    page_flag,
    page_path,
    verb,
    wants_screen,
    watched_training_of,
    write_output,
)
from moesim.errors import UserError

if TYPE_CHECKING:
    pass


@verb(
    "topology",
    "Print and draw the fabric of a scenario: nodes, links, bisection, oversubscription, degraded parts.",
    SCENARIO,
    OVERRIDES,
    page_flag(what="the drawing", file="topology.html"),
    JSON,
    FORCE,
)
def topology(args: argparse.Namespace) -> int:
    """Print and draw. Raises UserError."""
    scenario = load(args)
    path = page_path(args, name=scenario.name, file="topology.html")
    from moesim.report.topology import fabric_json, fabric_page, print_fabric
    from moesim.report.topology_layout import fabric_parts

    parts = fabric_parts(scenario.cluster)
    if path is not None:
        write_output(fabric_page(scenario.name, parts), path, force=args.force)
    if wants_screen(args, fabric_json(parts)):
        print_fabric(scenario.name, parts)
        print(f"\ndrawn in {path}")
    return 0


Item = TypeVar("Item")


@verb(
    "volume",
    "Count what a token sends as expert groups grow, for several limits M of groups per token; nothing is timed.",
    SCENARIO,
    OVERRIDES,
    Flag(
        "--devices",
        metavar="8,16,32",
        help="sizes of the expert group in ranks; by default 2 to 64 ranks, or nodes under dispatch.deduplicate: "
        "per_node",
    ),
    Flag("--limits", metavar="1,2,none", help="limits M of groups (ranks or nodes) per token; 1,2,3,4,none by default"),
    page_flag(what="the plot", file="volume.html"),
    CACHE,
    JSON,
    FORCE,
)
def volume(args: argparse.Namespace) -> int:
    """Count, print, plot. Raises UserError, InfeasibleError and Interrupted."""
    from moesim.report.volume import study_volume
    from moesim.report.volume_view import print_volume, volume_json, volume_page

    devices = None if args.devices is None else _items(args.devices, _size, flag="--devices", example="8,16,32")
    limits = None if args.limits is None else _items(args.limits, _limit, flag="--limits", example="1,2,none")
    scenario = load(args)
    path = page_path(args, name=scenario.name, file="volume.html")
    with watched_training_of(scenario, args, quiet=args.json) as progress:
        study = study_volume(scenario, devices=devices, limits=limits, progress=progress, cache_dir=args.cache)
    if path is not None:
        write_output(volume_page(study), path, force=args.force)
    if wants_screen(args, volume_json(study)):
        print_volume(study)
        print(f"\nplotted in {path}")
    return 0


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


SERVERS = ("sglang", "tensorrt-llm", "vllm", "vllm-ascend")  # the keys of `moesim.scenario.placement_files.WRITERS`


@verb(
    "placement",
    "Show which rank holds which expert and its copies; --out writes the map for SGLang, TensorRT-LLM or vLLM.",
    SCENARIO,
    OVERRIDES,
    Flag(
        "--out",
        metavar="FILE",
        type=Path,
        help="write the map of every layer there, for a server (.json for SGLang, .yaml for TensorRT-LLM, or as --for "
        "says) and for placement: {kind: explicit, file: FILE}",
    ),
    Flag("--for", dest="software", choices=SERVERS, help="whose file --out writes"),
    Flag(
        "--over-training",
        action="store_true",
        help="also how placements age between the recorded training steps, and what placing anew moves",
    ),
    CACHE,
    JSON,
    QUIET,
    FORCE,
)
def placement(args: argparse.Namespace) -> int:
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
    from moesim.scenario.placement_files import WRITERS

    software = _server(args)
    scenario = load(args)
    if scenario.model.experts == 0:
        raise UserError(f"{scenario.name}: the model is dense (model.experts = 0), so there is nothing to place")
    from moesim.run import choose_placement, obtain_trace

    with watched_training_of(scenario, args, quiet=args.json) as progress:
        trace = obtain_trace(scenario, progress=progress, cache_dir=args.cache)
        scenario, _ = choose_placement(scenario, trace, progress=progress)
    assert trace is not None, "the model has experts"
    view = place(scenario, trace)
    aged = compare_placement_ages(scenario, trace) if args.over_training else []
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(args.out, placement_text(view, software).encode(), replace=args.force)
    if wants_screen(args, placement_json(view) | ({"over_training": drift_json(aged)} if aged else {})):
        print_placement(view)
        if aged:
            print_drift(aged)
        if args.out is not None:
            print(f"\nwritten to {args.out} for {WRITERS[software][0]}")
    return 0


def _server(args: argparse.Namespace) -> str:
    """Whose file is written. Raises UserError where neither flag nor ending says so, and for a file that is there."""
    if args.out is None:
        if args.software is not None:
            raise UserError("--for says whose file --out writes; add --out FILE")
        return SERVERS[0]
    from moesim.scenario.placement_files import WRITERS

    if args.out.is_dir() or not args.out.suffix:
        first = {own: name for name, own, _ in reversed(tuple(WRITERS.values()))}
        files = " or ".join(f"{args.out / 'map'}{own} for {name}" for own, name in first.items())
        what = "is a folder" if args.out.is_dir() else "has no ending"
        raise UserError(f"{args.out} {what}; --out is one file: {files}, others with --for")
    ending = {".yml": ".yaml"}.get(args.out.suffix, args.out.suffix)
    fitting = [name for name, (_, own, _) in WRITERS.items() if own == ending]
    if args.software is None and not fitting:
        endings = ", ".join(dict.fromkeys(own for _, own, _ in WRITERS.values()))
        what = "the ending says whose file it is"
        raise UserError(f"{args.out}: {what}; use {endings}, or --for {'|'.join(SERVERS)}")
    software: str = args.software or fitting[0]
    if software not in fitting:
        name, own, _ = WRITERS[software]
        raise UserError(f"{args.out}: {name} reads {own}; change the ending or --for")
    check_new(args.out, force=args.force)
    return software
