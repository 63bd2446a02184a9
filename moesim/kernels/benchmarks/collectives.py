"""Collectives between the processes of a torchrun, alone and beside compute kernels.

All processes issue the same calls in the same order with counts fixed by the size, and the slowest one counts.
Legend: R ranks.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from moesim.kernels.benchmarks.timing import Call
from moesim.seeding import stream

_SIZES = (*(8 * 1024 * 4**power for power in range(9)), 1 << 30)  # 8 KiB .. 512 MiB, 1 GiB
_KINDS = ("all_to_all", "all_to_all_uneven", "all_reduce", "all_gather", "reduce_scatter", "send_recv", "exchange")


def collective_shapes(ranks: int, *, largest: int = 1 << 30) -> Iterator[dict[str, Any]]:
    """Kinds and sizes; `bytes` is the buffer of one rank: what it sends in an all-to-all (own part included), what an
    all-reduce sums, what an all-gather or reduce-scatter hands out or takes in as a whole, what a send moves.
    """
    rng = stream(0, "uneven all-to-all", ranks)
    for size in _SIZES:
        if size > largest:
            break
        for kind in _KINDS:
            shape: dict[str, Any] = {"kind": kind, "bytes": size, "ranks": ranks}
            if kind == "all_to_all_uneven":
                shares_RR = rng.dirichlet(np.full(ranks, 1.0), size=ranks)
                # Whole rows of 4 KiB, as tokens are: sizes off the vector width of 16 bytes take a slower path.
                shape["bytes_matrix"] = (np.rint(shares_RR * (size / 4096)).astype(int) * 4096).tolist()
            yield shape


def _values(count: int, device: str) -> torch.Tensor:
    return torch.randn(max(count, 1), device=device).to(torch.bfloat16)[:count]


def prepare_collective(shape: dict[str, Any], device: str) -> Call:
    """The call of one collective on this rank, over two rotating buffers."""
    rank, ranks, kind = dist.get_rank(), dist.get_world_size(), shape["kind"]
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
        return dist.all_to_all_single(out, source, received, sent)

    def peer_to_peer(both: bool) -> Call:
        peer = rank ^ 1
        sends, receives = both or rank % 2 == 0, both or rank % 2 == 1

        def run(i: int) -> None:
            operations = [dist.P2POp(dist.isend, inputs[i % 2], peer)] if sends else []
            operations += [dist.P2POp(dist.irecv, outputs[i % 2], peer)] if receives else []
            for work in dist.batch_isend_irecv(operations) if peer < ranks else []:
                work.wait()

        return run

    # Newer versions of torch have other names for these two.
    gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    calls: dict[str, Call] = {
        "all_to_all": all_to_all,
        "all_to_all_uneven": all_to_all,
        "all_reduce": lambda i: dist.all_reduce(inputs[i % 2]),
        "all_gather": lambda i: gather(outputs[i % 2], inputs[i % 2][: count // ranks]),
        "reduce_scatter": lambda i: scatter(outputs[i % 2][: count // ranks], inputs[i % 2]),
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
