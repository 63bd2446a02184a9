"""`torchrun --nproc-per-node N -m moesim.kernels.benchmarks --out FILE`: the benchmarks without the rest of moesim."""

import argparse
import sys
from pathlib import Path

from moesim.errors import UserError
from moesim.kernels.benchmarks.calibrate import BUDGET_SHARES, NUM_VISITS, run_calibration


def main() -> int:
    """Parse the arguments and calibrate; 1 for a user's mistake, 130 for an interrupt."""
    parser = argparse.ArgumentParser(prog="moesim.kernels.benchmarks", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name")
    parser.add_argument("--budget", type=float, default=420.0, help="seconds of measuring")
    parser.add_argument("--families", default=",".join(BUDGET_SHARES))
    parser.add_argument("--visits", type=int, default=NUM_VISITS)
    parser.add_argument("--quiet", action="store_true")
    given = parser.parse_args()
    try:
        run_calibration(
            device=given.device,
            out=given.out,
            name=given.name,
            budget=given.budget,
            families=tuple(given.families.split(",")),
            visits=given.visits,
            quiet=given.quiet,
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
