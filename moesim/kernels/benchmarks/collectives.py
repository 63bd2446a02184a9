"""Collectives between the processes of a torchrun, alone and beside compute kernels.

All processes issue the same calls in the same order with counts fixed by the size, and the slowest one counts. Rows
that `held_out` marks are for reports alone: sizes, splits and numbers of blocks between those that are fitted.
Legend: R ranks.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesim.kernels.benchmarks.later_shapes import Shape
from moesim.kernels.benchmarks.timing import Call
from moesim.seeding import stream

_SIZES = (*(8 * 1024 * 4**power for power in range(9)), 1 << 30)  # 8 KiB .. 512 MiB, 1 GiB
_BETWEEN = tuple(64 * 1024 * 4**power for power in range(7))  # 64 KiB .. 256 MiB
_KINDS = ("all_to_all", "all_to_all_uneven", "all_reduce", "all_gather", "reduce_scatter", "send_recv", "exchange")
_ONE_WAY = ((3, 1), (7, 1), (1, 0))  # what even ranks send to odd ones, and those back
_ONE_WAY_SIZES = tuple(1 << power for power in range(19, 30))  # 512 KiB .. 512 MiB, every other one in the fits
_BLOCKS = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32)  # of NCCL, every other number in the fits
_BLOCK_KINDS = ("all_to_all", "all_reduce", "all_gather", "send_recv")
_BLOCK_SIZES = (64 << 20, 512 << 20)
_TOKEN_BYTES = 4096  # uneven shares are whole rows, as tokens are: off the vector width of 16 bytes copies are slower
_BF16 = {"dtype": "bf16", "direction": "forward"}
_CONTENDERS: tuple[dict[str, Any], ...] = (
    {"family": "gemm", "m": 8192, "k": 4096, "n": 4096} | _BF16,
    {"family": "gemm", "m": 4096, "k": 2048, "n": 2816} | _BF16,
    {"family": "grouped_gemm", "rows_per_expert": [768] * 32, "k": 2048, "n": 2816} | _BF16,
    {"family": "grouped_gemm", "rows_per_expert": [4096] * 4, "k": 4096, "n": 14336} | _BF16,
    {"family": "attention", "batch": 2, "sequence": 4096, "heads": 16, "kv_heads": 16}
    | {"head_dim": 128, "value_dim": 128, "causal": True, "direction": "forward"},
    {"family": "memory_bound", "kind": "elementwise", "rows": 32768, "width": 4096, "bytes": 805306368.0},
    {"family": "gemm", "m": 16384, "k": 2048, "n": 6144, "dtype": "bf16", "direction": "wgrad"},
    {"family": "attention", "batch": 2, "sequence": 4096, "heads": 16, "kv_heads": 16}
    | {"head_dim": 128, "value_dim": 128, "causal": True, "direction": "backward"},
)
_CONTENTION_SIZES = (4 << 20, 16 << 20, 64 << 20, 256 << 20, 512 << 20)
_BESIDE = ("all_to_all", "all_reduce", "all_gather", "reduce_scatter", "send_recv")
_GEMMS_BESIDE_SENDS: tuple[dict[str, Any], ...] = tuple(
    {"family": "gemm", "m": m, "k": k, "n": n} | _BF16
    for m, k, n in (
        (2048, 2048, 1408),
        (4096, 7168, 4096),
        (8192, 7168, 18432),
        (16384, 7168, 2048),
        (32768, 1024, 4096),
    )
)


def collective_shapes(ranks: int, *, largest: int = 1 << 30) -> Iterator[Shape]:
    """Kinds and sizes; `bytes` is the buffer of one rank: what it sends in an all-to-all (own part included), what an
    all-reduce sums, what an all-gather or reduce-scatter hands out or takes in as a whole, what a send moves.

    First what the constants are fitted to, then exchanges that go mostly one way, then what is held out.
    """
    rng = stream(0, "uneven all-to-all", ranks)
    for size in _SIZES:
        if size > largest:
            break
        for kind in _KINDS:
            shape: Shape = {"kind": kind, "bytes": size, "ranks": ranks}
            if kind == "all_to_all_uneven":
                shares_RR = rng.dirichlet(np.full(ranks, 1.0), size=ranks)
                shape["bytes_matrix"] = (np.rint(shares_RR * (size / _TOKEN_BYTES)).astype(int) * _TOKEN_BYTES).tolist()
            yield shape
    one_way = [_one_way(ranks, size, shares) for size in _ONE_WAY_SIZES for shares in _ONE_WAY]
    yield from (shape for shape in one_way if shape["bytes"] <= largest)
    even = [{"kind": kind, "bytes": size, "ranks": ranks, "held_out": 1} for size in _BETWEEN for kind in _KINDS]
    yield from (shape for shape in even if shape["bytes"] <= largest and shape["kind"] != "all_to_all_uneven")


def block_shapes(ranks: int) -> Iterator[Shape]:
    """Calls held to `max_ctas` blocks: what so many SMs move."""
    for index, blocks in enumerate(_BLOCKS):
        held_out = {"held_out": 1} if index % 2 else {}
        for kind in _BLOCK_KINDS:
            for size in _BLOCK_SIZES:
                yield {"kind": kind, "bytes": size, "ranks": ranks, "max_ctas": blocks, **held_out}


def contention_shapes(ranks: int) -> list[Shape]:
    """Kernels and transfers that overlap; every other size of every kernel is held out."""
    found: list[Shape] = []
    for kind in _BESIDE:
        contenders = (*_CONTENDERS, *_GEMMS_BESIDE_SENDS) if kind == "send_recv" else _CONTENDERS
        for turn, contender in enumerate(contenders):
            for index, size in enumerate(_CONTENTION_SIZES):
                row: Shape = {"family": "contention", "compute": contender, "kind": kind, "bytes": size, "ranks": ranks}
                found.append(row | ({"held_out": 1} if (turn + index) % 2 else {}))
    return [found[index] for index in stream(0, "benchmark shapes", "contention").permutation(len(found))]


def _one_way(ranks: int, size: int, shares: tuple[int, int]) -> Shape:
    """Even ranks send `size` bytes times the first share to the odd ones, those the second; the rest stays."""
    odd_R = np.arange(ranks) % 2 == 1
    sent_R = np.where(odd_R, shares[1], shares[0]) * size / sum(shares)
    others_R = np.where(odd_R, (~odd_R).sum(), odd_R.sum())
    bytes_RR = np.where(odd_R[:, None] != odd_R, (sent_R / np.maximum(others_R, 1))[:, None], 0.0)
    bytes_RR = bytes_RR // _TOKEN_BYTES * _TOKEN_BYTES + np.diag(np.full(ranks, size * shares[1] / sum(shares)))
    shape: Shape = {"kind": "all_to_all_uneven", "bytes": size, "ranks": ranks}
    held_out = {"held_out": 1} if _ONE_WAY_SIZES.index(size) % 2 else {}
    return shape | {"bytes_matrix": bytes_RR.astype(int).tolist()} | held_out


@cache
def _limited(blocks: int) -> Any:
    """A group of all ranks whose communicator takes at most so many blocks."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.min_ctas = 1
    options.config.max_ctas = blocks
    return dist.new_group(pg_options=options)


