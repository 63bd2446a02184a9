"""The small kernels of a layer and of the end of a step, as each software runs them, beside products and attention.

A kernel is (kind, rows, width), of the kinds of `moesim.serving.decode_kernels`.

Legend: T tokens of a rank; rows of experts are tokens times experts of a token.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from moesim.scenario import Mla, Model
from moesim.serving.decode_kernels import facts


class Small(NamedTuple):
    """A small kernel."""

    kind: str
    rows: float
    width: float


def num_launches(kernels: Iterable[Small]) -> int:
    """What the host launches for them: some kinds are several kernels."""
    return sum(int(facts()["small"]["kinds"][kernel.kind]["kernels"]) for kernel in kernels)


class Lists(NamedTuple):
    """What a software runs: around attention, in a dense network of a width, around the experts, and at the end.

    greedy: kinds that take the largest of the logits.
    """

    attention: Callable[[Model, int, float], list[Small]]
    network: Callable[[float, int], list[Small]]
    experts: Callable[[Model, float, float, int], list[Small]]
    greedy: tuple[str, ...]


def _widths(model: Model, tensor: int) -> tuple[int, int]:
    """Elements of all queries and of all keys that are rotated on a rank."""
    heads = model.heads // tensor
    if isinstance(model.attention, Mla):
        return heads * model.attention.rope_head_dim, model.attention.rope_head_dim
    return heads * model.head_dim, -(-model.kv_heads // tensor) * model.head_dim


def _fused_attention(model: Model, tensor: int, tokens: float) -> list[Small]:
    """Norm with residual, norms of latents, rotary of queries and keys, writing into the cache."""
    queries, keys = _widths(model, tensor)
    kernels = [Small("rms_norm", tokens, model.hidden), Small("mul", tokens, queries + keys)]
    if isinstance(model.attention, Mla):
        kernels += [Small("rms_norm", tokens, model.attention.kv_lora_rank)]
        if model.attention.q_lora_rank is not None:
            kernels += [Small("rms_norm", tokens, model.attention.q_lora_rank)]
    return [*kernels, Small("copy", tokens, 2 * keys)]


def _fused_network(tokens: float, width: int) -> list[Small]:
    return [Small("mul", tokens, width)]


def _fused_experts(model: Model, tokens: float, rows: float, width: int) -> list[Small]:
    """Norm with residual, top-k in one kernel; what sorts, activates and sums belongs to the experts' own kernels."""
    del rows, width
    return [Small("rms_norm", tokens, model.hidden), Small("softmax", tokens, model.experts)]


def _torch_attention(model: Model, tensor: int, tokens: float) -> list[Small]:
    """Norm, residual, rotary of queries and keys in four kernels each, two copies into the cache."""
    queries, keys = _widths(model, tensor)
    kernels = [Small("rms_norm", tokens, model.hidden), Small("add", tokens, model.hidden)]
    for width in (queries, keys):
        kernels += [Small("mul", tokens, width)] * 2 + [Small("roll", tokens, width), Small("add", tokens, width)]
    if isinstance(model.attention, Mla):
        kernels += [Small("rms_norm", tokens, model.attention.kv_lora_rank)] * 2
    return kernels + [Small("copy", tokens, keys)] * 2


def _torch_network(tokens: float, width: int) -> list[Small]:
    return [Small("silu_mul", tokens, width), Small("add", tokens, width)]


def _torch_experts(model: Model, tokens: float, rows: float, width: int) -> list[Small]:
    """Norm, residual; cast, softmax and top-k; sort, places, rows; activation; gates; rows back and their sum."""
    each = rows / max(model.top_k, 1)
    kernels = [Small("rms_norm", tokens, model.hidden), Small("add", tokens, model.hidden)]
    kernels += [Small("cast", tokens, model.experts), Small("softmax", tokens, model.experts)]
    kernels += [Small("topk", tokens, model.experts), Small("sort", each, model.experts)]
    kernels += [Small("searchsorted", each, model.experts), Small("divide", each, model.experts)]
    kernels += [Small("gather", rows, model.row_width), Small("silu_mul", rows, width)]
    kernels += [Small("mul", rows, 1), Small("cast", rows, 1), Small("mul", rows, model.row_width)]
    kernels += [Small("copy", rows, 1), Small("scatter", each, model.experts), Small("gather", rows, model.row_width)]
    return [*kernels, Small("sum_of_8", each, model.row_width)]


