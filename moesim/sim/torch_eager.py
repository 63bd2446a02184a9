"""`implementation: {kind: torch_eager}`: plain eager PyTorch, operation by operation.

It describes the software of `moesim.moe.sharded_model` and `moesim.moe.expert_parallel`, which `moesim validate` runs.
Everything is on one stream and in order: nothing overlaps. Each operation costs the host a launch (forward, or one
autograd node), so that short kernels wait for it. bf16 weights, gradients and activations; fused AdamW, states in the
dtype that the scenario names.

One micro-batch, forward (T tokens, K selections, R = T K rows that leave, I rows that arrive):
    embedding   lookup
  every layer
    attention   RMS norm; q, k, v products; rotary embedding of q and k, each an angle table, four products, a
                difference, a sum and a concatenation; k and v repeated for grouped queries; fused attention; copy to
                token order; output product; residual sum.
                MLA: q and kv down, norm, up; rotary of q and of one key; concatenations of both
    dense FFN   RMS norm; W1/W3 product; silu and product; W2; residual sum
  every MoE layer
    router      RMS norm; gate product; to fp32; softmax (or sigmoid, + bias); top-k; gather
    permute     ones and scatter-add counts; stable argsort of R ids; token of each row; gather of R rows
    dispatch    all-to-all of the counts; sums; read-back on the host; all-to-all of the rows, one per (token, expert)
    permute     local expert of each arrived row; stable argsort; inverse order; offsets; gather of I rows
    experts     grouped W1/W3; silu and product; grouped W2
    permute     gather of I rows back into the order of arrival
    combine     all-to-all back; gate of each row; zeros; scaling; index-add of R rows into T tokens
    shared      W1/W3; silu and product; W2; sum with the routed part
                residual sum
    head        RMS norm; product over the vocabulary; to fp32; cross entropy
Backward: each of these in the opposite order, gathers as index-adds into zeros, index-adds as gathers, two products
for one, and a sum wherever a tensor was used more than once. Further micro-batches add to the gradients. With one
expert-parallel rank there is no exchange, no read-back and no second sort. Dense gradients are copied into one flat
buffer, summed by one all-reduce after the last backward pass, and copied back; those of experts likewise where they
have replicas.

Legend: see `moesim.sim.loads`.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.compute import KernelModel
from moesim.compute.memory_kinds import memory_bytes
from moesim.scenario.model import Mla
from moesim.sim.executor import HostModel
from moesim.sim.loads import LayerLoads
from moesim.sim.operations import Operation, compute, readback, transfer
from moesim.sim.sizes import Passes, Step, chain
from moesim.sim.writer import KernelWriter

BF16, FP32, INT64 = 2, 4, 8  # bytes
SMALL = 4096.0  # bytes of a kernel on a few numbers: it takes the floor
SIGMOID_ROUTERS = ("deepseek_v3",)


def host_model(kernels: KernelModel) -> HostModel:
    """The host issues every operation, and waits at read-backs."""
    return HostModel(
        forward_launch=kernels.launch_seconds,
        backward_launch=kernels.backward_launch_seconds,
        readback=kernels.readback_seconds,
    )


def _many(
    w: KernelWriter, name: str, kind: str, *, bytes_: ArrayLike, count: int = 1, launches: int | None = None
) -> Operation:
    """`count` kernels of one kind, each over `bytes_`; one launch each unless said otherwise."""
    estimate = w.model.memory_bound(kind=kind, bytes=bytes_)
    seconds = np.asarray(estimate.seconds) * count
    return compute(
        name,
        w.category,
        seconds,
        layer=w.layer,
        source=estimate.source,
        chain=w.chain,
        launches=count if launches is None else launches,
    )


def _small(w: KernelWriter, name: str, count: int) -> Operation:
    return _many(w, name, "elementwise", bytes_=SMALL, count=count)


def _sum(w: KernelWriter, name: str, tokens: int, width: int) -> Operation:
    """A bf16 sum of two tensors."""
    return _many(w, name, "elementwise", bytes_=3.0 * BF16 * tokens * width)


def _norm(w: KernelWriter, name: str, tokens: int, width: int) -> Passes:
    return (
        [w.memory(name, "rms_norm", rows=tokens, width=width)],
        [w.memory(f"{name}.backward", "rms_norm_backward", rows=tokens, width=width)],
    )


def _linear(w: KernelWriter, name: str, *, m: int, k: int, n: int) -> Passes:
    return [w.gemm(name, m=m, k=k, n=n)], w.gemm_backward(name, m=m, k=k, n=n)


def _residual(w: KernelWriter, name: str, step: Step) -> Passes:
    """The sum of a branch with its input; backward the gradient goes both ways, and meets again in `_branch`."""
    return [_sum(w, name, step.tokens, step.model.hidden)], []


def _branch(w: KernelWriter, name: str, step: Step) -> Passes:
    """Where a branch leaves the residual: backward its gradient is added to that of the way around it."""
    return [], [_sum(w, f"{name}.backward", step.tokens, step.model.hidden)]


def _rotary(w: KernelWriter, name: str, tokens: int, sequence: int, width: int, head_dim: int) -> Passes:
    """Rotary embedding of `width` numbers per token in halves: 4 products, difference, sum, concatenation."""
    half = BF16 * tokens * width / 2
    table = FP32 * sequence * head_dim / 2
    forward = [
        _small(w, f"{name}.frequencies", 5),
        _many(w, f"{name}.angles", "elementwise", bytes_=2 * table, count=5),
        _many(w, f"{name}.products", "mul", bytes_=2 * half, count=4),
        _many(w, f"{name}.sums", "elementwise", bytes_=3 * half, count=2),
        _many(w, f"{name}.cat", "copy", bytes_=4 * half),
    ]
    backward = [
        _many(w, f"{name}.products.backward", "mul", bytes_=2 * half, count=5, launches=7),  # and one negation
        _many(w, f"{name}.sums.backward", "elementwise", bytes_=3 * half, count=2, launches=0),
        _many(w, f"{name}.split.backward", "copy", bytes_=4 * half),
    ]
    return forward, backward


def _copy(w: KernelWriter, name: str, numbers: float, *, backward: bool = True) -> Passes:
    """A copy into another order; backward either copies too or only looks at the gradient differently."""
    moved = 2.0 * BF16 * numbers
    back = [_many(w, f"{name}.backward", "copy", bytes_=moved)] if backward else []
    return [_many(w, name, "copy", bytes_=moved)], back


def _repeated(w: KernelWriter, name: str, tokens: int, few: int, many: int) -> Passes:
    """`few` numbers per token repeated to `many`; the gradients of the copies are summed."""
    moved = float(BF16 * tokens * (few + many))
    return [_many(w, name, "copy", bytes_=moved)], [_many(w, f"{name}.backward", "reduce", bytes_=moved)]


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
        _linear(w, "q", m=tokens, k=h, n=wide),
        ([], [_sum(w, "qk.backward", tokens, h)]),
        _rotary(w, "q.rotary", tokens, step.sequence, wide, d),
        _linear(w, "k", m=tokens, k=h, n=narrow),
        ([], [_sum(w, "kv.backward", tokens, h)]),
        _rotary(w, "k.rotary", tokens, step.sequence, narrow, d),
        _linear(w, "v", m=tokens, k=h, n=narrow),
    ]
    if narrow != wide:
        parts += [_repeated(w, "k.repeat", tokens, narrow, wide), _repeated(w, "v.repeat", tokens, narrow, wide)]
    parts += [
        _attend(w, step, head_dim=d, value_dim=d),
        _copy(w, "merge", tokens * wide, backward=False),
        _linear(w, "attention_out", m=tokens, k=wide, n=h),
    ]
    return chain(*parts)


def _latent(w: KernelWriter, step: Step, mla: Mla) -> Passes:
    model, tokens = step.model, step.tokens
    d, h, heads, rope = model.head_dim, model.hidden, model.heads, mla.rope_head_dim
    value = mla.value_head_dim or d
    query_rank = mla.q_lora_rank or h
    wide = heads * (d + rope)
    return chain(
        _linear(w, "q_down", m=tokens, k=h, n=query_rank),
        ([], [_sum(w, "q_kv.backward", tokens, h)]),
        _norm(w, "q_norm", tokens, query_rank),
        _linear(w, "q_up", m=tokens, k=query_rank, n=wide),
        _linear(w, "kv_down", m=tokens, k=h, n=mla.kv_lora_rank + rope),
        _copy(w, "latent", tokens * mla.kv_lora_rank),
        _norm(w, "kv_norm", tokens, mla.kv_lora_rank),
        _linear(w, "kv_up", m=tokens, k=mla.kv_lora_rank, n=heads * (d + value)),
        _rotary(w, "k.rotary", tokens, step.sequence, rope, rope),
        _rotary(w, "q.rotary", tokens, step.sequence, heads * rope, rope),
        _copy(w, "q.cat", tokens * wide),
        _copy(w, "k.cat", tokens * wide),
        _attend(w, step, head_dim=d + rope, value_dim=value),
        _copy(w, "merge", tokens * heads * value, backward=False),
        _linear(w, "attention_out", m=tokens, k=heads * value, n=h),
    )


def attention_part(w: KernelWriter, step: Step) -> Passes:
    """Norm, projections, rotary embedding, attention, output projection and residual sum."""
    mla = step.model.attention
    return chain(
        _branch(w, "attention.branch", step),
        _norm(w, "attention_norm", step.tokens, step.model.hidden),
        _latent(w, step, mla) if isinstance(mla, Mla) else _grouped_query(w, step),
        _residual(w, "attention.residual", step),
    )


def _gated(w: KernelWriter, name: str, *, tokens: int, hidden: int, width: int) -> Passes:
    """W2(silu(W1 x) * W3 x) with W1 and W3 in one product."""
    activation = (
        [w.memory(f"{name}.activation", "activation", rows=tokens, width=width, launches=2)],
        [w.memory(f"{name}.activation.backward", "activation_backward", rows=tokens, width=width, launches=3)],
    )
    return chain(
        _linear(w, f"{name}.w13", m=tokens, k=hidden, n=2 * width),
        activation,
        _linear(w, f"{name}.w2", m=tokens, k=width, n=hidden),
    )


def _router(w: KernelWriter, step: Step) -> Passes:
    """Gate product, affinities, top-k and the gates of the selected."""
    model, tokens = step.model, step.tokens
    scores, chosen = float(tokens * model.experts), float(tokens * model.top_k)
    gather = _many(w, "router.gather", "elementwise", bytes_=(INT64 + 2 * FP32) * chosen)
    to_fp32 = _many(w, "router.cast", "cast", bytes_=(BF16 + FP32) * scores)
    forward = [to_fp32]
    backward = [
        _many(w, "router.gather.backward", "elementwise", bytes_=FP32 * scores + (INT64 + 2 * FP32) * chosen, count=1),
    ]
    if step.sigmoid:
        forward.append(_many(w, "router.sigmoid", "elementwise", bytes_=2 * FP32 * scores, count=2))
        normalise = _many(w, "router.normalise", "elementwise", bytes_=2 * FP32 * chosen, count=3)
        forward += [w.memory("router.topk", "topk", rows=tokens, width=model.experts), gather, normalise]
        backward.insert(0, _many(w, "router.normalise.backward", "elementwise", bytes_=3 * FP32 * chosen, count=6))
        backward.append(_many(w, "router.sigmoid.backward", "elementwise", bytes_=3 * FP32 * scores))
    else:
        forward.append(w.memory("router.softmax", "softmax", rows=tokens, width=model.experts))
        forward += [w.memory("router.topk", "topk", rows=tokens, width=model.experts), gather]
        backward.append(w.memory("router.softmax.backward", "softmax_backward", rows=tokens, width=model.experts))
    backward.append(_many(w, "router.cast.backward", "cast", bytes_=(BF16 + FP32) * scores))
    return chain(
        ([], [_sum(w, "router.branch.backward", tokens, model.hidden)]),
        _linear(w, "router.gate", m=tokens, k=model.hidden, n=model.experts),
        (forward, backward),
    )


def _scatter_rows(w: KernelWriter, name: str, rows: NDArray[Any], hidden: int, *, into: ArrayLike) -> Operation:
    """Backward of a gather: zeros of `into` rows, and an index-add of `rows` rows."""
    added = w.model.memory_bound(kind="unpermute", bytes=memory_bytes("unpermute", rows=rows, width=hidden))
    zeros = w.model.memory_bound(kind="zero", bytes=float(BF16 * hidden) * np.asarray(into, dtype=np.float64))
    seconds = np.asarray(added.seconds) + np.asarray(zeros.seconds)
    return compute(name, w.category, seconds, layer=w.layer, source=added.source, chain=w.chain, launches=1)


def _sort_rows(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """The rows of this rank in expert order."""
    out = loads.copies_out_MSR
    forward = [
        _small(w, "permute.zeros", 1),
        _many(w, "permute.ones", "zero", bytes_=float(INT64) * out),
        w.memory("permute.count", "histogram", rows=out),
        w.memory("permute.sort", "sort", rows=out),
        _many(w, "permute.tokens", "elementwise", bytes_=2.0 * INT64 * out),
        w.memory("permute.gather", "permute", rows=out, width=step.model.hidden),
    ]
    back = _scatter_rows(w, "permute.gather.backward", out, step.model.hidden, into=step.tokens)
    return forward, [back]


def _exchange_rows(w: KernelWriter, loads: LayerLoads) -> Passes:
    """Counts, their read-back, and the rows."""
    assert loads.counts is not None
    forward = [
        transfer("dispatch.counts", "dispatch_exposed", (loads.counts,), layer=w.layer, launches=2),
        _small(w.part("permute"), "dispatch.sums", 3),
        readback("dispatch.readback", layer=w.layer),
        transfer("dispatch", "dispatch_exposed", loads.dispatch_M, layer=w.layer, launches=3),
    ]
    return forward, [transfer("dispatch.backward", "combine_exposed", loads.combine_M, layer=w.layer, launches=3)]


def _sort_arrived(w: KernelWriter, loads: LayerLoads, hidden: int) -> Passes:
    """The arrived rows by local expert."""
    rows = loads.rows_MSR
    forward = [
        _small(w, "permute.local_ids", 4),
        _many(w, "permute.local_rows", "elementwise", bytes_=float(INT64) * rows),
        w.memory("permute.local_sort", "sort", rows=rows),
        _many(w, "permute.inverse", "elementwise", bytes_=2.0 * INT64 * rows, count=2),
        _small(w, "permute.offsets", 2),
        w.memory("permute.expand", "permute", rows=rows, width=hidden),
    ]
    return forward, [_scatter_rows(w, "permute.expand.backward", rows, hidden, into=rows)]


def _experts(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """The routed experts of every rank; durations follow the rows of its slots."""
    h, width = step.model.hidden, step.model.expert_intermediate
    slots, rows = loads.slot_rows_MSRP, loads.rows_MSR
    forward = [
        w.grouped_gemm("experts.w13", rows=slots, k=h, n=2 * width),
        w.memory("experts.activation", "activation", rows=rows, width=width, launches=2),
        w.grouped_gemm("experts.w2", rows=slots, k=width, n=h),
    ]
    backward = [
        w.grouped_gemm("experts.w2.dgrad", rows=slots, k=width, n=h, direction="dgrad"),
        w.grouped_gemm("experts.w2.wgrad", rows=slots, k=width, n=h, direction="wgrad"),
        w.memory("experts.activation.backward", "activation_backward", rows=rows, width=width, launches=3),
        w.grouped_gemm("experts.w13.dgrad", rows=slots, k=h, n=2 * width, direction="dgrad"),
        w.grouped_gemm("experts.w13.wgrad", rows=slots, k=h, n=2 * width, direction="wgrad"),
    ]
    return forward, backward


def _combine_rows(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """The weighted sum of every token's results."""
    out, h = loads.copies_out_MSR, step.model.hidden
    forward = [
        _many(w, "combine.gates", "elementwise", bytes_=float(INT64 + 2 * FP32) * out, count=2),
        _many(w, "combine.zeros", "zero", bytes_=float(BF16 * step.tokens * h)),
        w.memory("combine.scale", "mul", rows=out, width=h),
        w.memory("combine.add", "unpermute", rows=out, width=h),
    ]
    backward = [
        w.memory("combine.add.backward", "unpermute_backward", rows=out, width=h),
        w.memory("combine.scale.backward", "mul", rows=out, width=h),
        _many(w, "combine.products.backward", "elementwise", bytes_=3.0 * BF16 * h * out, launches=0),
        w.memory("combine.sums.backward", "reduce", rows=out, width=h),
        _many(w, "combine.gates.backward", "elementwise", bytes_=float(INT64 + 2 * FP32) * out, count=3),
    ]
    return forward, backward


