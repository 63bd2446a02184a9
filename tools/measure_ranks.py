"""What two GPUs (or more, for `spread`) do to each other, each part by one call of torchrun.

    torchrun --nproc_per_node 2 tools/measure_ranks.py collectives OUT.json      # for tests/network
    torchrun --nproc_per_node 2 tools/measure_ranks.py overlap OUT.json [--cases 24]      # for tests/engine
    torchrun --nproc_per_node 2 tools/measure_ranks.py spread OUT.json [--iterations 120]

collectives: alone, by the number of NCCL's blocks, and beside a GEMM. Rows of `alone` and `blocks` have `seconds` of
one call (median over groups of calls, the slower rank), rows of `beside` the seconds of a GEMM and of a transfer alone
and while the other runs all the time. `bytes` is one rank's buffer as in `moesim.kernels.benchmarks.collectives`;
`sent` the bytes to the other rank of each rank of an uneven exchange; `max_ctas` the most blocks that NCCL may take, 0
for its own choice. Written as it goes, so that an end loses little.

overlap: a short list of kernels of a training step on the main stream and one all-to-all on another that starts with
them. Written are the seconds of every kernel and of the transfer alone, and when both were done together, of the slower
rank. `puts`: bytes/s of plain stores into the other GPU's memory by the number of blocks that make them.

spread: how far the ranks of one program are apart: the same work on every GPU, again and again, each timed by itself.
Works: `gemms` (large GEMMs), `mixed` (GEMM, attention, elementwise kernels of one layer, some milliseconds),
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

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

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
OVERLAP_SIZES = tuple(2**power << 20 for power in range(4, 9))  # 16 MiB to 256 MiB of each rank
REPEATS = 9
Work = Callable[[], object]
SMALL_OPERATIONS = 300


def collectives(out: Path) -> None:
    """Everything about calls of two ranks."""
    from moesim.kernels.benchmarks.buffers import Pool
    from moesim.kernels.benchmarks.calibrate import _PREPARE
    from moesim.kernels.benchmarks.collectives import Overlap, measure_overlap

    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(), "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "alone": [], "blocks": [], "beside": [],
    }  # fmt: skip
    buffers = [torch.empty(2 << 30, dtype=torch.uint8, device="cuda") for _ in range(2)]

    def keep(name: str, row: dict[str, Any]) -> None:
        found[name].append(row)
        if dist.get_rank() == 0 and len(found[name]) % 20 == 0:
            out.write_text(json.dumps(found))

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
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))


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
    from moesim.kernels.benchmarks.collectives import fixed_counts

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


def overlap(out: Path, cases: int) -> None:
    """Kernels beside an all-to-all, and stores."""
    from moesim.kernels.benchmarks.buffers import Pool
    from moesim.kernels.benchmarks.calibrate import prepare
    from moesim.kernels.benchmarks.collectives import prepare_collective

    pool = Pool(device="cuda", num_bytes=8 << 30)
    calls = [prepare(kernel, pool, 128e6)[0] for kernel in KERNELS]
    side: Any = torch.cuda.Stream()
    rng = np.random.default_rng(2026)
    rows = []
    alone = [slower(median_of([(calls[k], 0)] * 6, None, side)[0] / 6) for k in range(len(KERNELS))]
    for case in range(cases):
        chosen = rng.integers(0, len(KERNELS), rng.integers(2, 9)).tolist()
        size = int(rng.choice(OVERLAP_SIZES))
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
        if dist.get_rank() == 0:
            print(case, chosen, size >> 20, *(f"{rows[-1][k] * 1e6:.0f}" for k in list(rows[-1])[3:]), flush=True)
    puts = measure_puts() if dist.get_rank() == 0 else []
    dist.barrier()
    if dist.get_rank() == 0:
        out.write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "kernels": KERNELS, "rows": rows, "puts": puts})
        )


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


def works(device: str) -> dict[str, Work]:
    """One call of each is one iteration."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    a, b = random(8192, 4096), random(4096, 8192)
    x, w1, w2 = random(8192, 2048), random(2048, 8192), random(8192, 2048)
    q = random(4, 16, 2048, 128)
    small = random(256, 1024)

    def gemms() -> None:
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
    return {"gemms": gemms, "mixed": mixed, "eager": eager, "graph": graph.replay}


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


def spread(out: Path, iterations: int) -> None:
    """All works, free and meeting; rank 0 writes what every rank found."""
    cell = torch.zeros(1024, device="cuda")
    found = []
    for name, work in works(f"cuda:{torch.cuda.current_device()}").items():
        for meets in (False, True):
            begin = time.monotonic()
            mine = timed(work, iterations, (lambda: dist.all_reduce(cell)) if meets else None)
            every: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(every, mine)
            found.append({"work": name, "meets": meets, "seconds": every})
            if dist.get_rank() == 0:
                print(name, meets, f"{time.monotonic() - begin:.1f} s", flush=True)
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": found}))


def main() -> None:
    """One part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("collectives", "overlap", "spread"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", type=int, default=24, help="of overlap")
    parser.add_argument("--iterations", type=int, default=120, help="of spread")
    given = parser.parse_args()
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    if given.part == "collectives":
        collectives(given.out)
    elif given.part == "overlap":
        overlap(given.out, given.cases)
    else:
        spread(given.out, given.iterations)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
