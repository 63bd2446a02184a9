"""What steps cost the host, part by part, beside the costs of operations, views and weights in `moesim.recorded`.

    python tools/host_table.py                                # the table of docs/imported-steps.md
    python tools/host_table.py --record FOLDER/host.json...   # what tools/measure_host.py wrote, with recorded counts

A case kept out of every choice is of a family that gave no cost. --record records each program on the meta device,
counts its operations, views and weights, and writes tests/data/host_h100.json.gz.
"""

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import measured_data
from measured_data import print_head, print_row, summary

from moesim.recorded.estimate import HOST
from moesim.recorded.step_file import GRADIENTS, VIEWS

DATA = measured_data.DATA / "host_h100.json.gz"
# The host of the machine that tests/data/hf_steps.json.gz was measured on. One factor of one step: of those that were
# looked at, olmoe-2k alone waits for its host.
SLOWER_HOST = HOST.times(1.65)
PARTS = ("forward", "backward", "optimizer")


def steps() -> list[dict[str, Any]]:
    """Of the file: seconds of every part, and what the recording counts."""
    found: list[dict[str, Any]] = measured_data.read(DATA)["steps"]
    return found


def predicted(step: dict[str, Any]) -> dict[str, float]:
    """Seconds of the host by part."""
    counts, views = step["operations"], step["views"]
    return {
        "forward": HOST.op * counts["forward"] + HOST.view * views["forward"],
        "backward": HOST.backward_op * counts["backward"] + HOST.backward_view * views["backward"],
        "optimizer": HOST.op + HOST.weight * step["weights"],
    }


def error_of_step(step: dict[str, Any]) -> float:
    """Of the sum of all parts against steps in a row."""
    return float(sum(predicted(step).values()) / step["sustained_s"] - 1)


def record(files: list[Path]) -> None:
    """Write the measured cases with the counts of their recordings."""
    import torch
    from measure_host import CASES
    from measure_library_steps import closure, module

    from moesim.importing.recording import record_step

    read = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    measured = {row["case"]["name"]: row for found in read for row in found["steps"] if "sustained_s" in row}
    rows = []
    for case in (case for case in CASES if case.name in measured):
        with torch.device("meta"):
            model = module(case, "meta")
            ops = record_step(model, closure(case, model, "meta"))
        row = {key: value for key, value in measured[case.name].items() if key != "case"}
        row |= {"name": case.name, "blind": case.blind}
        row["operations"] = {part: sum(op.count for op in ops if op.phase == part) for part in PARTS}
        row["views"] = {
            part: sum(op.count * op.facts.get(VIEWS, 0) for op in ops if op.phase == part) for part in PARTS
        }
        row["weights"] = sum(op.count * len(op.facts.get(GRADIENTS, ())) for op in ops)
        rows.append(row)
    head = {key: read[0][key] for key in ("gpu", "cpu", "torch")}
    DATA.write_bytes(gzip.compress(json.dumps(head | {"steps": rows}).encode(), mtime=0))


def main() -> None:
    """Record, or print a row for each case and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", metavar="HOST.json", type=Path, nargs="+")
    files = parser.parse_args().record
    if files:
        record(files)
    print_head("case", "kept out", "step, ms", *PARTS, "all")
    for step in steps():
        errors = [f"{each / step[f'{part}_s'] - 1:+.0%}" for part, each in predicted(step).items()]
        kept = "yes" if step["blind"] else ""
        print_row(step["name"], kept, f"{1e3 * step['sustained_s']:.1f}", *errors, f"{error_of_step(step):+.1%}")
    for blind, name in ((True, "kept out"), (False, "seen")):
        found = [error_of_step(step) for step in steps() if step["blind"] is blind]
        print(f"{name}: {len(found)} steps, {summary(found)}")


if __name__ == "__main__":
    main()
