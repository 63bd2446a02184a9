"""Decoding on a GPU: its kernels by themselves, as CUDA graphs, and whole steps with and without the host's launches.

    python tools/measure_decode.py OUT.json [--set steps] [--seconds 270]

Each step is a few layers of a published architecture with random weights: one token of each of B requests with C stored
keys. `small`: kernels of norms, rotary, casts, routing, gathering, caching and sampling, replayed in a row, so that a
second is what one adds to a step; `attention`: of one token to stored keys; `gemm`, `grouped`: GEMMs of few rows;
`steps`: layers as a graph and launched one by one, with the kernels that a profiler counts; `host`: what a replay and a
read of the chosen tokens cost. Rows whose `kept_out` is true shaped nothing. `--set steps`: steps, attention and
GEMMs of other architectures and sizes, all of which are kept out (docs/serving.md; measured first, without the
launches one by one). Needs torch and a GPU; nothing of moesim.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

Calls = list[Callable[[], Any]]
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured. models: layers are those measured, not all of the model. steps: (batch, keys). attention:
    (heads, heads of keys, width of one), with batches and keys. gemms: (k, n), with rows. stacks: (experts, k, n), with
    rows of all experts together. most_bytes: of a cache. kept_out: whether every row is, or every third one.
    """

    models: dict[str, dict[str, int]]
    steps: tuple[tuple[int, int], ...]
    attention: tuple[tuple[int, int, int], ...]
    batches: tuple[int, ...]
    keys: tuple[int, ...]
    gemms: tuple[tuple[int, int], ...]
    gemm_rows: tuple[int, ...]
    stacks: tuple[tuple[int, int, int], ...]
    stack_rows: tuple[int, ...]
    most_bytes: float
    kept_out: bool


def _model(*numbers: int) -> dict[str, int]:
    names = "layers hidden heads kv_heads head_dim experts top_k width shared vocab"
    return dict(zip(names.split(), numbers, strict=True))


SETS = {
    "steps": Sizes(
        models={
            "qwen3-30b-a3b": _model(6, 2048, 32, 4, 128, 128, 8, 768, 0, 151936),
            "mixtral-8x7b": _model(4, 4096, 32, 8, 128, 8, 2, 14336, 0, 32000),
            "deepseek-moe-16b": _model(6, 2048, 16, 16, 128, 64, 6, 1408, 2816, 102400),
        },
        steps=tuple(itertools.product((1, 4, 16, 64, 256), (512, 4096))),
        attention=((32, 4, 128), (32, 8, 128), (16, 16, 128)),
        batches=(1, 8, 64, 256),
        keys=(512, 2048, 8192),
        gemms=((2048, 5120), (4096, 6144), (4096, 4096), (7168, 2112), (2048, 151936)),
        gemm_rows=(1, 2, 4, 8, 16, 32, 64, 128, 256),
        stacks=((128, 2048, 1536), (64, 2048, 2816), (8, 4096, 28672), (32, 7168, 4096)),
        stack_rows=(8, 32, 128, 512, 2048),
        most_bytes=24e9,
        kept_out=True,
    ),
    "kernels": Sizes(
        models={
            "olmoe-1b-7b": _model(8, 2048, 16, 16, 128, 64, 8, 1024, 0, 50304),
            "qwen3-235b-a22b": _model(3, 4096, 64, 4, 128, 128, 8, 1536, 0, 151936),
            "granite-3-1b": _model(12, 1024, 16, 8, 64, 32, 8, 512, 0, 49155),
        },
        steps=((1, 512), (1, 4096), (8, 2048), (32, 1024), (64, 4096), (128, 512), (256, 1024)),
        attention=((32, 8, 128), (64, 8, 128), (16, 16, 128), (32, 2, 128), (64, 4, 128), (16, 8, 64)),
        batches=(1, 4, 16, 64, 256),
        keys=(128, 512, 1500, 4096, 16384),
        gemms=(
            *((1024, 2048), (2048, 3072), (2048, 64), (4096, 9216), (4096, 1280), (512, 4096), (7168, 1536)),
            *((1536, 24576), (8192, 7168), (4096, 128256), (1408, 2048), (14336, 4096)),
        ),
        gemm_rows=(1, 2, 4, 8, 16, 24, 32, 64, 96, 128, 256, 512),
        stacks=(
            *((16, 2048, 1536), (32, 1024, 1024), (128, 4096, 3072), (4, 7168, 4096), (8, 2048, 7168)),
            *((64, 1024, 2048), (128, 768, 2048), (8, 14336, 4096)),
        ),
        stack_rows=(2, 8, 24, 64, 200, 512, 1500),
        most_bytes=12e9,
        kept_out=False,
    ),
}


