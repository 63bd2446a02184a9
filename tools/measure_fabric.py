"""Collectives between two GPUs: alone, by the number of NCCL's blocks, and beside a GEMM, for tests/network.

    torchrun --nproc_per_node 2 tools/measure_fabric.py OUT.json

Rows of `alone` and `blocks` have `seconds` of one call (median over groups of calls, the slower rank), rows of `beside`
the seconds of a GEMM and of a transfer alone and while the other runs all the time. `bytes` is one rank's buffer as in
`moesim.kernels.benchmarks.collectives`; `sent` the bytes to the other rank of each rank of an uneven exchange;
`max_ctas` the most blocks that NCCL may take, 0 for its own choice. Written as it goes, so that an end loses little.
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
from moesim.kernels.benchmarks.calibrate import _PREPARE
from moesim.kernels.benchmarks.collectives import Overlap, fixed_counts, measure_overlap

KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "exchange")
SIZES = tuple(2**power for power in range(16, 31))  # 64 KiB to 1 GiB
UNEVEN = ((1, 1), (3, 1), (7, 1), (1, 0))  # what the two ranks send to each other
BLOCKS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32)
BLOCK_KINDS = ("all_to_all", "all_reduce", "all_gather", "send_recv")
BLOCK_SIZES = (1 << 20, 1 << 23, 1 << 26, 1 << 29)
BESIDE_KINDS = ("all_to_all", "send_recv")
BESIDE_SIZES = (1 << 22, 1 << 25, 1 << 28)
BESIDE_BLOCKS = (0, 8)
GEMMS = tuple(
    {"family": "gemm", "m": m, "k": k, "n": n, "dtype": "bf16", "direction": "forward"}
    for m, k, n in ((4096, 2048, 2816), (8192, 4096, 4096), (16384, 7168, 2048))
)


def main() -> None:
    """Measure everything and write it on rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "alone": [], "blocks": [], "beside": [],
    }  # fmt: skip
    buffers = [torch.empty(2 << 30, dtype=torch.uint8, device="cuda") for _ in range(2)]

    def keep(name: str, row: dict[str, Any]) -> None:
        found[name].append(row)
        if rank == 0 and len(found[name]) % 20 == 0:
            arguments.out.write_text(json.dumps(found))

    groups = {0: dist.group.WORLD, **{blocks: limited(blocks) for blocks in BLOCKS}}
    for size in SIZES:
        for kind in KINDS:
            row = {"kind": kind, "bytes": size, "ranks": 2, "max_ctas": 0}
            keep("alone", row | {"seconds": seconds_of(call_of(kind, size, buffers, groups[0]), size)})
        for shares in UNEVEN:
            sent = [size * share // sum(shares) // 4096 * 4096 for share in shares]
            row = {"kind": "all_to_all_uneven", "bytes": size, "ranks": 2, "max_ctas": 0, "sent": sent}
            call = call_of("all_to_all_uneven", size, buffers, groups[0], sent)
            keep("alone", row | {"seconds": seconds_of(call, size)})
    say(f"alone: {len(found['alone'])} rows")
    for blocks in BLOCKS:
        for kind in BLOCK_KINDS:
            for size in BLOCK_SIZES:
                row = {"kind": kind, "bytes": size, "ranks": 2, "max_ctas": blocks}
                keep("blocks", row | {"seconds": seconds_of(call_of(kind, size, buffers, groups[blocks]), size)})
        say(f"{blocks} blocks: {found['blocks'][-len(BLOCK_KINDS) * len(BLOCK_SIZES) + 3]}")
    pool = Pool(device="cuda", num_bytes=8 << 30)
    for gemm in GEMMS:
        compute = _PREPARE["gemm"](gemm, pool, 128e6)[0]
        for kind in BESIDE_KINDS:
            for size in BESIDE_SIZES:
                for blocks in BESIDE_BLOCKS:
                    transfer = call_of(kind, size, buffers, groups[blocks])
                    overlap = Overlap(compute, transfer, sleep=lambda s: torch.cuda._sleep(int(s * 1.98e9)))
                    times = measure_overlap(overlap, largest_over_ranks=slower)
                    row = {"kind": kind, "bytes": size, "ranks": 2, "max_ctas": blocks, "compute": gemm}
                    keep("beside", row | times)
    say(f"beside: {len(found['beside'])} rows")
    if rank == 0:
        arguments.out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def limited(blocks: int) -> Any:
    """A group whose communicator takes at most so many blocks."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas = 1
    options.config.max_ctas = blocks
    return dist.new_group(pg_options=options)


def call_of(kind: str, size: int, buffers: list[Any], group: Any, sent: list[int] | None = None) -> Any:
    """One call of a collective over `size` bytes of each rank."""
    rank = dist.get_rank()
    source, target = (buffer[:size] for buffer in buffers)
    half = size // 2
    own = size - max(sent or [0])
    parts = [half, half] if sent is None else ([own, sent[0]] if rank == 0 else [sent[1], own])
    back = [half, half] if sent is None else ([own, sent[1]] if rank == 0 else [sent[0], own])
    out, given = buffers[1][: sum(back)], buffers[0][: sum(parts)]
    numbers, taken = source.view(torch.bfloat16), target.view(torch.bfloat16)

    def peer_to_peer(both: bool) -> None:
        peer = rank ^ 1
        work = [dist.P2POp(dist.isend, source, peer, group=group)] if both or rank == 0 else []
        work += [dist.P2POp(dist.irecv, target, peer, group=group)] if both or rank == 1 else []
        for handle in dist.batch_isend_irecv(work):
            handle.wait()

    calls = {
        "all_reduce": lambda i: dist.all_reduce(numbers, group=group),
        "all_gather": lambda i: dist.all_gather_into_tensor(taken, numbers[: half // 2], group=group),
        "reduce_scatter": lambda i: dist.reduce_scatter_tensor(taken[: half // 2], numbers, group=group),
        "all_to_all": lambda i: dist.all_to_all_single(target, source, group=group),
        "all_to_all_uneven": lambda i: dist.all_to_all_single(out, given, back, parts, group=group),
        "send_recv": lambda i: peer_to_peer(False),
        "exchange": lambda i: peer_to_peer(True),
    }
    return calls[kind]


def seconds_of(call: Any, size: int) -> float:
    """Median seconds of one call on the device, of the slower rank."""
    counts = fixed_counts(size)
    for index in range(counts["warm"]):
        call(index)
    spans = []
    for _ in range(counts["groups"]):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        dist.barrier()
        torch.cuda._sleep(int((3e-4 + 6e-5 * counts["inner"]) * 1.98e9))
        call(0)  # both ranks are there when the clock starts
        begin.record()
        for index in range(counts["inner"]):
            call(index)
        end.record()
        torch.cuda.synchronize()
        spans.append(begin.elapsed_time(end) / 1e3 / counts["inner"])
    return slower(float(np.median(spans)))


def slower(seconds: float) -> float:
    """Of the ranks' seconds the most."""
    cell = torch.tensor([seconds], dtype=torch.float64, device="cuda")
    dist.all_reduce(cell, op=dist.ReduceOp.MAX)
    return float(cell.item())


def say(text: str) -> None:
    """Progress, once."""
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
