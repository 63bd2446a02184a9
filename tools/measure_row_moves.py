"""Kernels that move rows, join latent keys or update many tensors, on the GPU at hand.

    python tools/measure_row_moves.py OUT.json [--seconds 300]

`gather`: rows of T tokens, K of each (K = 1: each once), written in another order, by torch and by a Triton kernel, in
bf16 and in bytes with a scale for 128. `sum`: K rows of every token weighted and summed. `join`: keys of latent
attention joined from their two parts, and taken apart again. `adam`: torch's fused AdamW over many tensors, by the host
as it is, and captured in a graph. `mixed`: products and copies in turn for 0.5 s, with the clock that they settle at.
Every second row of a kind is marked `held_out`.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]

from moesim.kernels.benchmarks.device import environment
from moesim.kernels.benchmarks.timing import CudaTimer

Row = dict[str, Any]
BF16 = torch.bfloat16
Call = Callable[[int], object]
Case = tuple[Row, Call]
LARGEST = 5e8  # numbers
ADAM = (
    (100, 4096), (1000, 4096), (4000, 4096), (100, 65536), (1000, 65536), (4000, 65536), (200, 1 << 20),
    (1000, 1 << 20), (50, 1 << 24), (1000, 1024), (300, 262144), (2000, 262144), (2, 1 << 28), (30, 1 << 25),
)  # fmt: skip
BEYOND = 160e6  # bytes between two uses of one operand: more than the L2 holds
TOKENS, COPIES, WIDTHS = (1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8), (1024, 2048, 4096, 7168)
HEADS = ((16, 128, 64), (32, 128, 64), (64, 128, 64), (128, 128, 64), (40, 64, 32))  # heads, without and with position


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _gather(x, ids, out, W, B: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(ids + row).to(tl.int64)
    for begin in range(0, W, B):
        column_B = begin + tl.arange(0, B)
        tl.store(out + row * W + column_B, tl.load(x + source * W + column_B, mask=column_B < W), mask=column_B < W)


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _sum(x, places, gates, out, W, K: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    for begin in range(0, W, B):
        column_B = begin + tl.arange(0, B)
        total_B = tl.zeros([B], tl.float32)
        for k in tl.static_range(K):
            place = tl.load(places + token * K + k).to(tl.int64)
            value_B = tl.load(x + place * W + column_B, mask=column_B < W).to(tl.float32)
            total_B += tl.load(gates + token * K + k) * value_B
        tl.store(out + token * W + column_B, total_B.to(tl.bfloat16), mask=column_B < W)


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _join(kv, shared, out, H, D: tl.constexpr, V: tl.constexpr, P: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """Keys [T, H, D + P] of [T, H, D + V] and of [T, P], which all heads share."""
    token = tl.program_id(0).to(tl.int64)
    of_d, of_p = tl.arange(0, D), tl.arange(0, P)
    position_P = tl.load(shared + token * P + of_p)
    for begin in range(0, H, B):
        head_B = begin + tl.arange(0, B)
        inside = head_B[:, None] < H
        from_B, to_B = (token * H + head_B) * (D + V), (token * H + head_B) * (D + P)
        value = tl.load(kv + from_B[:, None] + of_d[None, :], mask=inside)
        tl.store(out + to_B[:, None] + of_d[None, :], value, mask=inside)
        spread = tl.broadcast_to(position_P[None, :], (B, P))
        tl.store(out + to_B[:, None] + D + of_p[None, :], spread, mask=inside)


@triton.jit  # type: ignore[untyped-decorator, misc, unused-ignore]
def _part(dk, dkv, dshared, H, D: tl.constexpr, V: tl.constexpr, P: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gradient of `_join`: dK [T, H, D + P] to the first D of [T, H, D + V], the rest summed over heads."""
    token = tl.program_id(0).to(tl.int64)
    of_d, of_p = tl.arange(0, D), tl.arange(0, P)
    total_P = tl.zeros([P], tl.float32)
    for begin in range(0, H, B):
        head_B = begin + tl.arange(0, B)
        inside = head_B[:, None] < H
        to_B, from_B = (token * H + head_B) * (D + V), (token * H + head_B) * (D + P)
        value = tl.load(dk + from_B[:, None] + of_d[None, :], mask=inside)
        tl.store(dkv + to_B[:, None] + of_d[None, :], value, mask=inside)
        last = tl.load(dk + from_B[:, None] + D + of_p[None, :], mask=inside, other=0.0)
        total_P += tl.sum(last.to(tl.float32), axis=0)
    tl.store(dshared + token * P + of_p, total_P.to(tl.bfloat16))


def sets_of(bytes_: float) -> int:
    """Operand sets so that none is found in the L2."""
    return int(np.clip(np.ceil(BEYOND / bytes_) + 1, 2, 24))


