"""`moesim placement`: which rank holds which expert and its copies, for a scenario or for a server."""

import argparse
from pathlib import Path

from moesim.cli.flags import add_cache, add_force, add_json, add_quiet, add_scenario, check_new, load
from moesim.cli.session import interrupts_say, kept_of_training, watched_training
from moesim.errors import UserError
from moesim.strict_json import json_text

NAME = "placement"
SUMMARY = (
    "Place the experts of a scenario, copies included; --out writes the map of every layer for SGLang, TensorRT-LLM or "
    "vLLM, and for placement: {kind: explicit, file: ...}."
)
SOFTWARE = ("sglang", "tensorrt-llm", "vllm", "vllm-ascend")  # the keys of `moesim.scenario.placement_file.WRITERS`
BY_ENDING = {".json": "sglang", ".yaml": "tensorrt-llm", ".yml": "tensorrt-llm"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """SCENARIO, --set, --out, --for, --over-training, --cache, --json, --quiet, --force."""
    add_scenario(parser)
    text = "write the map there: .json for SGLang, .yaml for TensorRT-LLM, or as --for says"
    parser.add_argument("--out", metavar="FILE", type=Path, help=text)
    parser.add_argument("--for", dest="software", choices=SOFTWARE, help="whose file --out writes")
    text = "also how placements age between the recorded training steps, and what placing anew moves"
    parser.add_argument("--over-training", action="store_true", help=text)
    add_cache(parser)
    add_json(parser)
    add_quiet(parser)
    add_force(parser)
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Place, write, show. Raises UserError, InfeasibleError and Interrupted."""
    from moesim.files import write_atomically
    from moesim.report.placement_view import (
        age_placements,
        drift_json,
        place,
        placement_json,
        placement_text,
        print_drift,
        print_placement,
    )
    from moesim.scenario.placement_file import WRITERS

    software = _software(args)
    scenario = load(args)
    if scenario.model.experts == 0:
        raise UserError(f"{scenario.name}: the model is dense (model.experts = 0), so there is nothing to place")
    from moesim.run import measured_placement, obtain_trace

    with interrupts_say(lambda: kept_of_training(scenario, args.cache)), watched_training(quiet=args.json) as progress:
        trace = obtain_trace(scenario, progress=progress, cache_dir=args.cache)
        scenario, _ = measured_placement(scenario, trace, progress=progress)
    assert trace is not None, "the model has experts"
    view = place(scenario, trace)
    aged = age_placements(scenario, trace) if args.over_training else []
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
    if args.software is None and args.out.suffix not in BY_ENDING:
        what = "the ending says whose file it is"
        raise UserError(f"{args.out}: {what}; use {', '.join(BY_ENDING)}, or --for {'|'.join(SOFTWARE)}")
    software: str = args.software or BY_ENDING[args.out.suffix]
    if (args.out.suffix in (".yaml", ".yml")) != (software == "tensorrt-llm"):
        raise UserError(f"{args.out}: TensorRT-LLM reads .yaml, the others .json; change the ending or --for")
    check_new(args.out, force=args.force)
    return software
