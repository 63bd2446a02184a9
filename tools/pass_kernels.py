"""Print every kernel of a layer's passes as a scenario's step prices it: seconds, FLOPs, bytes, and shares of the data
sheet's peak and bandwidth.

    python tools/pass_kernels.py deepseek-v3-2048xh800 [--set key=value] [--layer N]

Kernels of one name and phase stand in one line, with how many they are; seconds are of the mean rank and micro-batch
at the step's clock. Layers are told apart where the step prices them apart.
"""

import argparse
import sys
from collections import defaultdict
from typing import Any

import numpy as np

import moesim
from moesim.errors import UserError
from moesim.kernels.families import Gemm, GroupedGemm, Kernel, MemoryBound, peak_format
from moesim.program.operations import Operation
from moesim.program.writer import KernelWriter
from moesim.results.spans import Label
from moesim.scenario import load_scenario
from moesim.shipped import resolve

Line = tuple[Label, Kernel, float, str]


class Recorder:
    """Puts itself between the writer of operations and its caller, and keeps what was priced last of each kernel."""

    def __init__(self) -> None:
        self.lines: defaultdict[tuple[int, str, str, str], list[Line]] = defaultdict(list)
        self._plain = KernelWriter._operation
        self._model: Any = None

    def __enter__(self) -> "Recorder":
        recorder, plain = self, self._plain

        def recorded(writer: KernelWriter, label: Label, kernel: Kernel, launches: float = 1) -> Operation:
            operation = plain(writer, label, kernel, launches)
            recorder.add(writer, label, kernel, operation)
            return operation

        KernelWriter._operation = recorded  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        KernelWriter._operation = self._plain  # type: ignore[method-assign]

    def add(self, writer: KernelWriter, label: Label, kernel: Kernel, operation: Operation) -> None:
        """Of another model (another clock) all that came before is forgotten."""
        if writer.model is not self._model:
            self.lines.clear()
            self._model = writer.model
        assert operation.seconds_MSR is not None
        key = (label.layer, str(label.phase), label.category, label.name)
        self.lines[key].append((label, kernel, float(operation.seconds_MSR.mean()), operation.source))


def shape_of(kernel: Kernel) -> str:
    """Its sizes in short."""
    if isinstance(kernel, Gemm):
        return f"{kernel.dtype} {kernel.m} x {kernel.k} x {kernel.n}"
    if isinstance(kernel, GroupedGemm):
        rows_E = np.asarray(kernel.rows_per_expert, float)
        return f"{kernel.dtype} {rows_E.mean():.0f} x {kernel.k} x {kernel.n}, {rows_E.shape[-1]} experts"
    if isinstance(kernel, MemoryBound):
        return kernel.kind
    widths = f"{kernel.heads} heads {kernel.head_dim}/{kernel.value_dim}"
    return f"{kernel.dtype} {kernel.batch} x {kernel.sequence}, {widths}"


def main() -> None:
    """Simulate once and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario")
    parser.add_argument("--set", action="append", default=[], help="key=value")
    parser.add_argument("--layer", type=int, action="append", help="only these; -1 for what is in no layer")
    given = parser.parse_args()
    try:
        scenario = load_scenario(resolve(given.scenario, "scenario"), given.set)
        with Recorder() as recorder:
            moesim.simulate(scenario)
    except UserError as error:
        sys.exit(f"pass_kernels: {error}")
    gpu = scenario.cluster.pools[0].spec
    totals: defaultdict[str, float] = defaultdict(float)
    print(f"{'layer':>5} {'phase':16} {'kernel':34} {'us':>9} {'GFLOP':>8} {'MB':>8} {'peak':>5} {'bw':>5}  source")
    for (layer, phase, _category, name), lines in recorder.lines.items():
        if given.layer and layer not in given.layer:
            continue
        _, kernel, seconds, source = lines[-1]
        flops, moved = float(np.mean(kernel.flops)), float(np.mean(kernel.moved_bytes))
        peak = 0.0 if isinstance(kernel, MemoryBound) else gpu.peak_flops[peak_format(kernel.dtype)]
        share = f"{flops / seconds / peak:5.0%}" if flops else "     "
        totals[phase] += seconds
        print(
            f"{layer:5} {phase:16} {name:34} {1e6 * seconds:9.1f} {flops / 1e9:8.1f} {moved / 1e6:8.1f} {share}"
            f" {moved / seconds / gpu.memory_bandwidth:5.0%}  {source}  {shape_of(kernel)}"
        )
    for phase, seconds in totals.items():
        print(f"{phase:22} {1e3 * seconds:.3f} ms")


if __name__ == "__main__":
    main()