def ordered_ids(tokens: int, copies: int, generator: torch.Generator) -> torch.Tensor:
    """Tokens of rows in the order of 64 experts, `copies` distinct ones each; a plain permutation for one."""
    if copies == 1:
        return torch.randperm(tokens, device="cuda", generator=generator).to(torch.int32)
    chosen = torch.rand(tokens, 64, device="cuda", generator=generator).topk(copies, dim=1)[1].reshape(-1)
    return (torch.argsort(chosen, stable=True) // copies).to(torch.int32)


def gathers(generator: torch.Generator) -> Iterator[Case]:
    """Each in three ways."""
    for tokens, copies, width in product(TOKENS, COPIES, WIDTHS):
        rows = tokens * copies
        if rows * width > LARGEST:
            continue
        count = sets_of(2.0 * rows * width)
        xs = [torch.randn(tokens, width, device="cuda").to(BF16) for _ in range(count)]
        outs = [torch.empty(rows, width, dtype=BF16, device="cuda") for _ in range(count)]
        ids = ordered_ids(tokens, copies, generator)
        what = {"what": "gather", "tokens": tokens, "copies": copies, "width": width}
        yield what | {"by": "torch"}, by_torch(xs, ids.long(), outs)
        yield what | {"by": "triton"}, by_triton(xs, ids, outs, block=2048)
        eights, eight_outs = ([x.view(torch.uint8)[:, :width].contiguous() for x in of] for of in (xs, outs))
        yield what | {"by": "triton", "bytes": 1}, by_triton(eights, ids, eight_outs, block=4096)


def by_torch(xs: list[torch.Tensor], ids: torch.Tensor, outs: list[torch.Tensor]) -> Call:
    """Rows by torch's own kernel."""
    return lambda i: torch.index_select(xs[i % len(xs)], 0, ids, out=outs[i % len(xs)])


def by_triton(xs: list[torch.Tensor], ids: torch.Tensor, outs: list[torch.Tensor], *, block: int) -> Call:
    """Rows by a kernel of this file."""
    rows, width = outs[0].shape
    return lambda i: _gather[(rows,)](xs[i % len(xs)], ids, outs[i % len(xs)], width, B=block, num_warps=4)


def sums(generator: torch.Generator) -> Iterator[Case]:
    """Weighted sums of a token's rows, which lie in the order of experts."""
    for tokens, copies, width in product(TOKENS, COPIES[1:], WIDTHS):
        rows = tokens * copies
        if rows * width > LARGEST:
            continue
        count = sets_of(2.0 * rows * width)
        xs = [torch.randn(rows, width, device="cuda").to(BF16) for _ in range(count)]
        places = torch.argsort(ordered_ids(tokens, copies, generator).long(), stable=True).to(torch.int32)
        what = {"what": "sum", "tokens": tokens, "copies": copies, "width": width, "by": "triton"}
        yield what, summed(xs, places, tokens=tokens, copies=copies)


def summed(xs: list[torch.Tensor], places: torch.Tensor, *, tokens: int, copies: int) -> Call:
    """The sums of all tokens."""
    rows, width = xs[0].shape
    gates, out = torch.rand(rows, device="cuda"), torch.empty(tokens, width, dtype=BF16, device="cuda")
    sizes = {"K": copies, "B": 1024, "num_warps": 4}
    return lambda i: _sum[(tokens,)](xs[i % len(xs)], places, gates, out, width, **sizes)


def joins(generator: torch.Generator) -> Iterator[Case]:
    """Both ways by Triton, and forward by torch."""
    del generator
    for tokens, (heads, plain, position) in product((1024, 4096, 8192), HEADS):
        count = sets_of(4.0 * tokens * heads * plain)
        kvs = [torch.randn(tokens, heads, 2 * plain, device="cuda").to(BF16) for _ in range(count)]
        keys = [torch.randn(tokens, heads, plain + position, device="cuda").to(BF16) for _ in range(count)]
        shared = torch.randn(tokens, position, device="cuda").to(BF16)
        what = {"what": "join", "tokens": tokens, "heads": heads, "plain": plain, "position": position}
        yield what | {"by": "triton"}, joined(kvs, keys, shared)
        yield what | {"by": "triton", "back": True}, parted(kvs, keys, shared)
        yield what | {"by": "torch"}, joined_by_torch(kvs, shared, plain=plain)


def joined(kvs: list[torch.Tensor], keys: list[torch.Tensor], shared: torch.Tensor) -> Call:
    """Keys of their parts."""
    sizes = _sizes(kvs[0], shared)
    heads = kvs[0].shape[1]
    return lambda i: _join[kvs[0].shape[:1]](kvs[i % len(kvs)], shared, keys[i % len(kvs)], heads, **sizes)


def parted(kvs: list[torch.Tensor], keys: list[torch.Tensor], shared: torch.Tensor) -> Call:
    """The gradients of the parts."""
    sizes = _sizes(kvs[0], shared)
    heads = kvs[0].shape[1]
    return lambda i: _part[kvs[0].shape[:1]](keys[i % len(kvs)], kvs[i % len(kvs)], shared, heads, **sizes)


def _sizes(kv: torch.Tensor, shared: torch.Tensor) -> dict[str, int]:
    plain = kv.shape[2] // 2
    return {"D": plain, "V": plain, "P": shared.shape[1], "B": 16, "num_warps": 4}


def joined_by_torch(kvs: list[torch.Tensor], shared: torch.Tensor, *, plain: int) -> Call:
    """Keys by torch's concatenation."""
    heads = kvs[0].shape[1]
    return lambda i: torch.cat((kvs[i % len(kvs)][..., :plain], shared[:, None].expand(-1, heads, -1)), -1)


def adam() -> Iterator[Row]:
    """Seconds of a step of fused AdamW, issued by the host and replayed from a graph."""
    for dtype in (torch.float32, BF16):
        for tensors, size in ADAM:
            yield {"what": "adam", "tensors": tensors, "size": size, "bytes": dtype.itemsize} | adam_step(
                tensors, size, dtype
            )


def adam_step(tensors: int, size: int, dtype: torch.dtype) -> Row:
    """Medians of seven."""
    event: Any = torch.cuda.Event
    params = [torch.zeros(size, dtype=dtype, device="cuda") for _ in range(tensors)]
    grads, first, second = ([torch.full_like(p, 1e-3) for p in params] for _ in range(3))
    steps = [torch.ones((), device="cuda") for _ in params]
    rates = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "eps": 1e-8}

    def step() -> None:
        torch._fused_adamw_(params, grads, first, second, [], steps, **rates, amsgrad=False, maximize=False)

    step()
    torch.cuda.synchronize()
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    found: Row = {}
    for name, run in (("eager", step), ("graph", graph.replay)):
        times = []
        for _ in range(7):
            begin, end = event(enable_timing=True), event(enable_timing=True)
            torch.cuda.synchronize()
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        found[name] = float(np.median(times))
    return found


