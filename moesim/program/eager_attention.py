"""Attention in eager PyTorch: grouped queries and latent attention, as `moesim.routing.attention` computes them."""

from typing import Any

from moesim.program.eager_host import backward, forward
from moesim.program.eager_kernels import (
    BF16,
    FP32,
    accumulated,
    branch,
    copied,
    issued,
    moved,
    norm,
    product,
    reordered,
    residual,
    small,
)
from moesim.program.sizes import Passes, Step, chain
from moesim.program.writer import KernelWriter
from moesim.results.spans import Part
from moesim.scenario.model import Mla

FOUR_DIMENSIONS = 1.5  # an unvectorised product over four strided dimensions, relative to one number per row


def _rotary(w: KernelWriter, name: str, tokens: int, sequence: int, width: int, head_dim: int) -> Passes:
    """Rotary embedding of `width` numbers per token in halves: 4 products, difference, sum, concatenation.

    Backward their gradients, and a copy from the order of heads to that of tokens.
    """
    half = BF16 * tokens * width / 2
    table = FP32 * sequence * head_dim / 2

    def products(writer: KernelWriter, count: int, launches: float) -> list[Any]:
        bytes_ = FOUR_DIMENSIONS * 2 * half
        return [moved(writer, f"{name}.products", "mul", launches, bytes_=bytes_)] * count

    def sums(writer: KernelWriter, launches: float) -> list[Any]:
        return [moved(writer, f"{name}.sums", "elementwise", launches, bytes_=3 * half)] * 2

    ahead = [
        small(w, f"{name}.frequencies", forward(*["plain"] * 5), count=5),
        *[moved(w, f"{name}.angles", "cast", forward("plain"), bytes_=2 * table)] * 5,
        *products(w, 4, forward("mul")),
        *sums(w, forward("sum")),
        moved(w, f"{name}.cat", "copy", forward("chunk", "cat"), bytes_=4 * half),
    ]
    back = [
        *products(w.backward, 5, backward("mul")),  # one of them the negation
        *sums(w.backward, backward("accumulate")),
        moved(w.backward, f"{name}.split", "copy", backward("chunk", "sum", "sum"), bytes_=4 * half),
        reordered(w.backward, f"{name}.heads", backward("view", "view", "cast"), numbers=tokens * width),
    ]
    return ahead, back


def _repeated(w: KernelWriter, name: str, tokens: int, narrow: int, wide: int) -> Passes:
    """`narrow` numbers per token repeated to `wide`; the gradients of the copies are summed."""
    bytes_ = float(BF16 * tokens * (narrow + wide))
    return (
        [reordered(w, name, forward("view", "view", "cat"), numbers=tokens * wide)],
        [moved(w.backward, name, "reduce", backward("reduce", "view", "view"), bytes_=bytes_)],
    )


def _attend(w: KernelWriter, step: Step, *, head_dim: int, value_dim: int) -> Passes:
    heads = step.model.heads
    sizes: dict[str, Any] = {"heads": heads, "kv_heads": heads, "head_dim": head_dim, "value_dim": value_dim}
    sizes |= {"batch": step.batch, "sequence": step.sequence}
    back = w.attention("attention", direction="backward", **sizes)
    return [issued(w.attention("attention", **sizes), forward("attention"))], [issued(back, backward("attention"))]


def _grouped_query(w: KernelWriter, step: Step) -> Passes:
    model, tokens = step.model, step.tokens
    d, h = model.head_dim, model.hidden
    wide, narrow = model.heads * d, model.kv_heads * d
    parts = [
        product(w, "q", m=tokens, k=h, n=wide),
        accumulated(w, "q.branch", tokens, h),
        _rotary(w, "q.rotary", tokens, step.sequence, wide, d),
        product(w, "k", m=tokens, k=h, n=narrow),
        accumulated(w, "k.branch", tokens, h),
        _rotary(w, "k.rotary", tokens, step.sequence, narrow, d),
        product(w, "v", m=tokens, k=h, n=narrow),
    ]
    if narrow != wide:
        parts += [_repeated(w, "k.repeat", tokens, narrow, wide), _repeated(w, "v.repeat", tokens, narrow, wide)]
    parts += [
        _attend(w, step, head_dim=d, value_dim=d),
        copied(w, "merge", tokens * wide, both=False),
        product(w, "attention_out", m=tokens, k=wide, n=h),
    ]
    return chain(*parts)


def _latent(w: KernelWriter, step: Step, mla: Mla) -> Passes:
    model, tokens = step.model, step.tokens
    d, h, heads, rope = model.head_dim, model.hidden, model.heads, mla.rope_head_dim
    value = mla.value_head_dim or d
    query_rank = mla.q_lora_rank or h
    wide = heads * (d + rope)
    return chain(
        product(w, "q_down", m=tokens, k=h, n=query_rank),
        accumulated(w, "q_down.branch", tokens, h),
        norm(w, "q_norm", tokens, query_rank),
        product(w, "q_up", m=tokens, k=query_rank, n=wide),
        product(w, "kv_down", m=tokens, k=h, n=mla.kv_lora_rank + rope),
        copied(w, "latent", tokens * mla.kv_lora_rank),
        norm(w, "kv_norm", tokens, mla.kv_lora_rank),
        product(w, "kv_up", m=tokens, k=mla.kv_lora_rank, n=heads * (d + value)),
        _rotary(w, "k.rotary", tokens, step.sequence, rope, rope),
        _rotary(w, "q.rotary", tokens, step.sequence, heads * rope, rope),
        copied(w, "q.cat", tokens * wide),
        copied(w, "k.cat", tokens * wide),
        _attend(w, step, head_dim=d + rope, value_dim=value),
        copied(w, "merge", tokens * heads * value, both=False),
        product(w, "attention_out", m=tokens, k=heads * value, n=h),
    )


def attention_part(w: KernelWriter, step: Step) -> Passes:
    """Norm, projections, rotary embedding, attention, output projection and residual sum."""
    mla = step.model.attention
    return chain(
        branch(w.at(Part.RESIDUAL), "attention.branch", step),
        norm(w, "attention_norm", step.tokens, step.model.hidden),
        _latent(w, step, mla) if isinstance(mla, Mla) else _grouped_query(w, step),
        residual(w.at(Part.RESIDUAL), "attention.residual", step),
    )