def _transformers_attention(model: Model, tensor: int, tokens: float) -> list[Small]:
    """Norms in eight kernels, of queries and keys, too; rotary of both in five each, residual, writing into pages."""
    queries, keys = _widths(model, tensor)
    kernels = [Small("norm_in_eight", tokens, width) for width in (model.hidden, queries, keys)]
    kernels += [Small("rotary_in_five", tokens, width) for width in (queries, keys)]
    kernels += [Small("add", tokens, model.hidden)] + [Small("copy", tokens, queries)] * 2
    return kernels + [Small("copy", tokens, keys)] * 6


def _transformers_experts(model: Model, tokens: float, rows: float, width: int) -> list[Small]:
    """Norm, residual; softmax, top-k and its sum; sort and counts; rows, masks, activation, gates; rows back, sum."""
    each = rows / max(model.top_k, 1)
    kernels = [Small("norm_in_eight", tokens, model.hidden), Small("add", tokens, model.hidden)]
    kernels += [Small("softmax", tokens, model.experts), Small("topk", tokens, model.experts)]
    kernels += [Small("sum_of_8", tokens, 1), Small("mul", tokens, 1), Small("cast", tokens, 1)]
    kernels += [Small("sort", each, model.experts)] + [Small("mul", rows, 1)] * 6 + [Small("copy", rows, 1)] * 5
    kernels += [Small("gather", rows, model.row_width), Small("mul", rows, model.row_width)]
    kernels += [Small("mul", rows, 2 * width), Small("silu_mul", rows, width)]
    kernels += [Small("mul", rows, model.row_width)] * 2 + [Small("gather", rows, model.row_width)]
    return [*kernels, Small("sum_of_8", each, model.row_width)]


def _compiled_attention(model: Model, tensor: int, tokens: float) -> list[Small]:
    """Norm with residual; rotary, the split of queries, keys and values, and the cache are three kernels."""
    queries, keys = _widths(model, tensor)
    kernels = [Small("rms_norm", tokens, model.hidden), Small("copy", tokens, queries), Small("copy", tokens, keys)]
    if isinstance(model.attention, Mla):
        kernels += [Small("rms_norm", tokens, model.attention.kv_lora_rank)] * 2
    return [*kernels, Small("copy", tokens, queries)]


def _compiled_experts(model: Model, tokens: float, rows: float, width: int) -> list[Small]:
    """Norm with residual; softmax, top-k, sort; rows, activation; places, and rows back with their gates and sum."""
    each = rows / max(model.top_k, 1)
    kernels = [Small("rms_norm", tokens, model.hidden), Small("softmax", tokens, model.experts)]
    kernels += [Small("topk", tokens, model.experts), Small("sort", each, model.experts)]
    kernels += [Small("searchsorted", each, model.experts), Small("copy", rows, model.row_width)]
    kernels += [Small("mul", rows, width), Small("copy", rows, 1), Small("copy", rows, 1)]
    return [*kernels, Small("scatter", each, model.experts), Small("sum_of_8", each, model.row_width)]


_FLOAT = ("cast_wide", "softmax_wide", "argmax_wide")
LISTS: Mapping[str, Lists] = {
    "fused": Lists(_fused_attention, _fused_network, _fused_experts, ("greedy",)),
    "compiled": Lists(_compiled_attention, _fused_network, _compiled_experts, _FLOAT),
    "torch": Lists(_torch_attention, _torch_network, _torch_experts, _FLOAT),
    "transformers": Lists(_transformers_attention, _torch_network, _transformers_experts, _FLOAT),
}


def end_kernels(model: Model, tensor: int, tokens: float, kinds: tuple[str, ...]) -> list[Small]:
    """The last norm, and what makes tokens of logits."""
    return [Small("rms_norm", tokens, model.hidden), *(Small(kind, tokens, model.vocab // tensor) for kind in kinds)]
