"""Measured peaks of transformers' models beside `implementation: transformers` and recordings: docs/memory.md.

python tools/peak_table.py                   # from tests/data/peaks_h100.json.gz
python tools/peak_table.py --record FOLDER   # writes that file from what tools/measure_peaks.py measured
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measured_data
import torch
from listed_steps import MODEL_TYPES, OWN, scenario_of
from measure_peaks import Case, loss_of, module
from measured_data import PEAK_HEAD, print_head, print_row

from moesim.importing.recording import record_step
from moesim.parallel.memory.libraries import WORKSPACE_BYTES
from moesim.parallel.memory.report import memory_report
from moesim.parallel.memory.rows import even_rows
from moesim.recorded.peak import step_peak
from moesim.scenario import Scenario, dump_scenario, load_scenario_text
from moesim.strict_json import parse_json

DATA = measured_data.DATA / "peaks_h100.json.gz"
MOMENTS = ("forward", "backward", "optimizer")


def as_scenario(case: Case, *overrides: str) -> Scenario:
    """The case as a scenario; nothing is added for the allocator, unless `overrides` say so."""
    plain: Any = case  # has all that the cases of listed_steps have
    implementation = {"kind": "transformers", **OWN.get(MODEL_TYPES[case.family], {}), "optimizer": case.optimizer}
    if case.attention == "eager":
        implementation |= {"attention": "fp32", "repeat_keys": "true"}
    changes = {
        "implementation": "{" + ", ".join(f"{key}: {value}" for key, value in implementation.items()) + "}",
        "workload.global_batch": case.batch * case.micro_batches,
        "workload.recompute": "full" if case.checkpointing else "none",
        "memory.allocator_overhead": 0.0,
        "memory.reserved": "0 GB",
    }
    text = dump_scenario(scenario_of(plain))
    return load_scenario_text(text, overrides=[*(f"{key}={value}" for key, value in changes.items()), *overrides])


@dataclass(frozen=True, kw_only=True)
class Peak(measured_data.Peak):
    """Of one training step on one GPU; predicted by the list of transformers.

    used: what the allocator had reserved and what the process takes of the GPU beside it. printed: what a run prints
    for the scenario, all of that included.
    """

    case: Case
    used: float
    printed: float


def recorded_bytes(case: Case) -> float:
    """The peak of the case, recorded without a GPU; an optimizer over lists makes roots of all second moments."""
    with torch.device("meta"):
        model = module(case, "meta")
        ops = record_step(model, loss_of(case, model, "meta"))
    peak = step_peak(ops, micro_batches=case.micro_batches)
    assert peak is not None
    weights = peak.states / 2
    stepping = peak.held + peak.states + weights + WORKSPACE_BYTES + weights * (case.optimizer == "foreach")
    return max(peak.total, stepping)


def peaks() -> Iterator[Peak]:
    """Every training step of the file."""
    for row in measured_data.read(DATA)["steps"]:
        case = Case(**row["case"])
        if case.cache:
            continue
        bare, usual = as_scenario(case), as_scenario(case, "memory={check: warn}")
        moment = max(MOMENTS, key=lambda name: row[name])
        yield Peak(
            name=case.name,
            blind=case.blind,
            moment=moment,
            measured=row[moment],
            predicted=memory_report(bare, even_rows(bare)).peak_bytes,
            case=case,
            used=row["reserved"] + row["beside"],
            printed=memory_report(usual, even_rows(usual)).peak_bytes,
        )


def main() -> None:
    """Print the table, or write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path)
    folder = parser.parse_args().record
    if folder is not None:
        libraries = parse_json((folder / "libraries.json").read_bytes())["found"]
        measured_data.write_peaks(DATA, folder.glob("peaks-*.json"), libraries)
        return
    before: dict[str, int] = {}
    print("What a process takes of a GPU beside its tensors, and what each step of it adds (GB):")
    for name, now in measured_data.read(DATA)["libraries"].items():
        taken = now["used"] - now["reserved"]
        print(f"  {name:24s} {taken / 1e9:.2f} {(taken - before.get('taken', 0)) / 1e9:+.2f}")
        before["taken"] = taken
    print_head(*PEAK_HEAD, "recorded", "GPU in use", "printed")
    for peak in peaks():
        own = f"{recorded_bytes(peak.case) / peak.measured - 1:+.1%}"
        print_row(*peak.cells, f"{peak.error:+.1%}", own, f"{peak.used / 1e9:.1f}", f"{peak.printed / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