def moe_part(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """Norm, router, exchange, routed experts, shared experts and residual sum."""
    model = step.model
    p, router = w.part("permute"), w.part("router")
    experts = _experts(w.part("experts"), step, loads)
    if step.remote:
        back = (
            [p.memory("permute.restore", "permute", rows=loads.rows_MSR, width=model.hidden)],
            [_scatter_rows(p, "permute.restore.backward", loads.rows_MSR, model.hidden, into=loads.rows_MSR)],
        )
        exchange_back = (
            [transfer("combine", "combine_exposed", loads.combine_M, layer=w.layer, launches=3)],
            [transfer("combine.backward", "dispatch_exposed", loads.dispatch_M, layer=w.layer, launches=3)],
        )
        routed = chain(_exchange_rows(w, loads), _sort_arrived(p, loads, model.hidden), experts, back, exchange_back)
    else:
        routed = chain(([_small(p, "permute.offsets", 1)], []), experts)
    parts = [
        _branch(router, "ffn.branch", step),
        _norm(router, "ffn_norm", step.tokens, model.hidden),
        _router(router, step),
        _sort_rows(p, step, loads),
        routed,
        _combine_rows(p, step, loads),
    ]
    if model.shared_experts:
        shared, width = w.part("shared_experts"), model.shared_experts * model.expert_intermediate
        parts.append(([], [_sum(shared, "shared.branch.backward", step.tokens, model.hidden)]))
        parts.append(_gated(shared, "shared", tokens=step.tokens, hidden=model.hidden, width=width))
        parts.append(([_sum(shared, "shared.sum", step.tokens, model.hidden)], []))
    parts.append(_residual(router, "ffn.residual", step))
    return chain(*parts)


def dense_ffn_part(w: KernelWriter, step: Step) -> Passes:
    """Norm, the dense feed-forward network and residual sum."""
    model = step.model
    return chain(
        _branch(w, "ffn.branch", step),
        _norm(w, "ffn_norm", step.tokens, model.hidden),
        _gated(w, "ffn", tokens=step.tokens, hidden=model.hidden, width=model.dense_intermediate),
        _residual(w, "ffn.residual", step),
    )


def layer_part(w: KernelWriter, step: Step, loads: LayerLoads | None) -> Passes:
    """One transformer layer; `loads` is None for a dense layer."""
    attention = attention_part(w.part("attention"), step)
    if loads is None:
        return chain(attention, dense_ffn_part(w.part("dense_ffn"), step))
    return chain(attention, moe_part(w, step, loads))


def embedding_part(w: KernelWriter, step: Step) -> Passes:
    """Token embedding; its gradient starts from a table of zeros."""
    rows, width = step.tokens, step.model.hidden
    forward = w.memory("embedding", "embedding", rows=rows, width=width)
    return [forward], [w.memory("embedding.backward", "embedding_backward", rows=rows, width=width)]


def head_part(w: KernelWriter, step: Step) -> Passes:
    """Final norm, logits, and mean cross entropy in fp32."""
    model, tokens = step.model, step.tokens
    logits = float(tokens * model.vocab)
    loss = (
        [
            _many(w, "logits.cast", "cast", bytes_=(BF16 + FP32) * logits),
            w.memory("cross_entropy", "cross_entropy_fp32", rows=tokens, width=model.vocab, launches=2),
            _small(w, "loss", 1),
        ],
        [
            _small(w, "loss.backward", 1),
            w.memory(
                "cross_entropy.backward", "cross_entropy_fp32_backward", rows=tokens, width=model.vocab, launches=2
            ),
            _many(w, "logits.cast.backward", "cast", bytes_=(BF16 + FP32) * logits),
        ],
    )
    return chain(
        _norm(w, "final_norm", tokens, model.hidden), _linear(w, "head", m=tokens, k=model.hidden, n=model.vocab), loss
    )


def accumulation(w: KernelWriter, *, parameters: float) -> list[Operation]:
    """The gradients of all parameters added to those of earlier micro-batches."""
    return [_many(w, "gradients.add", "elementwise", bytes_=3.0 * BF16 * parameters)]


def flat_copies(w: KernelWriter, *, parameters: float) -> tuple[list[Operation], list[Operation]]:
    """Gradients of `parameters` parameters into one flat buffer before their all-reduce, and back behind it."""
    if not parameters:
        return [], []
    moved = 2.0 * BF16 * parameters
    return (
        [_many(w, "gradients.flatten", "copy", bytes_=moved)],
        [_many(w, "gradients.unflatten", "copy", bytes_=moved)],
    )
