"""Decoding steps of plain torch layers on a GPU, captured as CUDA graphs, for docs/serving.md.

    python tools/measure_decode.py OUT.json [--seconds 200]

Each case is a few layers of a published architecture with random weights: one token of each of B requests with C stored
keys. `steps`: seconds of a step; `attention`: seconds of `scaled_dot_product_attention` alone; `gemm`, `grouped`: of
products of few rows. Needs torch and a GPU; nothing of moesim.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

MODELS: dict[str, dict[str, int]] = {  # layers are those measured, not all of the model
    "qwen3-30b-a3b": {
        "layers": 6, "hidden": 2048, "heads": 32, "kv_heads": 4, "head_dim": 128, "experts": 128, "top_k": 8,
        "width": 768, "shared": 0, "vocab": 151936,
    },
    "mixtral-8x7b": {
        "layers": 4, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "experts": 8, "top_k": 2,
        "width": 14336, "shared": 0, "vocab": 32000,
    },
    "deepseek-moe-16b": {
        "layers": 6, "hidden": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128, "experts": 64, "top_k": 6,
        "width": 1408, "shared": 2816, "vocab": 102400,
    },
}  # fmt: skip
BATCHES, KEYS = (1, 4, 16, 64, 256), (512, 4096)
MOST_CACHE = 24e9  # bytes
REPEATS = 30


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


def graph_seconds(run: Callable[[], Any]) -> float:
    """Median seconds of a call replayed as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(5):
        graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3


def main() -> None:
    """Measure until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=200.0)
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "models": MODELS}
    found |= {"steps": [], "attention": [], "gemm": [], "grouped": []}
    with torch.inference_mode():
        for part in (steps, attention, products):
            part(found, end)
            arguments.out.write_text(json.dumps(found))


def steps(found: dict[str, Any], end: float) -> None:
    """Whole steps: the layers, the last norm and the head."""
    for name, m in MODELS.items():
        for batch in BATCHES:
            for keys in KEYS:
                cache = 4 * m["layers"] * batch * keys * m["kv_heads"] * m["head_dim"]
                if cache > MOST_CACHE or time.monotonic() > end - 40:
                    continue
                layers = [Layer(m, batch, keys) for _ in range(m["layers"])]
                head, x = weights(m["vocab"], m["hidden"]), weights(batch, m["hidden"])

                def run(layers: list[Layer] = layers, head: torch.Tensor = head, x: torch.Tensor = x) -> torch.Tensor:
                    for layer in layers:
                        x = layer(x)
                    return functional.linear(x, head).float().softmax(-1).argmax(-1)

                seconds = graph_seconds(run)
                found["steps"].append({"model": name, "batch": batch, "keys": keys, "seconds": seconds})
                print(name, batch, keys, f"{seconds * 1e3:.3f} ms", file=sys.stderr, flush=True)
                del layers, head, x, run
                gc.collect()
                torch.cuda.empty_cache()


def attention(found: dict[str, Any], end: float) -> None:
    """Attention of one token to stored keys, alone, over caches that no L2 holds."""
    for heads, kv in ((32, 4), (32, 8), (16, 16)):
        for batch in (1, 8, 64, 256):
            for keys in (512, 2048, 8192):
                size = 4 * batch * keys * kv * 128
                if size > MOST_CACHE or time.monotonic() > end - 25:
                    continue
                copies = max(1, min(8, int(2e8 // size)))
                caches = [(weights(batch, kv, keys, 128), weights(batch, kv, keys, 128)) for _ in range(copies)]
                q = weights(batch, heads, 1, 128)

                def run(q: torch.Tensor = q, caches: Any = caches, grouped: bool = heads != kv) -> None:
                    for k, v in caches:
                        functional.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

                row = {"heads": heads, "kv_heads": kv, "head_dim": 128, "batch": batch, "keys": keys}
                found["attention"].append(row | {"seconds": graph_seconds(run) / copies})
                del caches, q, run
                torch.cuda.empty_cache()


def products(found: dict[str, Any], end: float) -> None:
    """Dense and grouped products of few rows; weights rotate so that no L2 holds them."""
    for k, n in ((2048, 5120), (4096, 6144), (4096, 4096), (7168, 2112), (2048, 151936)):
        copies = max(1, min(16, int(2e8 // (2 * k * n))))
        matrices = [weights(n, k) for _ in range(copies)]
        for m in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            x = weights(m, k)

            def run(x: torch.Tensor = x, matrices: Any = matrices) -> None:
                for matrix in matrices:
                    functional.linear(x, matrix)

            if time.monotonic() < end - 15:
                found["gemm"].append({"m": m, "k": k, "n": n, "seconds": graph_seconds(run) / copies})
        del matrices
        torch.cuda.empty_cache()
    generator = torch.Generator().manual_seed(0)
    for experts, k, n in ((128, 2048, 1536), (64, 2048, 2816), (8, 4096, 28672), (32, 7168, 4096)):
        stacks = [weights(experts, k, n) for _ in range(2)]
        for rows in (8, 32, 128, 512, 2048):
            counts = torch.bincount(torch.randint(experts, (rows,), generator=generator), minlength=experts)
            ends = counts.cumsum(0).to(torch.int32).cuda()
            x = weights(rows, k)

            def run(x: torch.Tensor = x, ends: torch.Tensor = ends, stacks: Any = stacks) -> None:
                for stack in stacks:
                    functional.grouped_mm(x, stack, offs=ends)

            if time.monotonic() < end - 5:
                row = {"rows_per_expert": counts.tolist(), "k": k, "n": n}
                found["grouped"].append(row | {"seconds": graph_seconds(run) / len(stacks)})
        del stacks
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
