"""Kernels by themselves, on the GPU at hand: for the ratios and prices of moesim/kernels/unprofiled.py.

    python tools/measure_unprofiled.py FILE.json [KIND...]      # all kinds by default

GEMMs, dropouts, puts: kernels beside their plain sisters: GEMMs whose rows begin at no multiple of 16 bytes,
attention with dropout, and sums into rows by `index_put`, as the backward pass of `x[ids]` runs it. embeddings,
routing, rows_by_place, layouts: gradients of embeddings, top-k, sorts, counts, running sums, writes and sums of rows
by place, and copies into another order. Seconds of one, by CUDA events, least of three rows of ten, with the host
ahead. Needs torch alone.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import one_hot, softmax
from torch.nn.functional import scaled_dot_product_attention as attention

BF16, F32 = torch.bfloat16, torch.float32
Row = dict[str, Any]
Calls = dict[str, Callable[[], object]]  # by the name that the row gives their seconds
Case = tuple[Row, Calls]

AHEAD_CYCLES = int(2e6)  # that the GPU sleeps while the host launches a row
TABLES = (32_000, 50_304, 151_936)
TOKENS = (2_048, 8_192, 32_768)
LARGE_TABLES = ((16_384, 2_048, 200_064), (16_384, 7_168, 129_280), (65_536, 2_048, 100_352))
ROUTERS = ((8, 2), (64, 6), (64, 8), (128, 8), (256, 8))
PERMUTED = ((4_096, 8, 2_048), (16_384, 8, 2_048), (8_192, 2, 4_096), (16_384, 6, 2_048))
HEADS = ((2, 32, 4_096, 128), (2, 64, 2_048, 64))
GEMMS = ((4096, 2048), (8192, 1600), (8192, 4096), (16384, 2048))
COLUMNS = (50257, 50258, 50260, 50264, 32001, 32002, 32004, 32008, 10007, 10008)
ATTENTION = ((8, 25, 1024, 64), (8, 16, 2048, 128), (4, 32, 2048, 64), (2, 32, 4096, 128), (1, 16, 8192, 64))
PUTS = ((4096, 8, 2048), (8192, 8, 1024), (16384, 8, 2048), (8192, 2, 4096), (8192, 6, 2048), (32768, 8, 1024))


def made(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Random numbers on the GPU."""
    return torch.randn(*shape, device="cuda").to(dtype)


