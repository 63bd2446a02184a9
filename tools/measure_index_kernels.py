"""Kernels of indices and layouts by themselves, on the GPU at hand: for the prices of moesim/kernels/unprofiled.py.

    python tools/measure_index_kernels.py FILE.json

Gradients of embeddings, top-k, sorts, counts, running sums, writes and sums of rows by place, and copies into another
order. Seconds of one, by CUDA events, least of three rows of ten, with the host ahead. Needs torch alone.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from measure_odd_kernels import BF16, made
from torch.nn.functional import one_hot, softmax

F32 = torch.float32
Row = dict[str, Any]
Case = tuple[str, Callable[[], object], Row]

AHEAD_CYCLES = int(2e6)  # that the GPU sleeps while the host launches a row
TABLES = (32_000, 50_304, 151_936)
TOKENS = (2_048, 8_192, 32_768)
LARGE_TABLES = ((16_384, 2_048, 200_064), (16_384, 7_168, 129_280), (65_536, 2_048, 100_352))
ROUTERS = ((8, 2), (64, 6), (64, 8), (128, 8), (256, 8))
PERMUTED = ((4_096, 8, 2_048), (16_384, 8, 2_048), (8_192, 2, 4_096), (16_384, 6, 2_048))
HEADS = ((2, 32, 4_096, 128), (2, 64, 2_048, 64))


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
    yield "embedding_backward", lambda: backward(gradient, ids, table, -1, False), what | {"ids": "uniform"}
    if zipf:
        skewed = (table ** torch.rand(tokens, device="cuda")).long().clamp(max=table - 1)
        yield "embedding_backward", lambda: backward(gradient, skewed, table, -1, False), what | {"ids": "zipf"}


def routing() -> Iterator[Case]:
    """What routers and permutations do with T tokens, E experts and K choices."""
    for tokens in (4_096, 16_384, 65_536):
        for experts, chosen in ROUTERS:
            scores = torch.rand(tokens, experts, device="cuda")
            ids = torch.topk(scores, chosen, dim=-1)[1]
            flat, marks = ids.reshape(-1), one_hot(ids, experts)
            what = {"T": tokens, "E": experts, "K": chosen}
            yield "topk_f32", lambda s=scores, k=chosen: torch.topk(s, k, dim=-1), what
            yield "sort_flat", lambda f=flat: torch.sort(f), what
            yield "bincount", lambda f=flat, e=experts: torch.bincount(f, minlength=e), what
            yield "cumsum_TE", lambda m=marks: torch.cumsum(m[:, 0], 0), what


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
            yield "index_put_rows", lambda r=rows, o=order: r.index_put((o,), r), what
            yield "index_add_", lambda x=x, r=rows, o=source: torch.zeros_like(x).index_add_(0, o, r), what
            yield "scatter_add_rows", lambda x=x, r=rows, o=wide: torch.zeros_like(x).scatter_add(0, o, r), what


def layouts() -> Iterator[Case]:
    """Halves of heads that change places, copies into another order, and scores of unfused attention."""
    for shape in HEADS:
        x, half = made(*shape), shape[-1] // 2
        scores = made(shape[0], 8, shape[2], shape[2])
        what = {"shape": shape}
        yield "cat_halves", lambda x=x, h=half: torch.cat((-x[..., h:], x[..., :h]), -1), what
        yield "neg_half", lambda x=x, h=half: -x[..., h:], what
        yield "contiguous_transposed", lambda x=x: x.transpose(1, 2).contiguous(), what
        yield "softmax_scores", lambda s=scores: softmax(s, dim=-1), what | {"scores": 8}


def main(path: Path) -> None:
    """Measure all, and keep what is done after each kind."""
    rows: list[Row] = []
    for kind in (embeddings, routing, rows_by_place, layouts):
        for name, run, what in kind():
            rows.append({"what": name, **what, "s": seconds(run)})
        found = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        path.write_text(json.dumps(found), encoding="utf-8")
        print(kind.__name__, len(rows), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
