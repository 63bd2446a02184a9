"""How well corrections of one trace carry to other sizes of a model: the table of docs/software.md.

    python tools/calibration_table.py FOLDER        # of CASE.trace.json.gz, as measure_hf_steps.py names its cases

Every trace corrects every other step of tests/data/hf_steps.json.gz of its family.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np

from moesim.importing.pricing import step_estimate
from moesim.importing.step_file import parsed_ops
from moesim.importing.traced_step import TracedStep, traced_step
from moesim.kernels import kernel_model
from moesim.strict_json import parse_json

STEPS = Path(__file__).parent.parent / "tests" / "data" / "hf_steps.json.gz"


def family(name: str) -> str:
    """`deepseek-v2` of `deepseek-v2-lite-8k`, `qwen3` of `qwen3-30b-4k`."""
    parts = name.split("-")
    return "-".join(parts[:2]) if parts[1].startswith("v") else parts[0]


def main() -> None:
    """Print a row for each pair, and what is in the middle and at worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    traces: dict[str, TracedStep] = {}
    for path in sorted(parser.parse_args().folder.glob("*.trace.json.gz")):
        if "steps" not in path.name:
            traces[path.name.split(".")[0]] = traced_step(path)
    kernels = kernel_model("h100")
    steps = parse_json(gzip.decompress(STEPS.read_bytes()))["steps"]
    errors: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    print("| calibrated at | step | not fitted | measured, ms | before | after |\n|---|---|---|---|---|---|")
    for name, trace in traces.items():
        for step in steps:
            if step["name"] == name or family(step["name"]) != family(name):
                continue
            ops = parsed_ops(step["ops"], where=step["name"])
            measured = step["measured"]["sustained_s"]
            before = step_estimate(ops, kernels).step_s / measured - 1
            after = step_estimate(ops, kernels, corrections=trace.calibration).step_s / measured - 1
            errors[step["blind"]].append((before, after))
            blind = "yes" if step["blind"] else ""
            print(f"| {name} | {step['name']} | {blind} | {1e3 * measured:.1f} | {before:+.1%} | {after:+.1%} |")
    for blind, found in errors.items():
        both = np.abs(np.array(found))
        middle, worst = np.median(both, axis=0), both.max(axis=0)
        print(f"{len(found)} pairs, not fitted {blind}: median {middle[0]:.1%} -> {middle[1]:.1%}, ", end="")
        print(f"worst {worst[0]:.1%} -> {worst[1]:.1%}")


if __name__ == "__main__":
    main()
