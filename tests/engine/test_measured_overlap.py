"""Short runs of kernels beside one all-to-all, measured on two H100s and in no fit, beside the executor's walk."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from moesim.engine.executor import FREE_BESIDE, GroupExecutor
from moesim.engine.executor_steps import Labels
from moesim.kernels import Beside, load_profile
from moesim.kernels.families import FAMILIES
from moesim.program.host import FREE_HOST
from moesim.program.operations import SIDE, Block, Run, compute, fork, transfer
from moesim.results import Label, SpanRecorder, Stream
from moesim.strict_json import parse_json, unpacked

FILE = Path(__file__).parents[1] / "data" / "overlap_h100.json.gz"  # tools/measure_ranks.py overlap


class Alone:
    """A transfer of one rank."""

    def __init__(self, seconds: float) -> None:
        self.alone_R = np.full((1, 1), seconds)

    def finish(self, start_R: np.ndarray) -> np.ndarray:
        return start_R + self.alone_R


def walked(row: Mapping[str, Any], families: list[str], beside: Mapping[str, Beside]) -> tuple[float, float]:
    """When the kernels and when the transfer are done, both begun at 0."""
    recorder = SpanRecorder(rows=20, samples=1, ranks=1)
    group = GroupExecutor(samples=1, ranks=1, host=FREE_HOST, beside_R=(beside,), recorder=recorder, labels=Labels())
    share = row["compute_alone"] / sum(row["seconds"])
    label = Label("kernel", "experts", Stream.COMPUTE, 0)
    kernels = [
        compute(label, share * seconds, source="measured", chain=SIDE, family=family)
        for seconds, family in zip(row["seconds"], families, strict=True)
    ]
    sent = transfer("dispatch", "dispatch_exposed", (Alone(row["transfer_alone"]),), layer=0)
    group.execute([Run(Block("run", (fork(layer=0), sent, *kernels)), 0, False)])
    return float(group.compute_SR[0, 0]), float(group.communication_SR[0, 0])


def test_both_are_done_when_measured() -> None:
    """Medians and 90th percentiles of |log|; the transfer's own end scatters more: see docs/accuracy.md."""
    data = parse_json(unpacked(FILE.read_bytes()))
    contention = load_profile("h100").contention
    fitted = {family: contention.of(family) for family in FAMILIES}
    print()
    medians = {}
    for name, beside in (("as fitted", fitted), ("if nothing is slowed", dict.fromkeys(FAMILIES, FREE_BESIDE))):
        errors = []
        for row in data["rows"]:
            done = walked(row, [data["kernels"][kernel]["family"] for kernel in row["kernels"]], beside)
            measured = row["compute_beside"], row["transfer_beside"]
            pairs = [*zip(done, measured, strict=True), (max(done), max(measured))]
            errors.append([math.log(predicted / seconds) for predicted, seconds in pairs])
        medians[name] = np.median(np.abs(errors), axis=0)
        p90 = np.quantile(np.abs(errors), 0.9, axis=0)
        for what, middle, far in zip(("kernels", "transfer", "both"), medians[name], p90, strict=True):
            print(f"{name:20} {what:8} {len(errors)} runs: median {middle:.1%}, 90th percentile {far:.1%}")
    assert medians["as fitted"][2] < 0.04 and medians["as fitted"][0] < 0.04
    assert (medians["as fitted"] < 0.75 * medians["if nothing is slowed"]).all()
