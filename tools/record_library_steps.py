"""Programs of transformers and torchtitan recorded at their first size, beside the measured seconds of all their sizes.

    python tools/record_library_steps.py STEPS.json... [--out tests/data/library_steps.json.gz]

STEPS.json: what tools/measure_library_steps.py writes. Prints measured beside predicted, from the first size scaled; a
step on two GPUs is spread over them as its wrapper does it. A step of a program that has no first size is recorded
itself. `python tools/library_table.py` prints the tables.
"""

import argparse
import gzip
import json
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from library_table import Program, predicted_s
from measure_library_steps import SETS, Case, closure, module

from moesim.importing.recording import record_step
from moesim.recorded.step_file import RecordedOp

VERSIONS = {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.11", "transformers": "5.17", "torchtitan": "0.2.2"}


def recorded(case: Case) -> list[RecordedOp]:
    """The operations of a case on one GPU."""
    with torch.device("meta"):
        model = module(case, "meta")
        return record_step(model, closure(case, model, "meta"))


def program(first: Case, seconds: dict[str, float]) -> dict[str, Any]:
    """The operations of a program's first size, and the measured steps of all its sizes."""
    ops, steps = recorded(first), []
    for case in chain(*SETS.values()):
        if _program(case) != _program(first) or case.name not in seconds:
            continue
        steps.append(
            {
                "name": case.name,
                "layers": case.layers,
                "sequences": case.batch,
                "tokens": case.sequence,
                "blind": case.blind,
                "first": case.traced,
                "sustained_s": seconds[case.name],
            }
        )
    return {"mode": first.mode, "ops": [operation.as_json() for operation in ops], "steps": steps}


def _program(case: Case) -> str:
    return case.name if "small-" in case.name and case.name.split("-")[-1] not in "abcde" else case.name[:-2]


def main() -> None:
    """Record, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", metavar="STEPS.json", type=Path, nargs="+")
    parser.add_argument("--without", nargs="*", default=[], help="steps that ran with other kernels than is recorded")
    parser.add_argument("--onto", type=Path, help="a file whose other programs are kept")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = [row for path in args.steps for row in json.loads(path.read_text(encoding="utf-8"))["steps"]]
    seconds = {row["case"]["name"]: row["sustained_s"] for row in rows if "sustained_s" in row}
    seconds = {name: took for name, took in seconds.items() if name not in args.without}
    firsts: dict[str, Case] = {}
    for case in chain(*SETS.values()):
        if case.name in seconds:
            firsts.setdefault(_program(case), case)
    programs = {name: program(first, seconds) for name, first in firsts.items()}
    for found in programs.values():
        for step in found["steps"]:
            predicted, measured = predicted_s(Program.of(found), step), step["sustained_s"]
            if not step["blind"]:
                print(
                    f"{step['name']}: {1e3 * measured:.1f} ms, {1e3 * predicted:.1f}, {predicted / measured - 1:+.1%}"
                )
    if args.onto is not None:
        programs = json.loads(gzip.decompress(args.onto.read_bytes()))["programs"] | programs
    if args.out is not None:
        args.out.write_bytes(gzip.compress(json.dumps(VERSIONS | {"programs": programs}).encode(), mtime=0))


if __name__ == "__main__":
    main()
