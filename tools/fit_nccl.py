"""NCCL's constants by kind of GPU, from the tables of aiconfigurator-core: writes moesim/network/nccl.json.

    pip install -e '.[tables]' && python tools/fit_nccl.py

Every other size is fitted (`moesim.network.calibration.fit_protocol`); the sizes between are left for
tests/network/test_nccl_tables.py. A table's sizes are numbers of two bytes.
"""

import gzip
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from moesim.network.calibration import fit_protocol
from moesim.network.nccl import busiest_port_bytes, sums_in_switch
from moesim.network.parameters import NetworkParameters
from moesim.scenario.catalogue import gpu_spec

# Whose table, which version of NCCL, and whose links and switches are the same.
TABLES: dict[str, tuple[str, str, list[str]]] = {
    "a100": ("a100_sxm", "2.27.3", ["a100", "a800"]),
    "h100": ("h100_sxm", "2.29.2", ["h100", "h800", "h20"]),
    "h200": ("h200_sxm", "2.29.2", ["h200"]),
    "b200": ("b200_sxm", "2.29.2", ["b200"]),
    "b300": ("b300_sxm", "2.29.2", ["b300"]),
    "gb200": ("gb200", "2.29.2", ["gb200"]),
    "gb300": ("gb300", "2.29.2", ["gb300"]),
}
MORE_RANKS = {"gb200": "b200", "gb300": "b300"}  # trays of four were measured: eight as on a board of the same NVLink
ROOT = Path(__file__).parents[1]


def main() -> None:
    """Read the tables, fit and write."""
    folder = next(Path(p) / "aiconfigurator_core" for p in sys.path if (Path(p) / "aiconfigurator_core").is_dir())
    fitted: dict[str, Any] = {}
    shown: dict[str, Any] = {}
    for name, (system, nccl, gpus) in TABLES.items():
        rows = rows_of(folder / "systems" / "data" / system / "comm" / "nccl" / nccl / "nccl_perf.parquet")
        shown[name] = {kind: {str(n): sizes for n, sizes in by_count.items()} for kind, by_count in rows.items()}
        counts = sorted(rows["all_gather"])
        small = [np.median([s for b, s in rows["all_gather"][n].items() if b <= 8192]) for n in counts]
        hop = (small[-1] - small[0]) / (counts[-1] - counts[0])
        fitted[name] = {
            "gpus": gpus, "nccl": nccl, "hop_seconds": rounded(hop),
            "calls": {
                kind: {str(n): fit(name, kind, n, sizes) for n, sizes in by_count.items()}
                for kind, by_count in rows.items()
            },
        }  # fmt: skip
    for name, other in MORE_RANKS.items():
        fitted[name]["more_ranks"] = other
    source = f"aiconfigurator-core {version('aiconfigurator-core')}, tables of nccl-tests"
    (ROOT / "moesim/network/nccl.json").write_text(json.dumps({"source": source, "kinds": fitted}, indent=1) + "\n")
    packed = gzip.compress(json.dumps(shown, separators=(",", ":")).encode(), 9, mtime=0)
    (ROOT / "tests/data/nccl_tables.json.gz").write_bytes(packed)


def rows_of(path: Path) -> dict[str, dict[int, dict[int, float]]]:
    """Median seconds by kind of call, ranks and bytes."""
    table = pyarrow.parquet.read_table(path).to_pylist()
    found: dict[str, dict[int, dict[int, list[float]]]] = {}
    for row in table:
        if row["nccl_dtype"] == "half" and row["message_size"] * 2 >= 2048:
            kind = {"alltoall": "all_to_all"}.get(row["op_name"], row["op_name"])
            sizes = found.setdefault(kind, {}).setdefault(row["num_gpus"], {})
            sizes.setdefault(2 * row["message_size"], []).append(row["latency"] / 1e3)
    return {
        kind: {n: {b: rounded(float(np.median(s))) for b, s in sorted(sizes.items())} for n, sizes in by_count.items()}
        for kind, by_count in found.items()
    }


def fit(name: str, kind: str, ranks: int, sizes: dict[int, float]) -> list[float]:
    """Call, efficiency, transition's seconds and bytes of every other size."""
    bytes_N = np.array(list(sizes)[::2], dtype=float)
    seconds_N = np.array(list(sizes.values())[::2])
    parameters = NetworkParameters()
    port = gpu_spec(name).nvlink_bandwidth * parameters.nvlink_efficiency
    wire_N = busiest_port_bytes(kind, bytes_N, ranks=ranks, in_switch=sums_in_switch(name, kind, ranks)) / port
    payload_N = bytes_N * (ranks - 1) / ranks if kind == "all_to_all" else bytes_N
    if kind == "all_to_all":
        seconds_N = seconds_N - 2 * parameters.nvlink_latency
    found = fit_protocol(payload_N, seconds_N, wire_N, source="")
    return [
        rounded(value)
        for value in (found.call_seconds, found.efficiency, found.transition_seconds, found.transition_bytes)
    ]


def rounded(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")


if __name__ == "__main__":
    main()
