"""Kernels of decoding by themselves on a GPU, as CUDA graphs, and whole steps with and without the host's launches.

    python tools/measure_decode_kernels.py OUT.json [--seconds 270]

`small`: kernels of norms, rotary, casts, routing, gathering, caching and sampling, replayed in a row, so that a second
is what one adds to a step; `attention`: of one token to stored keys; `gemm`, `grouped`: products of few rows; `steps`:
layers of architectures that tools/measure_decode.py has not, as a graph and launched one by one, with the kernels that
a profiler counts; `host`: what a replay and a read of the chosen tokens cost. Rows whose `kept_out` is true shaped
nothing. Needs torch and a GPU; nothing of moesim.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure_decode import Layer, weights
from torch.nn import functional

MODELS: dict[str, dict[str, int]] = {  # layers are those measured, not all of the model
    "olmoe-1b-7b": {
        "layers": 8, "hidden": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128, "experts": 64, "top_k": 8,
        "width": 1024, "shared": 0, "vocab": 50304,
    },
    "qwen3-235b-a22b": {
        "layers": 3, "hidden": 4096, "heads": 64, "kv_heads": 4, "head_dim": 128, "experts": 128, "top_k": 8,
        "width": 1536, "shared": 0, "vocab": 151936,
    },
    "granite-3-1b": {
        "layers": 12, "hidden": 1024, "heads": 16, "kv_heads": 8, "head_dim": 64, "experts": 32, "top_k": 8,
        "width": 512, "shared": 0, "vocab": 49155,
    },
}  # fmt: skip
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
Calls = list[Callable[[], Any]]


def graph_seconds(calls: Calls, *, repeats: int = 15) -> float:
    """Median seconds of one of the calls, all replayed in a row as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3 / len(calls)