def seconds(run: Callable[[], object], count: int = 10) -> float:
    """Of one run, behind three of warm-up."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(3):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD_CYCLES)
        first.record()
        for _ in range(count):
            run()
        last.record()
        torch.cuda.synchronize()
        best = min(best, first.elapsed_time(last) / count / 1e3)
    return best


def one(name: str, what: Row, run: Callable[[], object]) -> Case:
    """A case of one call."""
    return {"what": name, **what}, {"s": run}


def embeddings() -> Iterator[Case]:
    """Gradients of tables by vocabulary V, tokens T and width H; ids alike, and as in text."""
    for table in TABLES:
        for tokens in TOKENS:
            for width in (1_024, 2_048, 4_096):
                for dtype in (BF16, F32) if width == 2_048 else (BF16,):
                    yield from _embedding(tokens, width, table, dtype=dtype, zipf=width == 2_048 and dtype is BF16)
    for tokens, width, table in LARGE_TABLES:
        yield from _embedding(tokens, width, table, dtype=BF16, zipf=False)


def _embedding(tokens: int, width: int, table: int, *, dtype: torch.dtype, zipf: bool) -> Iterator[Case]:
    gradient, backward = made(tokens, width, dtype=dtype), torch.ops.aten.embedding_dense_backward
    what = {"V": table, "T": tokens, "H": width, "bytes": dtype.itemsize}
    ids = torch.randint(table, (tokens,), device="cuda")
    yield one("embedding_backward", what | {"ids": "uniform"}, lambda: backward(gradient, ids, table, -1, False))
    if zipf:
        skewed = (table ** torch.rand(tokens, device="cuda")).long().clamp(max=table - 1)
        yield one("embedding_backward", what | {"ids": "zipf"}, lambda: backward(gradient, skewed, table, -1, False))


def routing() -> Iterator[Case]:
    """What routers and permutations do with T tokens, E experts and K choices."""
    for tokens in (4_096, 16_384, 65_536):
        for experts, chosen in ROUTERS:
            scores = torch.rand(tokens, experts, device="cuda")
            ids = torch.topk(scores, chosen, dim=-1)[1]
            flat, marks = ids.reshape(-1), one_hot(ids, experts)
            what = {"T": tokens, "E": experts, "K": chosen}
            yield one("topk_f32", what, lambda s=scores, k=chosen: torch.topk(s, k, dim=-1))
            yield one("sort_flat", what, lambda f=flat: torch.sort(f))
            yield one("bincount", what, lambda f=flat, e=experts: torch.bincount(f, minlength=e))
            yield one("cumsum_TE", what, lambda m=marks: torch.cumsum(m[:, 0], 0))


def rows_by_place() -> Iterator[Case]:
    """Rows of T tokens, K each, of width H, written and added up by their places."""
    for tokens, chosen, width in PERMUTED:
        number = tokens * chosen
        order = torch.randperm(number, device="cuda")
        source = order // chosen
        for dtype in (BF16, F32):
            x, rows = made(tokens, width, dtype=dtype), made(number, width, dtype=dtype)
            wide = source[:, None].expand(number, width)
            what = {"T": tokens, "K": chosen, "H": width, "bytes": dtype.itemsize}
            yield one("index_put_rows", what, lambda r=rows, o=order: r.index_put((o,), r))
            yield one("index_add_", what, lambda x=x, r=rows, o=source: torch.zeros_like(x).index_add_(0, o, r))
            yield one("scatter_add_rows", what, lambda x=x, r=rows, o=wide: torch.zeros_like(x).scatter_add(0, o, r))


def layouts() -> Iterator[Case]:
    """Halves of heads that change places, copies into another order, and scores of unfused attention."""
    for shape in HEADS:
        x, half = made(*shape), shape[-1] // 2
        scores = made(shape[0], 8, shape[2], shape[2])
        what = {"shape": shape}
        yield one("cat_halves", what, lambda x=x, h=half: torch.cat((-x[..., h:], x[..., :h]), -1))
        yield one("neg_half", what, lambda x=x, h=half: -x[..., h:])
        yield one("contiguous_transposed", what, lambda x=x: x.transpose(1, 2).contiguous())
        yield one("softmax_scores", what | {"scores": 8}, lambda s=scores: softmax(s, dim=-1))


def gemms() -> Iterator[Case]:
    """Rows of M tokens, aligned or not."""
    for m, k in GEMMS:
        for n in COLUMNS:
            x, w, y = made(m, k), made(n, k), made(m, n)
            yield (
                {"what": "gemm", "m": m, "k": k, "n": n},
                {
                    "forward": lambda x=x, w=w: x @ w.t(),
                    "dgrad": lambda y=y, w=w: y @ w,
                    "wgrad": lambda y=y, x=x: y.t() @ x,
                },
            )


def dropouts() -> Iterator[Case]:
    """Attention without and with."""
    for shape in ATTENTION:
        for p in (0.0, 0.1):
            q, k, v = (made(*shape).requires_grad_() for _ in range(3))
            plain = [each.detach() for each in (q, k, v)]
            out = attention(q, k, v, is_causal=True, dropout_p=p)
            up = torch.randn_like(out)
            yield (
                {"what": "attention", "shape": shape, "dropout": p},
                {
                    "forward": lambda a=plain, p=p: attention(*a, is_causal=True, dropout_p=p),
                    "backward": lambda o=out, a=(q, k, v), u=up: torch.autograd.grad(o, a, u, retain_graph=True),
                },
            )


def puts() -> Iterator[Case]:
    """Sums into rows, beside reading them and making zeros."""
    for tokens, choices, width in PUTS:
        for dtype in (BF16, F32):
            ids = torch.argsort(torch.randint(64, (tokens * choices,), device="cuda"), stable=True) // choices
            rows, into = made(tokens * choices, width, dtype=dtype), made(tokens, width, dtype=dtype)
            what = {"what": "index_put", "tokens": tokens, "choices": choices, "width": width, "bytes": dtype.itemsize}
            yield (
                what,
                {
                    "put": lambda z=into, i=ids, s=rows: z.index_put_((i,), s, accumulate=True),
                    "select": lambda z=into, i=ids: z[i],
                    "zero": into.zero_,
                },
            )


KINDS = (gemms, dropouts, puts, embeddings, routing, rows_by_place, layouts)


def main() -> None:
    """Measure all, and keep what is done after each kind."""
    path, *chosen = sys.argv[1:]
    rows: list[Row] = []
    for kind in KINDS:
        if chosen and kind.__name__ not in chosen:
            continue
        for what, calls in kind():
            rows.append(what | {name: seconds(call) for name, call in calls.items()})
        found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        Path(path).write_text(json.dumps(found), encoding="utf-8")
        print(kind.__name__, len(rows), flush=True)


if __name__ == "__main__":
    main()
