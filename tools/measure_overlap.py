"""Runs of kernels beside one all-to-all, measured on two GPUs, for tests/kernels: what the fitted facts must predict.

    torchrun --nproc_per_node 2 tools/measure_overlap.py OUT.json [--cases 24]

Each case is a short list of kernels of a training step on the main stream and one all-to-all on another that starts
with them. Written are the seconds of every kernel and of the transfer alone, and when both were done together, of the
slower rank. `puts`: bytes/s of plain stores into the other GPU's memory by the number of blocks that make them.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesim.kernels.benchmarks.buffers import Pool
from moesim.kernels.benchmarks.calibrate import prepare
from moesim.kernels.benchmarks.collectives import prepare_collective

_BF16 = {"dtype": "bf16", "direction": "forward"}
KERNELS: tuple[dict[str, Any], ...] = (
    {"family": "gemm", "m": 4096, "k": 4096, "n": 6144} | _BF16,
    {"family": "gemm", "m": 8192, "k": 2048, "n": 2048} | _BF16,
    {"family": "gemm", "m": 16384, "k": 2048, "n": 5632} | _BF16,
    {"family": "grouped_gemm", "rows_per_expert": [1024] * 16, "k": 2048, "n": 1536} | _BF16,
    {"family": "grouped_gemm", "rows_per_expert": [2048] * 8, "k": 4096, "n": 4096} | _BF16,
    {"family": "attention", "batch": 4, "sequence": 2048, "heads": 32, "kv_heads": 8}
    | {"head_dim": 128, "value_dim": 128, "causal": True, "direction": "forward"},
    {"family": "memory_bound", "kind": "elementwise", "rows": 16384, "width": 2048, "bytes": 201326592.0},
    {"family": "memory_bound", "kind": "elementwise", "rows": 32768, "width": 4096, "bytes": 805306368.0},
)
SIZES = tuple(2**power << 20 for power in range(4, 9))  # 16 MiB to 256 MiB of each rank
REPEATS = 9


def main() -> None:
    """Measure all cases and write them on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", type=int, default=24)
    arguments = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    pool = Pool(device="cuda", num_bytes=8 << 30)
    calls = [prepare(kernel, pool, 128e6)[0] for kernel in KERNELS]
    side: Any = torch.cuda.Stream()
    rng = np.random.default_rng(2026)
    rows = []
    alone = [slower(median_of([(calls[k], 0)] * 6, None, side)[0] / 6) for k in range(len(KERNELS))]
    for case in range(arguments.cases):
        chosen = rng.integers(0, len(KERNELS), rng.integers(2, 9)).tolist()
        size = int(rng.choice(SIZES))
        transfer = prepare_collective({"kind": "all_to_all", "bytes": size, "ranks": 2}, "cuda")
        runs = [(calls[k], index) for index, k in enumerate(chosen)]
        compute_alone = slower(median_of(runs, None, side)[0])
        transfer_alone = slower(median_of([], transfer, side)[1])
        compute, moved = (slower(value) for value in median_of(runs, transfer, side))
        rows.append(
            {
                "kernels": chosen,
                "seconds": [alone[k] for k in chosen],
                "bytes": size,
                "compute_alone": compute_alone,
                "transfer_alone": transfer_alone,
                "compute_beside": compute,
                "transfer_beside": moved,
            }
        )
        if rank == 0:
            print(case, chosen, size >> 20, *(f"{rows[-1][k] * 1e6:.0f}" for k in list(rows[-1])[3:]), flush=True)
    puts = measure_puts() if rank == 0 else []
    dist.barrier()
    if rank == 0:
        arguments.out.write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "kernels": KERNELS, "rows": rows, "puts": puts})
        )
    dist.destroy_process_group()


def slower(seconds: float) -> float:
    """Of the ranks' seconds the most."""
    cell = torch.tensor([seconds], dtype=torch.float64, device="cuda")
    dist.all_reduce(cell, op=dist.ReduceOp.MAX)
    return float(cell.item())


def median_of(runs: list[Any], transfer: Any, side: Any) -> tuple[float, float]:
    """Median seconds until the kernels, and until the transfer, are done; both streams begin together."""
    found = [once(runs, transfer, side) for _ in range(REPEATS + 2)][2:]
    compute, moved = np.median(np.array(found), axis=0).tolist()
    return compute, moved


def once(runs: list[Any], transfer: Any, side: Any) -> tuple[float, float]:
    """One such run."""
    main = torch.cuda.current_stream()
    begin, computed, moved = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()
    torch.cuda._sleep(3_000_000)
    begin.record(main)
    side.wait_event(begin)
    for call, index in runs[:1]:
        call(index)
    if transfer is not None:
        with torch.cuda.stream(side):
            transfer(0)
            moved.record(side)
    for call, index in runs[1:]:
        call(index)
    computed.record(main)
    torch.cuda.synchronize()
    return begin.elapsed_time(computed) / 1e3, begin.elapsed_time(moved) / 1e3 if transfer is not None else 0.0


def measure_puts() -> list[dict[str, float]]:
    """Stores into the other GPU's memory, both ways at once, by blocks on each."""
    import triton
    import triton.language as tl

    @triton.jit
    def put(source, target, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        for begin in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
            place = begin + tl.arange(0, BLOCK)
            tl.store(target + place, tl.load(source + place))

    globals()["tl"] = tl
    count, rows = 1 << 25, []
    mine = [torch.ones(count, dtype=torch.int64, device=f"cuda:{g}") for g in range(2)]
    theirs = [torch.zeros(count, dtype=torch.int64, device=f"cuda:{1 - g}") for g in range(2)]
    for g in range(2):
        theirs[g][:8].copy_(mine[g][:8])  # opens the way between the GPUs
    for blocks in (1, 2, 4, 8, 12, 16, 20, 24, 32, 48, 64, 96, 132):
        for both in (False, True):
            spans = []
            for _ in range(5):
                events = []
                for g in range(2 if both else 1):
                    with torch.cuda.device(g):
                        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                        torch.cuda._sleep(1_000_000)
                        marks[0].record()
                        put[(blocks,)](mine[g], theirs[g], count, BLOCK=4096, num_warps=16)
                        marks[1].record()
                        events.append(marks)
                for g in range(2):
                    torch.cuda.synchronize(g)
                spans.append(max(a.elapsed_time(b) for a, b in events) / 1e3)
            rate = 8 * count / float(np.median(spans))
            rows.append({"blocks": blocks, "both": both, "bytes_per_second": rate})
            print(f"{blocks} blocks, both {both}: {rate / 1e9:.1f} GB/s", flush=True)
    torch.cuda.set_device(0)
    return rows


if __name__ == "__main__":
    main()
