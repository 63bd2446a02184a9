"""The steps of tools/measure_hf_steps.py as `moesim import-step` records them, beside what was measured: test data.

    python tools/record_hf_steps.py STEPS.json          # writes tests/data/hf_steps.json.gz

STEPS.json is what measure_hf_steps wrote on a GPU. Needs transformers, no GPU.
"""

import argparse
import gzip
from pathlib import Path

import torch
from measure_hf_steps import CASES, build

from moesim.importing.recording import record_step
from moesim.strict_json import json_text, parse_json

OUT = Path(__file__).parent.parent / "tests" / "data" / "hf_steps.json.gz"
KEPT = ("sustained_s", "kernel_s", "kernels", "parameters")


def main() -> None:
    """Record every case that was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", type=Path)
    measured = parse_json(parser.parse_args().steps.read_bytes())
    rows = {row["case"]["name"]: row for row in measured["steps"] if "sustained_s" in row}
    steps = []
    for case in CASES:
        if case.name not in rows:
            continue
        with torch.device("meta"):
            model, loss_of, _ = build(case, "meta")
            ops = record_step(model, loss_of)
        found = {key: rows[case.name][key] for key in KEPT}
        steps.append({"name": case.name, "blind": case.blind, "measured": found, "ops": [op.as_json() for op in ops]})
        print(f"{case.name}: {sum(op.count for op in ops)} operations")
    content = {"machine": measured["machine"], "steps": steps}
    OUT.write_bytes(gzip.compress(json_text(content).encode(), mtime=0))


if __name__ == "__main__":
    main()
