"""Everything that this project measures on a whole node of N GPUs, in one call that goes on where it was cut off.

    python tools/measure_node.py --gpus 8 --out FOLDER [--only transfers,steps,spread] [--limit SECONDS]
    python tools/measure_node.py --report FOLDER

transfers: NCCL's calls from 8 KiB to 1 GiB, even and uneven, by number of blocks (NCCL_MAX_CTAS), alone and beside
kernels, at 2, 4, ... N ranks: `transfers-R.json.gz`, profiles as of `moesim calibrate`, whose rows that say `held_out`
are in no fit. steps: the cases of `moesim.validation.cases`, with the seconds of every step and of every part of
every layer on each rank: a file each under `steps/`, and `table.json`; half of them are kept out of every choice.
spread: how far ranks doing the same work are apart, `spread.json`. What is done is not measured again. --report sets
the steps beside their predictions, those kept out apart.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PARTS = ("steps", "spread", "transfers")
SECONDS_OF_TRANSFERS = 240.0  # at each number of ranks
ROOT = Path(__file__).resolve().parent.parent


def torchrun(ranks: int, program: Sequence[str], deadline: float) -> None:
    """Run a program on the first `ranks` GPUs, at the longest until the deadline."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *program]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            command, check=True, timeout=max(1.0, deadline - time.monotonic()),
            env={"NCCL_NVLS_ENABLE": "0"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip


def transfers(gpus: int, out: Path, deadline: float) -> None:
    """At every number of ranks what is not measured yet."""
    for ranks in (size for size in (2, 4, 8) if size <= gpus):
        path = out / f"transfers-{ranks}.json.gz"
        if time.monotonic() > deadline:
            return
        budget = min(SECONDS_OF_TRANSFERS, deadline - time.monotonic())
        options = [
            "--out",
            str(path),
            "--families",
            "collective,contention",
            "--budget",
            f"{budget:.0f}",
            "--visits",
            "1",
        ]
        torchrun(ranks, ["-m", "moesim.kernels.benchmarks", *options, "--quiet"], deadline + 60)


def steps(gpus: int, out: Path, deadline: float, seconds: float) -> None:
    """One case after the other, until the deadline."""
    import torch

    from moesim.validation.cases import node_cases
    from moesim.validation.comparison import make_table, save_table
    from moesim.validation.measurement import Effort
    from moesim.validation.real_runs import device_name, measure_cases

    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    effort = Effort(seconds=seconds, instrumented=3, single=True)
    cases, measured = list(node_cases(gpus)), {}
    for layout in dict.fromkeys(case.name.split("-")[0] for case in cases):
        if time.monotonic() > deadline:
            break
        some = [case for case in cases if case.name.startswith(layout + "-")]
        measured |= measure_cases(some, device="cuda", folder=out / "steps", effort=effort, log=print)
        print(f"{layout}: {len(measured)} of {len(cases)} cases", flush=True)
    about = {"name": device_name("cuda"), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    done = [case for case in cases if case.name in measured]
    save_table(make_table(done, measured, about), out / "table.json")


def spread(gpus: int, out: Path, deadline: float) -> None:
    """Ranks that do the same."""
    if not (out / "spread.json").exists() and time.monotonic() < deadline:
        torchrun(gpus, [str(ROOT / "tools" / "measure_ranks.py"), "spread", str(out / "spread.json")], deadline + 60)


def report(out: Path) -> None:
    """Predictions beside the steps: those that may be looked at, and those kept out."""
    from moesim.validation.cases import is_held_out
    from moesim.validation.comparison import Table, load_table, print_table, recompute

    table = load_table(out / "table.json" if out.is_dir() else out)
    for kept_out in (False, True):
        rows = tuple(row for row in table.rows if is_held_out(row.case.name) is kept_out)
        print("kept out of every choice" if kept_out else "looked at")
        again = recompute(Table(table.device, rows))
        print_table(again)
        layouts = dict.fromkeys(row.case.name.split("-")[0] for row in again.rows)
        for layout in layouts:
            errors = [row.error for row in again.rows if row.case.name.startswith(layout + "-")]
            few, most = min(errors), max(errors)
            print(f"  {layout}: {len(errors)} steps, {np.median(errors):+.1%} in the median, {few:+.1%} to {most:+.1%}")


def main() -> None:
    """Measure, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8, choices=(2, 4, 8))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which nothing new begins")
    parser.add_argument("--seconds", type=float, default=2.0, help="of measured steps of each case")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="or a table, as tests/data/node_h100.json.gz")
    given = parser.parse_args()
    if given.report is not None:
        report(given.report)
        return
    if given.out is None or not set(given.only.split(",")) <= set(PARTS):
        parser.error(f"--out is needed, and --only takes some of {','.join(PARTS)}")
    deadline = time.monotonic() + given.limit
    given.out.mkdir(parents=True, exist_ok=True)
    chosen = given.only.split(",")
    if "steps" in chosen:
        steps(given.gpus, given.out, deadline, given.seconds)
    if "spread" in chosen:
        spread(given.gpus, given.out, deadline)
    if "transfers" in chosen:
        transfers(given.gpus, given.out, deadline)
    (given.out / "node.json").write_text(json.dumps({"gpus": given.gpus, "parts": chosen}))


if __name__ == "__main__":
    main()