def weights(*shape: int) -> torch.Tensor:
    """Random bf16 numbers of the size that trained weights have."""
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda") / shape[-1] ** 0.5


class Layer:
    """One layer with its cache of keys and values."""

    def __init__(self, m: dict[str, int], batch: int, keys: int) -> None:
        h, d = m["hidden"], m["head_dim"]
        self.m, self.batch, self.keys = m, batch, keys
        self.qkv = weights((m["heads"] + 2 * m["kv_heads"]) * d, h)
        self.out = weights(h, m["heads"] * d)
        self.router = weights(m["experts"], h)
        self.up, self.down = weights(m["experts"], h, 2 * m["width"]), weights(m["experts"], m["width"], h)
        if m["shared"]:
            self.shared_up, self.shared_down = weights(2 * m["shared"], h), weights(h, m["shared"])
        self.norm = torch.ones(h, dtype=torch.bfloat16, device="cuda")
        self.cos, self.sin = weights(1, 1, d), weights(1, 1, d)
        self.k, self.v = (weights(batch, m["kv_heads"], keys, d) for _ in range(2))
        self.numbers = torch.arange(m["experts"], device="cuda")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        m, batch = self.m, self.batch
        heads, kv, d = m["heads"], m["kv_heads"], m["head_dim"]
        h = functional.rms_norm(x, (m["hidden"],), self.norm)
        q, k, v = functional.linear(h, self.qkv).view(batch, heads + 2 * kv, d).split([heads, kv, kv], dim=1)
        q, k = (t * self.cos + t.roll(d // 2, -1) * self.sin for t in (q, k))
        self.k[:, :, -1], self.v[:, :, -1] = k, v
        o = functional.scaled_dot_product_attention(q.unsqueeze(2), self.k, self.v, enable_gqa=heads != kv)
        x = x + functional.linear(o.reshape(batch, heads * d), self.out)
        return x + self.experts(functional.rms_norm(x, (m["hidden"],), self.norm))

    def experts(self, h: torch.Tensor) -> torch.Tensor:
        m = self.m
        scores, ids = functional.linear(h, self.router).float().softmax(-1).topk(m["top_k"], -1)
        sorted_ids, order = ids.flatten().sort()
        ends = torch.searchsorted(sorted_ids, self.numbers, right=True, out_int32=True)
        rows = h.index_select(0, order // m["top_k"])
        gate, up = functional.grouped_mm(rows, self.up, offs=ends).chunk(2, -1)
        rows = functional.grouped_mm(functional.silu(gate) * up, self.down, offs=ends)
        rows = rows * scores.flatten()[order].unsqueeze(1).to(rows.dtype)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device="cuda"))
        y = rows.index_select(0, back).view(len(h), m["top_k"], -1).sum(1)
        if m["shared"]:
            gate, up = functional.linear(h, self.shared_up).chunk(2, -1)
            y = y + functional.linear(functional.silu(gate) * up, self.shared_down)
        return y


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
    """Rows of one family; every third is kept out of all choices, or every one."""

    def __init__(self, found: dict[str, Any], family: str, sizes: Sizes) -> None:
        self.rows: list[dict[str, Any]] = found.setdefault(family, [])
        self.all = sizes.kept_out

    def add(self, **row: Any) -> None:
        """Keep one."""
        self.rows.append(row | {"kept_out": self.all or len(self.rows) % 3 == 2})


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


def small(found: dict[str, Any], sizes: Sizes, end: float) -> None:
    """All of the small ones."""
    table = Rows(found, "small", sizes)
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


def attention(found: dict[str, Any], sizes: Sizes, end: float) -> None:
    """One token of each request to its stored keys, over caches that no L2 holds where they are large."""
    table = Rows(found, "attention", sizes)
    for heads, kv, dim in sizes.attention:
        for batch in sizes.batches:
            for keys in sizes.keys:
                size = 4 * batch * keys * kv * dim
                if size > sizes.most_bytes or time.monotonic() > end:
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


def gemms(found: dict[str, Any], sizes: Sizes, end: float) -> None:
    """Dense and grouped GEMMs of few rows; weights rotate so that no L2 holds them."""
    table = Rows(found, "gemm", sizes)
    for k, n in sizes.gemms:
        matrices = [weights(n, k) for _ in range(max(2, min(24, int(2e8 // (2 * k * n)))))]
        for m in sizes.gemm_rows:
            if time.monotonic() < end:
                x = weights(m, k)
                calls: Calls = [lambda x=x, w=w: functional.linear(x, w) for w in matrices]
                table.add(m=m, k=k, n=n, seconds=graph_seconds(calls))
        del matrices
        torch.cuda.empty_cache()
    table, generator = Rows(found, "grouped", sizes), torch.Generator().manual_seed(1)
    for experts, k, n in sizes.stacks:
        stacks = [weights(experts, k, n) for _ in range(2)]
        for rows in sizes.stack_rows:
            if time.monotonic() > end:
                break
            counts = torch.bincount(torch.randint(experts, (rows,), generator=generator), minlength=experts)
            ends, x = counts.cumsum(0).to(torch.int32).cuda(), weights(rows, k)
            calls = [lambda x=x, s=s, ends=ends: functional.grouped_mm(x, s, offs=ends) for s in stacks]
            table.add(rows_per_expert=counts.tolist(), k=k, n=n, seconds=graph_seconds(calls))
        del stacks
        torch.cuda.empty_cache()


def decoding(m: dict[str, int], batch: int, keys: int, *, call: Any = Layer.__call__) -> Callable[[], torch.Tensor]:
    """A whole step: the layers, the last norm's GEMM with the head, and the chosen tokens."""
    layers = [Layer(m, batch, keys) for _ in range(m["layers"])]
    head, first = weights(m["vocab"], m["hidden"]), weights(batch, m["hidden"])

    def run() -> torch.Tensor:
        x = first
        for layer in layers:
            x = call(layer, x)
        return functional.linear(x, head).float().softmax(-1).argmax(-1)

    return run


def steps(found: dict[str, Any], sizes: Sizes, end: float) -> None:
    """Layers, last norm and head, as a graph and launched one by one; kernels as the profiler counts them."""
    table = Rows(found, "steps", sizes)
    for name, m in sizes.models.items():
        for batch, keys in sizes.steps:
            if time.monotonic() > end:
                return
            if 4 * m["layers"] * batch * keys * m["kv_heads"] * m["head_dim"] > 2 * sizes.most_bytes:
                continue
            run = decoding(m, batch, keys)
            row: dict[str, Any] = {"model": name, "batch": batch, "keys": keys, "seconds": graph_seconds([run])}
            row["eager_seconds"] = eager_seconds(run)
            row["kernels"] = kernels_of(run)
            table.add(**row)
            print(name, batch, keys, row["seconds"], row["eager_seconds"], len(row["kernels"]), file=sys.stderr)
            del run
            gc.collect()
            torch.cuda.empty_cache()


def compiled(found: dict[str, Any], sizes: Sizes, end: float) -> None:
    """The same layers compiled by torch.compile, as a graph: small kernels are fused as far as inductor fuses them."""
    table = Rows(found, "compiled", sizes)
    for name, m in sizes.models.items():
        for batch, keys in ((64, 1024), (4, 1024)):
            if time.monotonic() > end - 25:
                return
            torch.compiler.reset()
            run = decoding(m, batch, keys, call=torch.compile(Layer.__call__, dynamic=False))
            start = time.monotonic()
            run()
            row: dict[str, Any] = {"model": name, "batch": batch, "keys": keys, "seconds": graph_seconds([run])}
            row["kernels"] = kernels_of(run)
            table.add(**row)
            print(
                "compiled", name, batch, row["seconds"], len(row["kernels"]), time.monotonic() - start, file=sys.stderr
            )
            del run
            gc.collect()
            torch.cuda.empty_cache()


def kernels_of(run: Callable[[], Any]) -> list[tuple[str, float]]:
    """(name, seconds) of the kernels of one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [(event.name[:60], event.time_range.elapsed_us() * 1e-6) for event in events]


def host(found: dict[str, Any], sizes: Sizes, end: float) -> None:
    """Seconds of the host to replay graphs of so many kernels, to read tokens back, and to launch a kernel."""
    del end
    table = Rows(found, "host", sizes)
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


PARTS = {"steps": (steps, attention, gemms), "kernels": (host, small, compiled, steps, gemms, attention)}


def main() -> None:
    """Measure until the time is up; what is there is written after each part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", choices=SETS, default="kernels")
    parser.add_argument("--seconds", type=float, default=270.0)
    arguments = parser.parse_args()
    sizes, end = SETS[arguments.set], time.monotonic() + arguments.seconds
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "models": sizes.models}
    with torch.inference_mode():
        for part in PARTS[arguments.set]:
            start = time.monotonic()
            try:
                part(found, sizes, end)
            except Exception as error:  # the other parts still count
                print(part.__name__, repr(error), file=sys.stderr)
            print(part.__name__, f"{time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
            arguments.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