def _values(count: int, device: str) -> torch.Tensor:
    return torch.randn(max(count, 1), device=device).to(torch.bfloat16)[:count]


def prepare_collective(shape: Shape, device: str, *, own_limit: bool = True) -> Call:
    """The call of one collective on this rank, over two rotating buffers.

    `own_limit`: `max_ctas` of the shape is asked of a communicator of its own; else the environment has set it.
    """
    rank, ranks, kind = dist.get_rank(), dist.get_world_size(), shape["kind"]
    held = shape.get("max_ctas") if own_limit else None
    group = _limited(held) if held else dist.group.WORLD
    count = shape["bytes"] // 2 // ranks * ranks
    if kind == "all_to_all_uneven":
        elements_RR = np.asarray(shape["bytes_matrix"]) // 2
        sent, received = elements_RR[rank].tolist(), elements_RR[:, rank].tolist()
    else:
        sent = received = [count // ranks] * ranks
    inputs = [_values(max(sum(sent), count), device) for _ in range(2)]
    outputs = [torch.empty(max(sum(received), count), dtype=torch.bfloat16, device=device) for _ in range(2)]

    def all_to_all(i: int) -> object:
        out, source = outputs[i % 2][: sum(received)], inputs[i % 2][: sum(sent)]
        return dist.all_to_all_single(out, source, received, sent, group=group)

    def peer_to_peer(both: bool) -> Call:
        peer = rank ^ 1
        sends, receives = both or rank % 2 == 0, both or rank % 2 == 1

        def run(i: int) -> None:
            operations = [dist.P2POp(dist.isend, inputs[i % 2], peer, group=group)] if sends else []
            operations += [dist.P2POp(dist.irecv, outputs[i % 2], peer, group=group)] if receives else []
            for work in dist.batch_isend_irecv(operations) if peer < ranks else []:
                work.wait()

        return run

    # Newer versions of torch have other names for these two.
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    calls: dict[str, Call] = {
        "all_to_all": all_to_all,
        "all_to_all_uneven": all_to_all,
        "all_reduce": lambda i: dist.all_reduce(inputs[i % 2], group=group),
        "all_gather": lambda i: gather(outputs[i % 2], inputs[i % 2][: count // ranks], group=group),
        "reduce_scatter": lambda i: scatter(outputs[i % 2][: count // ranks], inputs[i % 2], group=group),
        "send_recv": peer_to_peer(False),
        "exchange": peer_to_peer(True),
    }
    return calls[kind]


def fixed_counts(size: int) -> dict[str, int]:
    """Warm-up calls, groups and calls per group, from the size alone: equal on all ranks."""
    guess = 20e-6 + size / 200e9
    return {
        "warm": int(np.clip(10e-3 / guess, 2, 20)),
        "groups": int(np.clip(40e-3 / guess, 5, 11)),
        "inner": int(np.clip(200e-6 / guess, 1, 8)),
    }


class Overlap:
    """Times compute calls on the main stream and transfers on another, alone and together."""

    def __init__(self, compute: Call, transfer: Call, *, sleep: Callable[[float], None]) -> None:
        self._compute, self._transfer, self._sleep = compute, transfer, sleep
        self._side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def spans(self, *, computes: int, transfers: int) -> tuple[float, float]:
        """Seconds that this many compute calls and this many transfers take when both start at once."""
        main = torch.cuda.current_stream()
        make_event: Any = torch.cuda.Event
        events = [make_event(enable_timing=True) for _ in range(4)]
        torch.cuda.synchronize()
        dist.barrier()
        self._sleep(2e-3 + 30e-6 * (computes + transfers))
        events[0].record(main)
        self._side.wait_event(events[0])
        with torch.cuda.stream(self._side):
            events[2].record(self._side)
            for index in range(transfers):
                self._transfer(index)
            events[3].record(self._side)
        for index in range(computes):
            self._compute(index)
        events[1].record(main)
        torch.cuda.synchronize()
        return events[0].elapsed_time(events[1]) / 1e3, events[2].elapsed_time(events[3]) / 1e3


def measure_overlap(overlap: Overlap, *, largest_over_ranks: Callable[[float], float]) -> dict[str, float]:
    """Seconds per compute call and per transfer: alone, and while the other runs all the time."""
    overlap.spans(computes=4, transfers=4)
    alone_compute = largest_over_ranks(overlap.spans(computes=10, transfers=0)[0] / 10)
    alone_transfer = largest_over_ranks(overlap.spans(computes=0, transfers=10)[1] / 10)
    computes = int(np.clip(0.02 / alone_compute, 4, 150))
    transfers = int(np.clip(0.02 / alone_transfer, 4, 150))
    alone_compute = largest_over_ranks(overlap.spans(computes=computes, transfers=0)[0] / computes)
    alone_transfer = largest_over_ranks(overlap.spans(computes=0, transfers=transfers)[1] / transfers)
    # The background outlasts what is measured by a factor two, also when both slow each other down.
    behind = int(np.ceil(2.0 * computes * alone_compute / alone_transfer)) + 2
    beside_transfer = overlap.spans(computes=computes, transfers=min(behind, 400))[0] / computes
    ahead = int(np.ceil(2.0 * transfers * alone_transfer / alone_compute)) + 2
    beside_compute = overlap.spans(computes=min(ahead, 400), transfers=transfers)[1] / transfers
    return {
        "compute_alone": alone_compute,
        "transfer_alone": alone_transfer,
        "compute_beside": largest_over_ranks(beside_transfer),
        "transfer_beside": largest_over_ranks(beside_compute),
    }
