"""Kernels beside their plain sisters, on the GPU at hand: for the ratios of moesim/kernels/unprofiled.py.

    python tools/measure_odd_kernels.py FILE.json

Products whose rows begin at no multiple of 16 bytes, attention with dropout, and sums into rows by `index_put`, as the
backward pass of `x[ids]` runs it. Seconds of one, by CUDA events, least of three rows of twelve. Needs torch alone.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention as attention

BF16 = torch.bfloat16


def seconds(run: Callable[[], object], count: int = 12) -> float:
    """Of one run, behind three of warm-up."""
    for _ in range(3):
        run()
    best = float("inf")
    for _ in range(3):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(count):
            run()
        last.record()
        torch.cuda.synchronize()
        best = min(best, first.elapsed_time(last) / count / 1e3)
    return best


def made(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Random numbers on the GPU."""
    return torch.randn(*shape, device="cuda").to(dtype)


def main() -> None:
    """Measure all, write once."""
    found: list[dict[str, object]] = []
    for m, k in ((4096, 2048), (8192, 1600), (8192, 4096), (16384, 2048)):
        for n in (50257, 50258, 50260, 50264, 32001, 32002, 32004, 32008, 10007, 10008):
            x, w, y = made(m, k), made(n, k), made(m, n)
            row = {"what": "gemm", "m": m, "k": k, "n": n, "forward": seconds(lambda x=x, w=w: x @ w.t())}
            row |= {"dgrad": seconds(lambda y=y, w=w: y @ w), "wgrad": seconds(lambda y=y, x=x: y.t() @ x)}
            found.append(row)
    for shape in ((8, 25, 1024, 64), (8, 16, 2048, 128), (4, 32, 2048, 64), (2, 32, 4096, 128), (1, 16, 8192, 64)):
        for p in (0.0, 0.1):
            q, k, v = (made(*shape).requires_grad_() for _ in range(3))
            plain = [each.detach() for each in (q, k, v)]
            out = attention(q, k, v, is_causal=True, dropout_p=p)
            up = torch.randn_like(out)
            row = {"what": "attention", "shape": shape, "dropout": p}
            row["forward"] = seconds(lambda a=plain, p=p: attention(*a, is_causal=True, dropout_p=p))
            row["backward"] = seconds(lambda o=out, a=(q, k, v), u=up: torch.autograd.grad(o, a, u, retain_graph=True))
            found.append(row)
    sizes = ((4096, 8, 2048), (8192, 8, 1024), (16384, 8, 2048), (8192, 2, 4096), (8192, 6, 2048), (32768, 8, 1024))
    for tokens, choices, width in sizes:
        for dtype in (BF16, torch.float32):
            ids = torch.argsort(torch.randint(64, (tokens * choices,), device="cuda"), stable=True) // choices
            rows, into = made(tokens * choices, width, dtype=dtype), made(tokens, width, dtype=dtype)
            row = {"what": "index_put", "tokens": tokens, "choices": choices, "width": width, "bytes": dtype.itemsize}
            row["put"] = seconds(lambda z=into, i=ids, s=rows: z.index_put_((i,), s, accumulate=True))
            row["select"] = seconds(lambda z=into, i=ids: z[i])
            row["zero"] = seconds(into.zero_)
            found.append(row)
    Path(sys.argv[1]).write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": found}))


if __name__ == "__main__":
    main()
