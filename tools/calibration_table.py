"""How well corrections of one trace carry to other sizes of a model: the tables of docs/imported-steps.md.

    python tools/calibration_table.py                    # prints them from tests/data/calibrations.json.gz
    python tools/calibration_table.py --traces FOLDER... # renews in that file what CASE.trace.json.gz correct

Every trace corrects every other step of its family, of tests/data/hf_steps.json.gz and tests/data/dense_steps.json.gz.
"""

import argparse
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from host_table import SLOWER_HOST
from library_table import EP, Program, predicted_s, programs

from moesim.importing.calibration import Calibration, parsed_calibration
from moesim.importing.traced_step import traced_step
from moesim.kernels import kernel_model
from moesim.recorded.estimate import step_estimate
from moesim.recorded.host import HOST
from moesim.recorded.step_file import parsed_ops
from moesim.strict_json import json_text, parse_json

DATA = Path(__file__).parent.parent / "tests" / "data"
LIBRARY = "library_steps.json.gz"
# File of steps -> the host of the machine that they were measured on.
MEASURED = {"hf_steps.json.gz": SLOWER_HOST, "dense_steps.json.gz": HOST}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A step that the trace of another size corrects: seconds measured, predicted without and with the corrections."""

    trace: str
    step: str
    blind: bool
    measured_s: float
    plain_s: float
    corrected_s: float

    @property
    def errors(self) -> tuple[float, float]:
        """Of the prediction without and with corrections."""
        return self.plain_s / self.measured_s - 1, self.corrected_s / self.measured_s - 1


def family(name: str) -> str:
    """`deepseek-v2` of `deepseek-v2-lite-8k`, `qwen3` of `qwen3-30b-4k`."""
    parts = name.split("-")
    return "-".join(parts[:2]) if parts[1].startswith("v") else parts[0]


def read(name: str) -> Any:
    """The content of a file of the tests' data."""
    return parse_json(gzip.decompress((DATA / name).read_bytes()))


def calibrations() -> dict[str, Calibration]:
    """What each trace corrects, by its case."""
    return {name: parsed_calibration(found) for name, found in read("calibrations.json.gz").items()}


def pairs(measured: str) -> Iterator[Pair]:
    """Every trace with every other step of its family among those of a file."""
    kernels, found = kernel_model("h100"), calibrations()
    for step in read(measured)["steps"]:
        ops = parsed_ops(step["ops"], where=step["name"])
        plain_s = step_estimate(ops, kernels, host=MEASURED[measured]).step_s
        for name, calibration in found.items():
            if name != step["name"] and family(name) == family(step["name"]):
                yield Pair(
                    trace=name,
                    step=step["name"],
                    blind=step["blind"],
                    measured_s=step["measured"]["sustained_s"],
                    plain_s=plain_s,
                    corrected_s=step_estimate(ops, kernels, host=MEASURED[measured], corrections=calibration).step_s,
                )


def library_pairs() -> Iterator[Pair]:
    """The trace of the first size of a program of tests/data/library_steps.json.gz with its other sizes."""
    known = calibrations()
    for name, found in programs().items():
        calibration = known.get(f"{name}-a")
        if calibration is None or found["mode"] == EP:
            continue
        program = Program.of(found)
        for step in found["steps"]:
            if not step["first"]:
                yield Pair(
                    trace=f"{name}-a",
                    step=step["name"],
                    blind=step["blind"],
                    measured_s=step["sustained_s"],
                    plain_s=predicted_s(program, step),
                    corrected_s=predicted_s(program, step, corrections=calibration),
                )


def keep(folders: list[Path]) -> None:
    """Write what every trace corrects; what the file has of others stays."""
    found = read("calibrations.json.gz") | {
        path.name.split(".")[0]: traced_step(path).calibration.as_json()
        for folder in folders
        for path in sorted(folder.glob("*.trace.json.gz"))
        if "steps" not in path.name
    }
    (DATA / "calibrations.json.gz").write_bytes(gzip.compress(json_text(found).encode(), mtime=0))


def main() -> None:
    """Print a row for each pair, and what is in the middle and at worst."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--traces", type=Path, nargs="+")
    folders = parser.parse_args().traces
    if folders:
        keep(folders)
    for name in (*MEASURED, LIBRARY):
        found = list(library_pairs() if name == LIBRARY else pairs(name))
        print(f"\n{name}\n| traced | predicted | not fitted | measured, ms | plain | corrected |")
        print("|---|---|---|---|---|---|")
        for pair in found:
            plain, corrected = (f"{100 * error:+.1f} %" for error in pair.errors)
            blind, ms = "yes" if pair.blind else "", f"{1e3 * pair.measured_s:.1f}"
            print(f"| {pair.trace} | {pair.step} | {blind} | {ms} | {plain} | {corrected} |")
        for blind in (True, False):
            both = np.abs(np.array([pair.errors for pair in found if pair.blind is blind]))
            if len(both):
                middle, worst = 100 * np.median(both, axis=0), 100 * both.max(axis=0)
                text = f"median {middle[0]:.1f} -> {middle[1]:.1f} %, worst {worst[0]:.1f} -> {worst[1]:.1f} %"
                print(f"{len(both)} pairs, {'not ' if not blind else ''}left out of every choice: {text}")


if __name__ == "__main__":
    main()
