"""The calls that are timed for kernels limited by memory, one per kind of `moesim.kernels.families`.

Legend: R rows, W row width, T tokens (R / 8 where rows are gathered from tokens).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from moesim.kernels.benchmarks.buffers import Pool, Rotation, keep_outputs
from moesim.kernels.benchmarks.kernels import Prepared
from moesim.kernels.benchmarks.later_shapes import Shape

_TOP_K = 8
_VOCABULARY = 50304
_EXPERTS = 64
Maker = Callable[[Pool, int, int], Callable[[], Any]]


def _ids(pool: Pool, count: int, below: int) -> torch.Tensor:
    return torch.randint(below, (count,), device=pool.device)


def _gradient_of(pool: Pool, out: torch.Tensor, leaves: list[torch.Tensor]) -> Callable[[], Any]:
    gradient = pool.take(*out.shape, dtype=out.dtype) if out.dim() else torch.ones_like(out)
    return lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True)


def _leaf(pool: Pool, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return pool.take(*shape, dtype=dtype).detach().requires_grad_()


def _copy(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x, y = pool.take(rows, width), torch.empty(rows, width, dtype=torch.bfloat16, device=pool.device)
    return lambda: y.copy_(x)


def _zero(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    return lambda: torch.zeros(rows, width, dtype=torch.bfloat16, device=pool.device)


def _add(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x, y = pool.take(rows, width), pool.take(rows, width)
    return lambda: x + y


def _mul(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x, gate = pool.take(rows, width), pool.take(rows, 1)
    return lambda: x * gate


def _mul_backward(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x, gate = _leaf(pool, rows, width), _leaf(pool, rows, 1)
    return _gradient_of(pool, x * gate, [x, gate])


def _cast(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x = pool.take(rows, width)
    return lambda: x.float()


def _quantise(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x = pool.take(rows, width)
    return lambda: x.to(torch.float8_e4m3fn)


def _reduce(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x = pool.take(rows, width)
    return lambda: x.sum(-1)


def _rms_norm(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x, weight = _leaf(pool, rows, width), _leaf(pool, width)
    return lambda: F.rms_norm(x, (width,), weight)


def _rms_norm_backward(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x, weight = _leaf(pool, rows, width), _leaf(pool, width)
    return _gradient_of(pool, F.rms_norm(x, (width,), weight), [x, weight])


def _tokens(rows: int) -> int:
    return max(1, rows // _TOP_K)


def _permute(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x, ids = pool.take(_tokens(rows), width), _ids(pool, rows, _tokens(rows))
    return lambda: x.index_select(0, ids)


def _unpermute(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    source, ids = pool.take(rows, width), _ids(pool, rows, _tokens(rows))
    out = torch.zeros(_tokens(rows), width, dtype=torch.bfloat16, device=pool.device)
    return lambda: out.index_add_(0, ids, source)


def _permute_backward(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    source, ids = pool.take(rows, width), _ids(pool, rows, _tokens(rows))
    like = pool.take(_tokens(rows), width)
    return lambda: torch.zeros_like(like).index_add_(0, ids, source)


def _index_put(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x, ids = _leaf(pool, _tokens(rows), width), _ids(pool, rows, _tokens(rows))
    return _gradient_of(pool, x[ids], [x])


def _silu(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x = pool.take(rows, width)
    return lambda: F.silu(x)


def _silu_backward(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x = _leaf(pool, rows, width)
    return _gradient_of(pool, F.silu(x), [x])


def _gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def _activation(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x = pool.take(rows, 2 * width)
    return lambda: _gated(x)


def _activation_backward(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x = _leaf(pool, rows, 2 * width)
    return _gradient_of(pool, _gated(x), [x])


def _softmax(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x = pool.take(rows, width, dtype=torch.float32)
    return lambda: x.softmax(-1)


def _softmax_backward(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x = _leaf(pool, rows, width, dtype=torch.float32)
    return _gradient_of(pool, x.softmax(-1), [x])


def _topk(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    x = pool.take(rows, width, dtype=torch.float32)
    return lambda: x.topk(min(_TOP_K, width), dim=-1)


def _sort(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    ids = _ids(pool, rows, _EXPERTS)
    return lambda: ids.argsort(stable=True)


def _histogram(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    ids, ones = _ids(pool, rows, _EXPERTS), torch.ones(rows, dtype=torch.int64, device=pool.device)
    counts = torch.zeros(_EXPERTS, dtype=torch.int64, device=pool.device)
    return lambda: counts.scatter_add_(0, ids, ones)


def _cross_entropy(dtype: torch.dtype) -> Maker:
    def make(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
        logits, targets = pool.take(rows, width, dtype=dtype), _ids(pool, rows, width)
        return lambda: F.cross_entropy(logits, targets)

    return make


def _cross_entropy_backward(dtype: torch.dtype) -> Maker:
    def make(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
        logits, targets = _leaf(pool, rows, width, dtype=dtype), _ids(pool, rows, width)
        return _gradient_of(pool, F.cross_entropy(logits, targets), [logits])

    return make


def _vocabulary(pool: Pool, width: int) -> int:
    """Rows of an embedding table: a vocabulary, or what a small pool (of a CPU) holds."""
    return max(1, min(_VOCABULARY, pool.capacity // width))


def _embedding(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    vocabulary = _vocabulary(pool, width)
    table, ids = pool.take(vocabulary, width), _ids(pool, rows, vocabulary)
    return lambda: F.embedding(ids, table)


def _embedding_backward(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
    vocabulary = _vocabulary(pool, width)
    table, ids = _leaf(pool, vocabulary, width), _ids(pool, rows, vocabulary)
    return _gradient_of(pool, F.embedding(ids, table), [table])


def _optimizer(dtype: torch.dtype) -> Maker:
    def make(pool: Pool, rows: int, width: int) -> Callable[[], Any]:
        sizes = [rows // 4] * 4 if rows >= 4096 else [rows]  # a few tensors, as a model's stacked experts are
        params = [torch.nn.Parameter(pool.take(size, dtype=dtype).clone()) for size in sizes]
        for param in params:
            param.grad = pool.take(param.numel(), dtype=dtype)
        optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
        optimizer.step()  # the first one makes the states, which takes longer than a small step
        return optimizer.step

    return make


_MAKERS: dict[str, Maker] = {
    "copy": _copy,
    "elementwise": _add,
    "mul": _mul,
    "mul_backward": _mul_backward,
    "zero": _zero,
    "cast": _cast,
    "reduce": _reduce,
    "rms_norm": _rms_norm,
    "rms_norm_backward": _rms_norm_backward,
    "permute": _permute,
    "permute_backward": _permute_backward,
    "unpermute": _unpermute,
    "unpermute_backward": _permute,
    "index_put": _index_put,
    "silu": _silu,
    "silu_backward": _silu_backward,
    "activation": _activation,
    "activation_backward": _activation_backward,
    "softmax": _softmax,
    "softmax_backward": _softmax_backward,
    "topk": _topk,
    "sort": _sort,
    "histogram": _histogram,
    "cross_entropy": _cross_entropy(torch.bfloat16),
    "cross_entropy_backward": _cross_entropy_backward(torch.bfloat16),
    "cross_entropy_fp32": _cross_entropy(torch.float32),
    "cross_entropy_fp32_backward": _cross_entropy_backward(torch.float32),
    "quantise": _quantise,
    "embedding": _embedding,
    "embedding_backward": _embedding_backward,
    "optimizer_bf16": _optimizer(torch.bfloat16),
    "optimizer_fp32": _optimizer(torch.float32),
}


def prepare_memory_bound(shape: Shape, pool: Pool, beyond: float) -> Prepared:
    """The call of one kind over rotated operands."""
    kind, rows, width = shape["kind"], shape["rows"], shape["width"]
    make, moved = _MAKERS[kind], float(shape["bytes"])
    if kind == "embedding_backward":  # a whole table is written, whatever few rows are added to it
        moved += 2.0 * _vocabulary(pool, width) * width
    calls = Rotation(lambda: make(pool, rows, width), bytes_per_call=moved, beyond=beyond)
    return keep_outputs(lambda index: calls(index)(), sets=len(calls)), {}
