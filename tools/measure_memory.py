"""Peaks of memory by part of a step, measured on GPUs, for the scenarios of the shipped validation tables.

    python tools/measure_memory.py --out FOLDER [--gpus 1 2]

A few short steps of each; `FOLDER/NAME.json` holds `memory` per rank: bytes held between steps, the allocator's peak in
forward, backward, reduction and optimizer, and what it reserved. An interrupted call goes on where it was.
"""

import argparse
from pathlib import Path

from moesim.validation.comparison import SHIPPED_TABLES, shipped_table
from moesim.validation.launch import measure_cases
from moesim.validation.worker import Effort


def main() -> None:
    """Measure every case once, whichever table names it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    cases = {row.case.name: row.case for name in SHIPPED_TABLES for row in shipped_table(name).rows}
    chosen = [case for case in cases.values() if case.gpus in arguments.gpus]
    effort = Effort(seconds=0.2, least=2, most=3, warm=2, instrumented=1)
    measure_cases(chosen, device="cuda", folder=arguments.out, effort=effort, log=print)


if __name__ == "__main__":
    main()
