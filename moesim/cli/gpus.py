"""`moesim gpus`: the GPUs of the catalogue, their peaks, memory and rent, and where each number comes from."""

import argparse
from typing import Any

from moesim.cli.flags import add_csv, add_json
from moesim.cli.outputs import print_csv
from moesim.strict_json import json_text

NAME = "gpus"
SUMMARY = "List the GPUs that scenarios and plans may name: peaks, memory, links, rent, and their sources."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """NAME..., --json, --csv."""
    name: Any = parser.add_argument("names", metavar="NAME", nargs="*", help="these GPUs alone")
    name.completer = _names  # read by argcomplete alone
    add_csv(add_json(parser))
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Print the catalogue. Raises UserError for a name that it lacks."""
    found = [_facts(name) for name in args.names or _names()]
    if args.json:
        print(json_text(found, indent=1))
    elif args.csv:
        print_csv(found)
    else:
        from moesim.report.catalogue_screens import print_gpus

        print_gpus(found)
    return 0


def _names(**_: object) -> tuple[str, ...]:
    from moesim.scenario import gpu_names

    return gpu_names()


def _facts(name: str) -> dict[str, Any]:
    """The catalogue's entry with SI units in the names of its keys; peaks are dense, bandwidths per direction."""
    from moesim.scenario import gpu_spec

    spec = gpu_spec(name)
    return {
        "name": spec.name,
        "peak_flop_per_s": dict(spec.peak_flops),
        "memory_bytes": spec.memory_bytes,
        "memory_bytes_per_s": spec.memory_bandwidth,
        "l2_bytes": spec.l2_bytes,
        "nvlink_bytes_per_s": spec.nvlink_bandwidth,
        "sm_count": spec.sm_count,
        "clock_hz": spec.clock_hz,
        "usd_per_gpu_hour": spec.price_per_gpu_hour,
        "source": spec.source,
        "price_source": spec.price_source,
    }
