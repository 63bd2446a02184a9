"""How far the ranks of one program are apart: the same work on every GPU, again and again, each timed by itself.

    torchrun --nproc_per_node 2 tools/measure_spread.py OUT.json [--iterations 120]

Works: `products` (large GEMMs), `mixed` (GEMM, attention, elementwise kernels of one layer, some milliseconds),
`eager` (many small operations, where the host sets the pace) and `graph` (the same, captured once). For each: seconds
of every iteration on every rank, with the ranks running freely; and of iterations that end in a small all-reduce.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

Work = Callable[[], object]
SMALL_OPERATIONS = 300


def works(device: str) -> dict[str, Work]:
    """One call of each is one iteration."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    a, b = random(8192, 4096), random(4096, 8192)
    x, w1, w2 = random(8192, 2048), random(2048, 8192), random(8192, 2048)
    q = random(4, 16, 2048, 128)
    small = random(256, 1024)

    def products() -> None:
        for _ in range(12):
            torch.mm(a, b)

    def mixed() -> None:
        for _ in range(4):
            h = F.silu(x @ w1) @ w2
            F.rms_norm(h + x, (2048,))
            F.scaled_dot_product_attention(q, q, q, is_causal=True)

    def eager() -> None:
        y = small
        for _ in range(SMALL_OPERATIONS // 3):
            y = F.rms_norm(y * 0.5 + small, (1024,))

    eager()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        eager()
    return {"products": products, "mixed": mixed, "eager": eager, "graph": graph.replay}


def timed(work: Work, iterations: int, meet: Work | None) -> list[float]:
    """Seconds on the device from the beginning of each iteration to that of the next."""
    make: Any = torch.cuda.Event
    marks = [make(enable_timing=True) for _ in range(iterations + 1)]
    for _ in range(20):
        work()
    dist.barrier()
    torch.cuda.synchronize()
    marks[0].record()
    for index in range(iterations):
        work()
        if meet is not None:
            meet()
        marks[index + 1].record()
        if index % 8 == 7:
            marks[index - 3].synchronize()  # the host runs at most a dozen iterations ahead
    torch.cuda.synchronize()
    return [float(marks[i].elapsed_time(marks[i + 1])) / 1e3 for i in range(iterations)]


def main() -> None:
    """All works, free and meeting; rank 0 writes what every rank found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--iterations", type=int, default=120)
    given = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    cell = torch.zeros(1024, device="cuda")
    found = []
    for name, work in works(f"cuda:{rank}").items():
        for meets in (False, True):
            begin = time.monotonic()
            mine = timed(work, given.iterations, (lambda: dist.all_reduce(cell)) if meets else None)
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, mine)
            found.append({"work": name, "meets": meets, "seconds": every})
            if rank == 0:
                print(name, meets, f"{time.monotonic() - begin:.1f} s", flush=True)
    if rank == 0:
        given.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": found}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