def mixed(timer: CudaTimer) -> Iterator[Row]:
    """A product of 8192 sides and copies of 2 GB in turn, without pause, each share of time for 0.6 s."""
    event: Any = torch.cuda.Event
    a, b = (torch.randn(8192, 8192, device="cuda").to(BF16) for _ in range(2))
    source, target = (torch.empty(1 << 29, dtype=BF16, device="cuda").normal_() for _ in range(2))
    for products, copies in ((8, 0), (6, 1), (4, 1), (3, 2), (2, 2), (2, 4), (1, 4), (0, 4)):
        begin = time.monotonic()
        spans: list[list[float]] = [[], []]
        clocks: list[float] = []
        while time.monotonic() - begin < 0.7:
            marks = [event(enable_timing=True) for _ in range(5)]
            marks[0].record()
            for _ in range(products):
                torch.mm(a, b)
            marks[1].record()
            for _ in range(copies):
                target.copy_(source)
            marks[2].record()
            timer._probe_clock(marks[3], marks[4])
            torch.cuda.synchronize()
            if time.monotonic() - begin > 0.4:
                spans[0].append(marks[0].elapsed_time(marks[1]) / 1e3)
                spans[1].append(marks[1].elapsed_time(marks[2]) / 1e3)
                clocks.append(400_000 / (marks[3].elapsed_time(marks[4]) * 1e3))
        yield {
            "what": "mixed", "products": products, "copies": copies, "clock_mhz": float(np.median(clocks)),
            "product_s": float(np.median(spans[0])) / max(products, 1),
            "copy_s": float(np.median(spans[1])) / max(copies, 1),
        }  # fmt: skip
        time.sleep(0.2)


def main() -> None:
    """Measure until the time is over; write after each kind."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=300.0)
    given = parser.parse_args()
    begin, rows, failed = time.monotonic(), [], []
    facts, timer = environment("cuda", 1), CudaTimer(target=0.006, warm=0.006)
    generator = torch.Generator("cuda").manual_seed(0)

    def keep(name: str) -> None:
        given.out.write_text(json.dumps({"machine": facts, "rows": rows, "failed": failed}))
        print(f"{name}: {len(rows)} rows, {time.monotonic() - begin:.0f} s", flush=True)

    for name, kind in (("join", joins), ("gather", gathers), ("sum", sums)):
        try:
            for number, (what, call) in enumerate(kind(generator)):
                if time.monotonic() - begin > given.seconds:
                    break
                found = timer.time(call)
                rows.append(what | {"s": found.p50, "clock_mhz": found.clock_mhz, "held_out": number % 2 == 1})
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}"[:300])
            print(failed[-1], flush=True)
        torch.cuda.empty_cache()
        keep(name)
    for name, more in (("mixed", lambda: mixed(timer)), ("adam", adam)):
        try:
            for number, row in enumerate(more()):
                rows.append(row | {"held_out": number % 2 == 1})
                if time.monotonic() - begin > given.seconds:
                    break
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__}: {error}"[:300])
            print(failed[-1], flush=True)
        torch.cuda.empty_cache()
        keep(name)


if __name__ == "__main__":
    main()
