"""What torch's wrappers of data parallelism cost the host, by buckets, units and weights: docs/imported-steps.md.

    torchrun --nproc-per-node 2 tools/measure_wrappers.py --out FOLDER [--device cpu]

Rows of small square GEMMs in 8 units of a few weights each, whose GPU waits for the host: plain, by
DistributedDataParallel with buckets of two sizes, and by fully_shard of every unit and of the whole. Seconds of the
host in forward pass, backward pass and optimizer, and of whole steps in a row. Every second number of weights is kept
out of every fit. What the host's time goes to is in `operations` (torch's profiler). Needs torch and nothing of moesim.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

WIDTH, UNITS = 256, 8
WEIGHTS = (4, 8, 16, 32, 64)  # of a unit; every second is kept out
WARM_UP, STEPS = 4, 12


class Unit(nn.Module):
    """Products one behind the other."""

    def __init__(self, weights: int) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(weights))

    def forward(self, x: Tensor) -> Tensor:
        for product in self.each:
            x = product(x)
        return x


@dataclass(frozen=True, kw_only=True)
class Case:
    """A wrapper ("" for none), weights of a unit, and MiB of a bucket."""

    wrapper: str
    weights: int
    bucket_mb: float = 25.0

    @property
    def blind(self) -> bool:
        return WEIGHTS.index(self.weights) % 2 > 0


def cases() -> list[Case]:
    """All of them."""
    found = []
    for weights in WEIGHTS:
        found += [Case(wrapper=name, weights=weights) for name in ("", "ddp", "fsdp2")]
        found.append(Case(wrapper="ddp", weights=weights, bucket_mb=1.0))
    return found


def built(case: Case, device: str) -> nn.Module:
    """The module, wrapped."""
    model: nn.Module = nn.Sequential(*(Unit(case.weights) for _ in range(UNITS))).to(device, torch.bfloat16)
    if case.wrapper == "ddp":
        ids = None if device == "cpu" else [torch.cuda.current_device()]
        model = DistributedDataParallel(model, device_ids=ids, bucket_cap_mb=case.bucket_mb)
    if case.wrapper == "fsdp2":
        for unit in model:  # type: ignore[attr-defined]
            fully_shard(unit)
        fully_shard(model)
    return model


def measure(case: Case, device: str) -> dict[str, Any]:
    """Median seconds of the host in each part, after the device was waited for, and of steps in a row."""
    torch.manual_seed(0)
    model, x = built(case, device), torch.randn(64, WIDTH, device=device, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    wait: Callable[[], None] = torch.cuda.synchronize if device != "cpu" else lambda: None

    def step() -> list[float]:
        times = [time.perf_counter()]
        loss = model(x).float().mean()
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        times.append(time.perf_counter())
        optimizer.zero_grad()
        times.append(time.perf_counter())
        return [after - before for before, after in pairwise(times)]

    for _ in range(WARM_UP):
        step()
    parts = []
    for _ in range(STEPS):
        wait()
        dist.barrier()
        wait()
        parts.append(step())
    wait()
    begun = time.perf_counter()
    for _ in range(STEPS):
        step()
    wait()
    row = (time.perf_counter() - begun) / STEPS
    names = ("forward", "backward", "optimizer", "zero_grad")
    found: dict[str, Any] = {
        name: statistics.median(each) for name, each in zip(names, zip(*parts, strict=True), strict=True)
    }
    found |= {"step": row, "weights": case.weights * UNITS, "each": [sum(each) for each in parts]}
    if case.weights == WEIGHTS[2]:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(3):
                step()
            wait()
        ranked = sorted(seen.key_averages(), key=lambda each: -each.self_cpu_time_total)[:30]
        found["operations"] = [(each.key, each.count / 3, each.self_cpu_time_total / 3) for each in ranked]
    return found


def main() -> None:
    """Measure all cases on every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ["LOCAL_RANK"])
    if given.device != "cpu":
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo" if given.device == "cpu" else "nccl")
    rows = []
    for case in cases():
        found = measure(case, given.device)
        rows.append({"wrapper": case.wrapper, "bucket_mb": case.bucket_mb, "blind": case.blind, **found})
        if rank == 0:
            print({key: value for key, value in rows[-1].items() if key not in ("operations", "each")}, flush=True)
        dist.barrier()
    gpu = torch.cuda.get_device_name() if given.device != "cpu" else "cpu"
    machine = {"gpu": gpu, "torch": torch.__version__}
    (given.out / f"wrappers-{rank}.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
