"""Attention in eager PyTorch: grouped queries and latent attention, as `moesim.moe.attention` computes them."""

from typing import Any

from moesim.scenario.model import Mla
from moesim.sim.eager_kernels import BF16, FP32, branch, copied, linear, many, norm, residual, small, sum_of
from moesim.sim.sizes import Passes, Step, chain
from moesim.sim.writer import KernelWriter


def _rotary(w: KernelWriter, name: str, tokens: int, sequence: int, width: int, head_dim: int) -> Passes:
    """Rotary embedding of `width` numbers per token in halves: 4 products, difference, sum, concatenation."""
    half = BF16 * tokens * width / 2
    table = FP32 * sequence * head_dim / 2
    forward = [
        small(w, f"{name}.frequencies", 5),
        many(w, f"{name}.angles", "elementwise", bytes_=2 * table, count=5),
        many(w, f"{name}.products", "mul", bytes_=2 * half, count=4),
        many(w, f"{name}.sums", "elementwise", bytes_=3 * half, count=2),
        many(w, f"{name}.cat", "copy", bytes_=4 * half),
    ]
    backward = [
        many(w, f"{name}.products.backward", "mul", bytes_=2 * half, count=5, launches=7),  # and one negation
        many(w, f"{name}.sums.backward", "elementwise", bytes_=3 * half, count=2, launches=0),
        many(w, f"{name}.split.backward", "copy", bytes_=4 * half),
    ]
    return forward, backward


def _repeated(w: KernelWriter, name: str, tokens: int, narrow: int, wide: int) -> Passes:
    """`narrow` numbers per token repeated to `wide`; the gradients of the copies are summed."""
    moved = float(BF16 * tokens * (narrow + wide))
    return [many(w, name, "copy", bytes_=moved)], [many(w, f"{name}.backward", "reduce", bytes_=moved)]


def _attend(w: KernelWriter, step: Step, *, head_dim: int, value_dim: int) -> Passes:
    heads = step.model.heads
    sizes: dict[str, Any] = {"heads": heads, "kv_heads": heads, "head_dim": head_dim, "value_dim": value_dim}
    sizes |= {"batch": step.batch, "sequence": step.sequence}
    return [w.attention("attention", **sizes)], [w.attention("attention.backward", direction="backward", **sizes)]


def _grouped_query(w: KernelWriter, step: Step) -> Passes:
    model, tokens = step.model, step.tokens
    d, h = model.head_dim, model.hidden
    wide, narrow = model.heads * d, model.kv_heads * d
    parts = [
        linear(w, "q", m=tokens, k=h, n=wide),
        ([], [sum_of(w, "qk.backward", tokens, h)]),
        _rotary(w, "q.rotary", tokens, step.sequence, wide, d),
        linear(w, "k", m=tokens, k=h, n=narrow),
        ([], [sum_of(w, "kv.backward", tokens, h)]),
        _rotary(w, "k.rotary", tokens, step.sequence, narrow, d),
        linear(w, "v", m=tokens, k=h, n=narrow),
    ]
    if narrow != wide:
        parts += [_repeated(w, "k.repeat", tokens, narrow, wide), _repeated(w, "v.repeat", tokens, narrow, wide)]
    parts += [
        _attend(w, step, head_dim=d, value_dim=d),
        copied(w, "merge", tokens * wide, backward=False),
        linear(w, "attention_out", m=tokens, k=wide, n=h),
    ]
    return chain(*parts)


def _latent(w: KernelWriter, step: Step, mla: Mla) -> Passes:
    model, tokens = step.model, step.tokens
    d, h, heads, rope = model.head_dim, model.hidden, model.heads, mla.rope_head_dim
    value = mla.value_head_dim or d
    query_rank = mla.q_lora_rank or h
    wide = heads * (d + rope)
    return chain(
        linear(w, "q_down", m=tokens, k=h, n=query_rank),
        ([], [sum_of(w, "q_kv.backward", tokens, h)]),
        norm(w, "q_norm", tokens, query_rank),
        linear(w, "q_up", m=tokens, k=query_rank, n=wide),
        linear(w, "kv_down", m=tokens, k=h, n=mla.kv_lora_rank + rope),
        copied(w, "latent", tokens * mla.kv_lora_rank),
        norm(w, "kv_norm", tokens, mla.kv_lora_rank),
        linear(w, "kv_up", m=tokens, k=mla.kv_lora_rank, n=heads * (d + value)),
        _rotary(w, "k.rotary", tokens, step.sequence, rope, rope),
        _rotary(w, "q.rotary", tokens, step.sequence, heads * rope, rope),
        copied(w, "q.cat", tokens * wide),
        copied(w, "k.cat", tokens * wide),
        _attend(w, step, head_dim=d + rope, value_dim=value),
        copied(w, "merge", tokens * heads * value, backward=False),
        linear(w, "attention_out", m=tokens, k=heads * value, n=h),
    )


def attention_part(w: KernelWriter, step: Step) -> Passes:
    """Norm, projections, rotary embedding, attention, output projection and residual sum."""
    mla = step.model.attention
    return chain(
        branch(w, "attention.branch", step),
        norm(w, "attention_norm", step.tokens, step.model.hidden),
        _latent(w, step, mla) if isinstance(mla, Mla) else _grouped_query(w, step),
        residual(w, "attention.residual", step),
    )
