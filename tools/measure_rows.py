"""Measure listed kernels on the GPU at hand, as `moesim calibrate` does: for shapes that its own lists lack.

    python tools/measure_rows.py SHAPES.json OUT.json [--seconds 200] [--visits 2]

SHAPES.json is a list of rows without durations: {"family": "gemm", "m": ..., ...}, {"family": "sustained",
"of": {...}}, or one of the two below. OUT.json has the machine and the measured rows.

`optimizer_step`: fused AdamW over `tensors` tensors of `parameters` in all, alone and right behind heavy GEMMs.
`regime`: the kernel in short runs with changing operands, without pause, with the same operands again and again, and
one call at a time behind a flushed L2.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesim.kernels.benchmarks.buffers import Pool
from moesim.kernels.benchmarks.calibrate import prepare
from moesim.kernels.benchmarks.device import Sampler, environment
from moesim.kernels.benchmarks.shapes import kernel_flops
from moesim.kernels.benchmarks.timing import CudaTimer, measure_sustained

Row = dict[str, Any]
HEAT = 0.25  # seconds of heavy GEMMs before a hot optimizer step


class Machine:
    """The GPU, its timer and its operands."""

    def __init__(self) -> None:
        self.facts = environment("cuda", 1)
        self.pool = Pool(device="cuda", num_bytes=12 << 30)
        self.timer = CudaTimer()
        self.beyond = 2.5 * self.facts["l2_bytes"]
        self.a, self.b = self.pool.take(8192, 8192), self.pool.take(8192, 8192)
        self.flushed = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def call(self, of: Row, *, beyond: float) -> Any:
        """The prepared call of a kernel."""
        return prepare(of, self.pool, beyond)[0]

    def heat(self, seconds: float) -> None:
        """GEMMs for about so long, issued and not waited for."""
        for _ in range(max(1, int(seconds / 1.7e-3))):
            torch.mm(self.a, self.b)

    def plain(self, row: Row) -> Row:
        """As the benchmarks of the profile."""
        return self.timer.time(self.call(row, beyond=self.beyond)).as_row()

    def sustained(self, row: Row, sampler: Sampler) -> Row:
        """Without pause."""
        of = row["of"]
        call = self.call(of, beyond=self.beyond)
        return measure_sustained(
            call, flops=kernel_flops(of), probe=lambda call: self.timer.probe(call)[0], sampler=sampler
        )

    def regime(self, row: Row, sampler: Sampler) -> Row:
        """Four ways to run one kernel."""
        of = row["of"]
        rotated, same = self.call(of, beyond=self.beyond), self.call(of, beyond=0.0)
        short, warm = self.timer.time(rotated), self.timer.time(lambda index: same(0))
        probe = lambda call: self.timer.probe(call)[0]  # noqa: E731
        long = measure_sustained(rotated, flops=kernel_flops(of), probe=probe, sampler=sampler)
        cold = []
        for index in range(7):
            self.flushed.zero_()
            cold.append(elapsed(lambda index=index: rotated(index)))  # type: ignore[misc]
        return {
            "short": short.p50, "short_clock_mhz": short.clock_mhz, "same_operands": warm.p50,
            "sustained": long["p50"], "clock_mhz": long["clock_mhz"], "behind_flush": float(np.median(cold)),
        }  # fmt: skip

    def optimizer(self, row: Row) -> Row:
        """Seconds of a step alone and behind GEMMs, medians of five."""
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[row["dtype"]]
        size = row["parameters"] // row["tensors"] // 64 * 64
        params = [torch.nn.Parameter(torch.zeros(size, dtype=dtype, device="cuda")) for _ in range(row["tensors"])]
        for param in params:
            param.grad = torch.full_like(param, 1e-3)
        optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
        optimizer.step()
        alone = [elapsed(optimizer.step) for _ in range(7)]
        hot = []
        for _ in range(5):
            self.heat(HEAT)
            hot.append(elapsed(optimizer.step))
        moved = sum(param.numel() for param in params) * {"bf16": 14.0, "fp32": 28.0}[row["dtype"]]
        return {"bytes": moved, "alone": float(np.median(alone)), "hot": float(np.median(hot))}

    def measured(self, row: Row, sampler: Sampler) -> Row:
        """Everything that `row` asks for."""
        if row["family"] == "sustained":
            return self.sustained(row, sampler)
        if row["family"] == "regime":
            return self.regime(row, sampler)
        if row["family"] == "optimizer_step":
            return self.optimizer(row)
        return self.plain(row)


def elapsed(call: Any) -> float:
    """Seconds on the device of one call behind what was issued before."""
    make: Any = torch.cuda.Event
    begin, end = make(enable_timing=True), make(enable_timing=True)
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def main() -> None:
    """Visit every row so often, until the time is over; write after each visit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--visits", type=int, default=2)
    given = parser.parse_args()
    rows: list[Row] = json.loads(given.shapes.read_text())
    machine, begin, skipped = Machine(), time.monotonic(), []
    with Sampler(0) as sampler:
        machine.heat(1.0)
        for _ in range(given.visits):
            for number, row in enumerate(rows):
                once = row["family"] in ("sustained", "regime", "optimizer_step") and "found" in row
                if once or row.get("skip") or time.monotonic() - begin > given.seconds:
                    continue
                try:
                    started = time.monotonic()
                    found = machine.measured(row, sampler)
                    row.setdefault("found", []).append(sampler.since(started) | found)
                except Exception as error:
                    row["skip"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                    skipped.append(row)
                if number % 16 == 15:
                    torch.cuda.empty_cache()
            given.out.write_text(json.dumps({"machine": machine.facts, "rows": rows}))
            print(f"{time.monotonic() - begin:.0f} s, {sum('found' in row for row in rows)} of {len(rows)}", flush=True)
    for row in skipped[:12]:
        print(row, flush=True)


if __name__ == "__main__":
    main()
