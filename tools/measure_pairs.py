"""Two of NCCL's calls at once on two GPUs, each on a communicator of its own, and calls of all sizes beside GEMMs.

    torchrun --nproc-per-node 2 tools/measure_pairs.py OUT.json    # 25 s

`pairs`: seconds of each alone, and from a common start to the end of each; the second's communicator is free or held to
4 or 16 blocks. `beside`: seconds of a call and of a GEMM alone, and while the other runs all the time, as in a profile.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moesim.kernels.benchmarks.collectives import Overlap, measure_overlap

MIB = 1 << 20
REPEATS, CYCLES_PER_SECOND = 9, 1.7e9
FIRST, SECOND = ("all_to_all", "all_gather"), ("reduce_scatter", "all_reduce", "send_recv", "all_to_all")
SIZES = (16 * MIB, 64 * MIB, 256 * MIB)
BESIDE = (*FIRST, "all_reduce", "reduce_scatter", "send_recv")
BESIDE_SIZES = (64 << 10, 256 << 10, MIB, 2 * MIB, 8 * MIB, 1 << 30)
GEMMS = ((4096, 2048, 2816), (8192, 4096, 4096), (16384, 7168, 2048), (4096, 7168, 4096))
Work = Callable[[], object]


def main() -> None:
    """Measure and write."""
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank())
    groups = {"free": dist.new_group(), **{str(blocks): _limited(blocks) for blocks in (4, 16)}}
    first_group = dist.new_group()
    buffers = [torch.empty(1 << 29, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(4)]
    pairs = [
        _pair((one, a, first_group), (two, b, groups[held]), buffers) | {"held_to": held}
        for held in groups
        for one in FIRST
        for two in SECOND
        for a in SIZES
        for b in SIZES
    ]
    beside = [
        _beside(kind, size, shape, first_group, buffers[:2])
        for size in BESIDE_SIZES
        for kind in BESIDE
        for shape in GEMMS
    ]
    if dist.get_rank() == 0:
        facts = {"device": torch.cuda.get_device_name(), "nccl": list(torch.cuda.nccl.version())}  # type: ignore[no-untyped-call]
        Path(sys.argv[1]).write_text(json.dumps({"pairs": pairs, "beside": beside} | facts))
    dist.destroy_process_group()


def _limited(blocks: int) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas = 1
    options.config.max_ctas = blocks
    return dist.new_group(pg_options=options)


def _pair(one: tuple[str, int, Any], two: tuple[str, int, Any], buffers: list[Any]) -> dict[str, Any]:
    first, second = _call(*one, buffers[:2]), _call(*two, buffers[2:])
    alone = [_ends([first])[0], _ends([second])[0]]
    what = {"first": one[0], "first_bytes": one[1], "second": two[0], "second_bytes": two[1]}
    return what | {"alone": alone, "together": _ends([first, second])}


def _call(kind: str, size: int, group: Any, buffers: list[Any]) -> Work:
    ranks, peer = dist.get_world_size(), dist.get_rank() ^ 1
    count = size // 2 // ranks * ranks
    source, target = buffers[0][:count], buffers[1][:count]

    def send_recv() -> None:
        if dist.get_rank() == 0:
            operation = dist.P2POp(dist.isend, source, peer, group=group)
        else:
            operation = dist.P2POp(dist.irecv, target, peer, group=group)
        for work in dist.batch_isend_irecv([operation]):
            work.wait()

    calls: dict[str, Work] = {
        "all_to_all": lambda: dist.all_to_all_single(target, source, group=group),
        "all_reduce": lambda: dist.all_reduce(target, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(target, source[: count // ranks], group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(target[: count // ranks], source, group=group),
        "send_recv": send_recv,
    }
    return calls[kind]


def _ends(works: list[Work]) -> list[float]:
    """Seconds from a common start to the end of each: the slower rank, median of the repeats."""
    make_event: Any = torch.cuda.Event
    streams: list[Any] = [torch.cuda.Stream() for _ in works]  # type: ignore[no-untyped-call]
    found = []
    for _ in range(REPEATS + 2):
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda.synchronize()
        torch.cuda._sleep(int(600e-6 * CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
        gate = make_event(enable_timing=True)
        gate.record()
        ends = [make_event(enable_timing=True) for _ in works]
        for side, work, end in zip(streams, works, ends, strict=True):
            side.wait_event(gate)
            with torch.cuda.stream(side):
                work()
                end.record(side)
        torch.cuda.synchronize()
        found.append([_slower(gate.elapsed_time(end) / 1e3) for end in ends])
    return [sorted(column)[REPEATS // 2] for column in zip(*found[2:], strict=True)]


def _slower(seconds: float) -> float:
    value = torch.tensor([seconds], dtype=torch.float64, device="cuda")
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return float(value)


def _beside(kind: str, size: int, shape: tuple[int, int, int], group: Any, buffers: list[Any]) -> dict[str, Any]:
    m, k, n = shape
    left, right = (torch.randn(a, b, device="cuda").to(torch.bfloat16) for a, b in ((m, k), (k, n)))
    out, transfer = torch.empty(m, n, dtype=torch.bfloat16, device="cuda"), _call(kind, size, group, buffers)

    def sleep(seconds: float) -> None:
        torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]

    overlap = Overlap(lambda _: torch.matmul(left, right, out=out), lambda _: transfer(), sleep=sleep)
    compute = {"family": "gemm", "m": m, "k": k, "n": n, "dtype": "bf16", "direction": "forward"}
    what = {"family": "contention", "compute": compute, "kind": kind, "bytes": size, "ranks": dist.get_world_size()}
    return what | measure_overlap(overlap, largest_over_ranks=_slower)


if __name__ == "__main__":
    main()
