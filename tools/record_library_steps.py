"""Programs of transformers recorded at their first size, beside the measured seconds of all their sizes.

    python tools/record_library_steps.py STEPS.json... [--out tests/data/library_steps.json.gz]

STEPS.json: what tools/measure_library_steps.py writes. Prints measured beside predicted, from the first size scaled.
"""

import argparse
import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure_library_steps import CASES, TITAN, Case, closure, module

from moesim.importing.recording import record_step
from moesim.kernels import kernel_model
from moesim.recorded.pricing import step_estimate
from moesim.recorded.scaling import scaled
from moesim.recorded.sizes import sizes_of

VERSIONS = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11", "transformers": "5.17"}


def recorded(first: Case, seconds: dict[str, float]) -> dict[str, Any]:
    """The operations of a program's first size, and the measured steps of all its sizes."""
    with torch.device("meta"):
        model = module(first, "meta")
        operations = record_step(model, closure(first, model, "meta"))
    found, kernels, steps = sizes_of(operations, where=first.name), kernel_model("h100"), []
    for case in CASES:
        if case.name[:-2] != first.name[:-2] or case.name not in seconds:
            continue
        layers = case.layers - found.dense_layers
        to = replace(found, sequences=case.batch, sequence_length=case.sequence, moe_layers=layers)
        predicted, measured = step_estimate(scaled(operations, found, to), kernels).step_s, seconds[case.name]
        print(f"{case.name}: {1e3 * measured:.1f} ms, {1e3 * predicted:.1f} predicted, {predicted / measured - 1:+.1%}")
        steps.append(
            {
                "name": case.name,
                "layers": case.layers,
                "sequences": case.batch,
                "tokens": case.sequence,
                "blind": case.blind,
                "first": case.traced,
                "sustained_s": measured,
            }
        )
    return {"ops": [operation.as_json() for operation in operations], "steps": steps}


def main() -> None:
    """Record, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", metavar="STEPS.json", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [row for path in args.steps for row in json.loads(path.read_text(encoding="utf-8"))["steps"]]
    seconds = {row["case"]["name"]: row["sustained_s"] for row in rows if "sustained_s" in row}
    firsts = [case for case in CASES if case.traced and case.mode == "one" and case.family != TITAN]
    programs = {first.name[:-2]: recorded(first, seconds) for first in firsts}
    if args.out is not None:
        args.out.write_bytes(gzip.compress(json.dumps(VERSIONS | {"programs": programs}).encode(), mtime=0))


if __name__ == "__main__":
    main()