def eager_seconds(call: Callable[[], Any], *, repeats: int = 15) -> float:
    """Median wall seconds of a call launched kernel by kernel, waited for."""
    found = []
    for number in range(repeats + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if number >= 3:
            found.append(time.perf_counter() - start)
    return statistics.median(found)


class Rows:
    """Rows of one family; every third is kept out of all choices."""

    def __init__(self, found: dict[str, Any], family: str) -> None:
        self.rows: list[dict[str, Any]] = found.setdefault(family, [])

    def add(self, **row: Any) -> None:
        self.rows.append(row | {"kept_out": len(self.rows) % 3 == 2})


def small_kernels(rows: int, width: int) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """(kind, kernels of a call, the call) on rows of a width, whose data stay in the L2 as in a step."""
    x, y = weights(rows, width), weights(rows, width)
    wide, out = weights(rows, 2 * width), torch.empty(rows, width, dtype=torch.bfloat16, device="cuda")
    single, norm = x.float(), torch.ones(width, dtype=torch.bfloat16, device="cuda")
    gates, ids = weights(rows, 1), torch.randint(rows, (rows,), device="cuda")
    grouped = weights(max(1, rows // 8), 8, width)
    yield "rms_norm", 1, lambda: functional.rms_norm(x, (width,), norm)
    yield "add", 1, lambda: x + y
    yield "mul", 1, lambda: x * gates
    yield "copy", 1, lambda: out.copy_(x)
    yield "cast", 1, lambda: x.float()
    yield "silu_mul", 2, lambda: functional.silu(wide[:, :width]) * wide[:, width:]
    yield "roll", 1, lambda: x.roll(width // 2, -1)
    yield "gather", 1, lambda: x.index_select(0, ids)
    yield "sum_of_8", 1, lambda: grouped.sum(1)
    yield "softmax", 1, lambda: single.softmax(-1)
    yield "argmax", 1, lambda: single.argmax(-1)


def routing_kernels(rows: int, experts: int, top: int) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Of the router and of what sorts rows by experts."""
    logits = torch.randn(rows, experts, device="cuda")
    ids = torch.randint(experts, (rows * top,), device="cuda")
    ordered, order = ids.sort()
    numbers, back = torch.arange(experts, device="cuda"), torch.empty_like(order)
    places = torch.arange(len(order), device="cuda")
    yield "topk", 2, lambda: logits.topk(top, -1)
    yield "sort", 5, lambda: ids.sort()
    yield "searchsorted", 1, lambda: torch.searchsorted(ordered, numbers, right=True, out_int32=True)
    yield "scatter", 1, lambda: back.scatter_(0, order, places)
    yield "divide", 1, lambda: order // top


def sampling_kernels(rows: int, vocab: int) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """From logits to tokens: the largest, a draw, and a draw among the 50 largest."""
    logits = torch.randn(rows, vocab, dtype=torch.bfloat16, device="cuda")
    noise = torch.empty(rows, vocab, device="cuda")

    def drawn() -> torch.Tensor:
        return (logits.float().softmax(-1) / noise.exponential_()).argmax(-1)

    def top_50() -> torch.Tensor:
        values, ids = logits.float().topk(50, -1)
        chosen = (values.softmax(-1) / torch.empty_like(values).exponential_()).argmax(-1, keepdim=True)
        return ids.gather(-1, chosen)

    single = logits.float()
    yield "greedy", 1, lambda: logits.argmax(-1)
    yield "cast_wide", 1, lambda: logits.float()
    yield "softmax_wide", 1, lambda: single.softmax(-1)
    yield "argmax_wide", 1, lambda: single.argmax(-1)
    yield "drawn", 5, drawn
    yield "top_50", 7, top_50


def small(found: dict[str, Any], end: float) -> None:
    """All of the small ones."""
    table = Rows(found, "small")
    for rows in ROWS:
        for width in (512, 2048, 7168):
            for kind, kernels, call in small_kernels(rows, width):
                seconds = graph_seconds([call] * 20)
                table.add(kind=kind, kernels=kernels, rows=rows, width=width, seconds=seconds)
        for experts, top in ((64, 6), (256, 8)):
            for kind, kernels, call in routing_kernels(rows, experts, top):
                table.add(kind=kind, kernels=kernels, rows=rows, width=experts, seconds=graph_seconds([call] * 20))
        for vocab in (32000, 151936):
            for kind, kernels, call in sampling_kernels(rows, vocab):
                table.add(kind=kind, kernels=kernels, rows=rows, width=vocab, seconds=graph_seconds([call] * 4))
        if time.monotonic() > end:
            return


def attention(found: dict[str, Any], end: float) -> None:
    """One token of each request to its stored keys, over caches that no L2 holds where they are large."""
    table = Rows(found, "attention")
    for heads, kv, dim in ((32, 8, 128), (64, 8, 128), (16, 16, 128), (32, 2, 128), (64, 4, 128), (16, 8, 64)):
        for batch in (1, 4, 16, 64, 256):
            for keys in (128, 512, 1500, 4096, 16384):
                size = 4 * batch * keys * kv * dim
                if size > 12e9 or time.monotonic() > end:
                    continue
                copies = max(2, min(10, int(2e8 // size)))
                caches = [(weights(batch, kv, keys, dim), weights(batch, kv, keys, dim)) for _ in range(copies)]
                q = weights(batch, heads, 1, dim)
                calls: Calls = [
                    lambda k=k, v=v, q=q: functional.scaled_dot_product_attention(q, k, v, enable_gqa=heads != kv)  # noqa: B023
                    for k, v in caches
                ]
                row = {"heads": heads, "kv_heads": kv, "head_dim": dim, "batch": batch, "keys": keys}
                table.add(**row, seconds=graph_seconds(calls))
                del caches, q, calls
                torch.cuda.empty_cache()


def products(found: dict[str, Any], end: float) -> None:
    """Dense and grouped products of few rows; weights rotate so that no L2 holds them."""
    table = Rows(found, "gemm")
    shapes = ((1024, 2048), (2048, 3072), (2048, 64), (4096, 9216), (4096, 1280), (512, 4096), (7168, 1536),
              (1536, 24576), (8192, 7168), (4096, 128256), (1408, 2048), (14336, 4096))  # fmt: skip
    for k, n in shapes:
        matrices = [weights(n, k) for _ in range(max(2, min(24, int(2e8 // (2 * k * n)))))]
        for m in (1, 2, 4, 8, 16, 24, 32, 64, 96, 128, 256, 512):
            if time.monotonic() < end:
                x = weights(m, k)
                calls: Calls = [lambda x=x, w=w: functional.linear(x, w) for w in matrices]
                table.add(m=m, k=k, n=n, seconds=graph_seconds(calls))
        del matrices
        torch.cuda.empty_cache()
    table, generator = Rows(found, "grouped"), torch.Generator().manual_seed(1)
    for experts, k, n in ((16, 2048, 1536), (32, 1024, 1024), (128, 4096, 3072), (4, 7168, 4096), (8, 2048, 7168),
                          (64, 1024, 2048), (128, 768, 2048), (8, 14336, 4096)):  # fmt: skip
        stacks = [weights(experts, k, n) for _ in range(2)]
        for rows in (2, 8, 24, 64, 200, 512, 1500):
            if time.monotonic() > end:
                break
            counts = torch.bincount(torch.randint(experts, (rows,), generator=generator), minlength=experts)
            ends, x = counts.cumsum(0).to(torch.int32).cuda(), weights(rows, k)
            calls = [lambda x=x, s=s, ends=ends: functional.grouped_mm(x, s, offs=ends) for s in stacks]
            table.add(rows_per_expert=counts.tolist(), k=k, n=n, seconds=graph_seconds(calls))
        del stacks
        torch.cuda.empty_cache()


def steps(found: dict[str, Any], end: float) -> None:
    """Layers, last norm and head, as a graph and launched one by one; kernels as the profiler counts them."""
    table = Rows(found, "steps")
    for name, m in MODELS.items():
        for batch, keys in ((1, 512), (1, 4096), (8, 2048), (32, 1024), (64, 4096), (128, 512), (256, 1024)):
            if time.monotonic() > end:
                return
            layers = [Layer(m, batch, keys) for _ in range(m["layers"])]
            head, x = weights(m["vocab"], m["hidden"]), weights(batch, m["hidden"])

            def run(layers: list[Layer] = layers, head: torch.Tensor = head, x: torch.Tensor = x) -> torch.Tensor:
                for layer in layers:
                    x = layer(x)
                return functional.linear(x, head).float().softmax(-1).argmax(-1)

            row: dict[str, Any] = {"model": name, "batch": batch, "keys": keys, "seconds": graph_seconds([run])}
            row["eager_seconds"] = eager_seconds(run)
            row["kernels"] = kernels_of(run)
            table.add(**row)
            print(name, batch, keys, row["seconds"], row["eager_seconds"], len(row["kernels"]), file=sys.stderr)
            del layers, head, x, run
            gc.collect()
            torch.cuda.empty_cache()


def compiled(found: dict[str, Any], end: float) -> None:
    """The same layers compiled by torch.compile, as a graph: small kernels are fused as far as inductor fuses them."""
    table = Rows(found, "compiled")
    for name, m in MODELS.items():
        for batch, keys in ((64, 1024), (4, 1024)):
            if time.monotonic() > end - 25:
                return
            torch.compiler.reset()
            layers = [Layer(m, batch, keys) for _ in range(m["layers"])]
            call = torch.compile(Layer.__call__, dynamic=False)
            head, x = weights(m["vocab"], m["hidden"]), weights(batch, m["hidden"])

            def run(layers: Any = layers, head: Any = head, x: Any = x, call: Any = call) -> torch.Tensor:
                for layer in layers:
                    x = call(layer, x)
                return functional.linear(x, head).float().softmax(-1).argmax(-1)

            start = time.monotonic()
            run()
            row: dict[str, Any] = {"model": name, "batch": batch, "keys": keys, "seconds": graph_seconds([run])}
            row["kernels"] = kernels_of(run)
            table.add(**row)
            print(
                "compiled", name, batch, row["seconds"], len(row["kernels"]), time.monotonic() - start, file=sys.stderr
            )
            del layers, head, x, run
            gc.collect()
            torch.cuda.empty_cache()


def kernels_of(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """(name, seconds) of the kernels of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(event.name[:60], event.time_range.elapsed_us() * 1e-6) for event in events]


def host(found: dict[str, Any], end: float) -> None:
    """Seconds of the host to replay graphs of so many kernels, to read tokens back, and to launch a kernel."""
    del end
    table = Rows(found, "host")
    x = weights(1, 64)
    tokens = torch.zeros(64, dtype=torch.int64, device="cuda")
    for kernels in (50, 200, 800, 3200):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(kernels):
                x.add_(1.0)
        graph.replay()
        submit, whole = [], []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            graph.replay()
            submit.append(time.perf_counter() - start)
            torch.cuda.synchronize()
            whole.append(time.perf_counter() - start)
        table.add(kind="replay", kernels=kernels, submit=statistics.median(submit), whole=statistics.median(whole))
    table.add(kind="readback", seconds=eager_seconds(lambda: tokens.tolist(), repeats=50))
    table.add(kind="launches", kernels=200, seconds=eager_seconds(lambda: [x.add_(1.0) for _ in range(200)]))


def main() -> None:
    """Measure until the time is up; what is there is written after each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=270.0)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "models": MODELS}
    with torch.inference_mode():
        for part in (host, small, compiled, steps, products, attention):
            start = time.monotonic()
            try:
                part(found, end)
            except Exception as error:  # the other parts still count
                print(part.__name__, repr(error), file=sys.stderr)
            print(part.__name__, f"{time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
            arguments.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
