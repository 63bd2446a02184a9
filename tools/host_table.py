"""What small steps cost the host beside what their recordings say by `moesim.recorded.host`: docs/imported-steps.md.

    python tools/host_table.py              # the tables
    python tools/host_table.py --record [FILE...]    # records all programs again (needs transformers and torchtitan),
                                                     # with what tools/measure_host_programs.py wrote, if it is given

tests/data/host_h100.json.gz: tools/measure_host.py, part by part; tests/data/host_programs_h100.json.gz:
tools/measure_host_programs.py, two machines with two H100s. No step gave a number but those of two GPUs that say so.
"""

import argparse
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from library_table import pair
from measured_data import DATA, print_head, print_row, read, summary, write

from moesim.kernels import kernel_model
from moesim.recorded.estimate import step_estimate
from moesim.recorded.host import HOST, weights_of
from moesim.recorded.step_file import RecordedOp, parsed_ops
from moesim.strict_json import parse_json

PARTWISE, PROGRAMS = DATA / "host_h100.json.gz", DATA / "host_programs_h100.json.gz"
# The host of the machine that tests/data/hf_steps.json.gz was measured on. One factor of one step: of those that were
# looked at, olmoe-2k alone waits for its host.
SLOWER_HOST = HOST.times(1.65)
PARTS = ("forward", "backward", "optimizer")
LEFT_OUT = {"gradient_widths", "model_sizes", "peak_bytes"}  # facts that nothing here reads


def steps() -> list[dict[str, Any]]:
    """Measured part by part."""
    found: list[dict[str, Any]] = read(PARTWISE)["steps"]
    return found


def predicted(step: dict[str, Any]) -> dict[str, float]:
    """Seconds of the host by part."""
    ops = parsed_ops(step["ops"], where=step["name"])
    weights = weights_of(ops)
    return {part: sum(op.count * HOST.seconds(op, weights=weights) for op in ops if op.phase == part) for part in PARTS}


def error_of_step(step: dict[str, Any]) -> float:
    """Of the sum of all parts against steps in a row."""
    return float(sum(predicted(step).values()) / step["sustained_s"] - 1)


@cache
def programs() -> list[tuple[dict[str, Any], float, tuple[float, float]]]:
    """Every measured step of a program, its prediction, and that at the paces of hosts, in seconds."""
    kernels, known, found = kernel_model("h100"), {}, []
    content = read(PROGRAMS)
    recorded = {name: parsed_ops(ops, where=name) for name, ops in content["programs"].items()}
    for step in content["steps"]:
        name = step["name"]
        if name not in known:
            ranks = None if step["mode"] == "one" else pair(step["mode"])
            ops = recorded[step["program"]]
            estimate = step_estimate(ops, kernels, ranks=ranks)
            known[name] = (estimate.step_s, estimate.by_host_s)
        found.append((step, *known[name]))
    return found


def _slim(ops: list[RecordedOp]) -> list[dict[str, Any]]:
    found = []
    for op in ops:
        each = op.as_json()
        each.pop("widths", None)
        found.append(each | {"facts": {key: fact for key, fact in each["facts"].items() if key not in LEFT_OUT}})
    return found


def _measured(files: list[Path]) -> dict[str, Any]:
    """What was measured, from files programs-SET-RANKS-RANK.json: steps of the first ranks, pieces of all."""
    from measure_host_programs import FIRST, FIRST_TWO

    seen, found, rows = {case.name for case in FIRST + FIRST_TWO}, [parse_json(file.read_bytes()) for file in files], []
    for file, each in zip(files, found, strict=True):
        if not file.stem.endswith("-0"):
            continue
        for row in (row for row in each["steps"] if "failed" not in row):
            case = row.pop("case")
            program = case["name"] if case["mode"] == "one" else case["name"].split("-", 1)[1]
            named = {"name": case["name"], "program": program, "mode": case["mode"], "machine": file.stem.split("-")[1]}
            rows.append(named | {"blind": case["name"] not in seen} | row)
    pieces = [each["pieces"] for each in found if "pieces" in each]
    head = {key: found[0][key] for key in ("gpu", "cpu", "torch")}
    return head | {"pieces": pieces, "programs": {row["program"]: None for row in rows}, "steps": rows}


def record(files: list[Path]) -> None:
    """Record the programs of both files again; what was measured stays where no files are given."""
    import torch
    from measure_host import CASES
    from measure_host_programs import FIRST, SECOND, built, loss_of

    from moesim.importing.recording import record_step

    def recorded(case: Any) -> list[RecordedOp]:
        with torch.device("meta"):
            model = built(case, "meta")
            return record_step(model, loss_of(case, model, "meta"))

    cases = {case.name: case for case in CASES}
    whole, named = read(PARTWISE), {case.name: case for case in FIRST + SECOND}
    whole["steps"] = [step | {"ops": _slim(recorded(cases[step["name"]]))} for step in whole["steps"]]
    write(PARTWISE, whole)
    whole = _measured(files) if files else read(PROGRAMS)
    whole["programs"] = {name: [op.as_json() for op in recorded(named[name])] for name in whole["programs"]}
    write(PROGRAMS, whole)


def _print_parts() -> None:
    print_head("case", "step, ms", *PARTS, "all")
    for step in steps():
        errors = [f"{each / step[f'{part}_s'] - 1:+.0%}" for part, each in predicted(step).items()]
        print_row(step["name"], f"{1e3 * step['sustained_s']:.1f}", *errors, f"{error_of_step(step):+.1%}")
    print(f"{len(steps())} steps: {summary(map(error_of_step, steps()))}\n")


def _print_programs() -> None:
    print_head("step", "machine", "looked at last", "measured, ms (rounds)", "predicted", "error")
    groups: dict[str, list[float]] = {}
    for step, seconds, _ in programs():
        error, rounds = seconds / step["sustained_s"] - 1, [1e3 * each for each in step["each_s"]]
        measured = f"{1e3 * step['sustained_s']:.1f} ({min(rounds):.0f} to {max(rounds):.0f})"
        blind = "yes" if step["blind"] else ""
        print_row(step["name"], step["machine"], blind, measured, f"{1e3 * seconds:.1f}", f"{error:+.1%}")
        group = "one GPU" if step["mode"] == "one" else step["mode"]
        groups.setdefault(f"{group}, {'looked at last' if blind else 'seen'}", []).append(error)
    for name, found in sorted(groups.items()):
        print(f"{name}: {len(found)} steps, mean {np.mean(found):+.1%}, {summary(found)}")


def main() -> None:
    """Record, or print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", nargs="*", type=Path)
    files = parser.parse_args().record
    if files is not None:
        record(files)
    _print_parts()
    _print_programs()


if __name__ == "__main__":
    main()
