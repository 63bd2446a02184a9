"""Measured peaks of a trainer of fused kernels beside `implementation: fused`: docs/memory.md.

python tools/fused_peak_table.py                   # from tests/data/fused_peaks_h100.json.gz
python tools/fused_peak_table.py --record FOLDER   # writes that file from what tools/measure_fused_peaks.py measured
python tools/fused_peak_table.py --predict         # of every case, without a measurement
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measured_data
from fused_cases import CASES, LAST, SPREAD
from measured_data import PEAK_HEAD, print_head, print_row

from moesim.parallel.memory.report import MemoryReport, memory_report
from moesim.parallel.memory.rows import even_rows
from moesim.scenario import Scenario, scenario_from_mapping
from moesim.strict_json import parse_json

DATA = measured_data.DATA / "fused_peaks_h100.json.gz"
FORMATS = {"float32": "fp32", "bfloat16": "bf16"}


def as_scenario(sizes: Any, *, name: str = "case", memory: Any = None) -> Scenario:
    """A case as a scenario; nothing is added for the allocator unless `memory` says so."""
    moe = sizes["layers"] > sizes["dense_layers"]
    model = {
        "layers": sizes["layers"],
        "dense_layers": sizes["dense_layers"],
        "dense_intermediate": sizes["dense_width"],
        "hidden": sizes["hidden"],
        "heads": sizes["heads"],
        "kv_heads": sizes["kv_heads"],
        "head_dim": sizes["head_dim"],
        "attention": {"kind": "gqa" if sizes["kv_heads"] < sizes["heads"] else "mha"},
        "vocab": sizes["vocab"],
    }
    if moe:
        shared = {"shared_experts": 1, "shared_intermediate": sizes["shared_width"]} if sizes["shared_width"] else {}
        model |= {
            "experts": sizes["experts"],
            "top_k": sizes["top_k"],
            "expert_intermediate": sizes["expert_width"],
            **shared,
        }
    again = sizes["recompute"]
    return scenario_from_mapping(
        {
            "schema_version": 1,
            "name": name,
            "model": model,
            "routing": {"kind": "uniform"},
            "cluster": {"gpu": "h100", "nodes": 1, "gpus_per_node": sizes["ranks"]},
            "parallelism": {"data": sizes["ranks"], "expert": sizes["ranks"]},
            "dispatch": {"algorithm": "direct", "deduplicate": "per_expert"},
            "workload": {
                "sequence_length": sizes["sequence"],
                "micro_batch": sizes["batch"],
                "global_batch": sizes["batch"] * sizes["micro_batches"] * sizes["ranks"],
                "recompute": again if again in ("", "full") and again else ([again] if again else "none"),
                "precision": {
                    "weights": "bf16",
                    "gradients": FORMATS[sizes["gradients"]],
                    "master": "fp32" if sizes["master"] else "none",
                    "optimizer": FORMATS[sizes["states"]],
                },
            },
            "implementation": {"kind": "fused", "loss_chunks": sizes["loss_chunks"]},
            "memory": {"check": "warn", **(memory or {"allocator_overhead": 0.0, "reserved": "0 GB"})},
            "uncertainty": {"samples": 1},
        }
    )


def predicted(sizes: Any, **more: Any) -> MemoryReport:
    """Its memory, with even routing."""
    scenario = as_scenario(sizes, **more)
    return memory_report(scenario, even_rows(scenario))


@dataclass(frozen=True, kw_only=True)
class Peak(measured_data.Peak):
    """Of one step; beside it what the allocator had reserved, and the step as a CUDA graph."""

    reserved: float
    graph: Any
    row: Any


def peaks() -> Iterator[Peak]:
    """Every step of the file."""
    for row in measured_data.read(DATA)["steps"]:
        sizes, moments = row["case"]["sizes"], row["moments"]
        yield Peak(
            name=row["case"]["name"],
            blind=row["case"]["blind"],
            moment=max(moments, key=lambda name: moments[name]),
            measured=row["peak"],
            predicted=predicted(sizes).peak_bytes,
            reserved=row["reserved"],
            graph=row["graph"],
            row=row,
        )


def _predict() -> None:
    for case in (*CASES, *LAST, *SPREAD):
        report = predicted(asdict(case.sizes))
        print(f"{case.name:18s} {report.peak_bytes / 1e9:7.2f} GB  largest {report.largest_part}")


def main() -> None:
    """Print the table, or write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--predict", action="store_true")
    given = parser.parse_args()
    if given.predict:
        _predict()
        return
    if given.record is not None:
        libraries = parse_json((given.record / "fused-libraries-0.json").read_bytes())
        measured_data.write_peaks(DATA, given.record.glob("fused-peaks-*.json"), libraries)
        return
    print_head(*PEAK_HEAD, "reserved", "graph")
    for peak in peaks():
        pool = "-" if "error" in peak.graph else f"{peak.graph['reserved'] / peak.measured - 1:+.1%}"
        print_row(*peak.cells, f"{peak.error:+.2%}", f"{peak.reserved / peak.measured - 1:+.1%}", pool)


if __name__ == "__main__":
    main()
