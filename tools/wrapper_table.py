"""What torch's wrappers of data parallelism cost the host (tests/data/wrappers_h100.json.gz): docs/imported-steps.md.

python tools/wrapper_table.py
python tools/wrapper_table.py --record FILES   # writes that file from what tools/measure_wrappers.py measured

Host seconds of each part beyond those without a wrapper, medians over ranks and runs, and what a constant and a cost of
each weight, fitted to every second number of weights by relative error, say of the others.
"""

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import measured_data
import numpy as np
from measured_data import print_head, print_row
from numpy.typing import NDArray

from moesim.strict_json import parse_json

DATA = measured_data.DATA / "wrappers_h100.json.gz"
PARTS = ("forward", "backward", "optimizer")
KINDS = (("fsdp2", 25.0), ("ddp", 25.0), ("ddp", 1.0))
LEAST = 1e-4  # seconds, below which errors are no longer relative


def beyond_plain(runs: Any) -> dict[tuple[str, float], dict[int, NDArray[np.float64]]]:
    """Median seconds of the parts, by wrapper and MiB of a bucket, by weights."""
    found: Any = defaultdict(lambda: defaultdict(list))
    for rows in runs:
        plain = {row["weights"]: row for row in rows if not row["wrapper"]}
        for row in rows:
            if row["wrapper"]:
                more = [row[part] - plain[row["weights"]][part] for part in PARTS]
                found[row["wrapper"], row["bucket_mb"]][row["weights"]].append(more)
    return {
        kind: {weights: np.median(each, axis=0) for weights, each in sorted(of.items())} for kind, of in found.items()
    }


def fitted(of: dict[int, NDArray[np.float64]], part: int, seen: set[int]) -> tuple[float, float]:
    """A constant and the seconds of a weight."""
    weights = np.array(sorted(seen), dtype=float)
    taken = np.array([of[round(each)][part] for each in weights])
    scale = 1.0 / np.maximum(taken, LEAST)
    terms = np.stack([np.ones_like(weights), weights], axis=1) * scale[:, None]
    constant, each = np.linalg.lstsq(terms, taken * scale, rcond=None)[0]
    return float(constant), float(each)


def main() -> None:
    """Print the table, or write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, nargs="+")
    given = parser.parse_args()
    if given.record:
        read = [parse_json(file.read_bytes()) for file in given.record]
        measured_data.write(DATA, {"machine": read[0]["machine"], "runs": [each["rows"] for each in read]})
        return
    runs = measured_data.read(DATA)["runs"]
    seen = {row["weights"] for row in runs[0] if not row["blind"]}
    kept_out = "weights kept out: measured / fitted, ms"
    print_head("wrapper, bucket", "part", "constant, ms", "a weight, us", kept_out)
    for kind, of in beyond_plain(runs).items():
        for number, part in enumerate(PARTS):
            constant, each = fitted(of, number, seen)
            others = ", ".join(
                f"{weights}: {1e3 * of[weights][number]:.1f} / {1e3 * (constant + each * weights):.1f}"
                for weights in of
                if weights not in seen
            )
            print_row(f"{kind[0]}, {kind[1]:g} MiB", part, f"{1e3 * constant:.2f}", f"{1e6 * each:.0f}", others)


if __name__ == "__main__":
    main()
