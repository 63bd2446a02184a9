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
from moesim.sim.eager_attention import attention_part
from moesim.sim.eager_kernels import BF16, FP32, INT64, branch, gated, linear, many, norm, residual, small, sum_of
from moesim.sim.executor import HostModel
from moesim.sim.loads import LayerLoads
from moesim.sim.operations import Operation, compute, readback, transfer
from moesim.sim.sizes import Passes, Step, chain
from moesim.sim.writer import KernelWriter


def host_model(kernels: KernelModel) -> HostModel:
    """The host issues every operation, and waits at read-backs."""
    return HostModel(
        forward_launch=kernels.launch_seconds,
        backward_launch=kernels.backward_launch_seconds,
        readback=kernels.readback_seconds,
    )


def _router(w: KernelWriter, step: Step) -> Passes:
    """Gate product, affinities, top-k and the gates of the selected."""
    model, tokens = step.model, step.tokens
    scores, chosen = float(tokens * model.experts), float(tokens * model.top_k)
    gather = many(w, "router.gather", "elementwise", bytes_=(INT64 + 2 * FP32) * chosen)
    to_fp32 = many(w, "router.cast", "cast", bytes_=(BF16 + FP32) * scores)
    forward = [to_fp32]
    backward = [
        many(w, "router.gather.backward", "elementwise", bytes_=FP32 * scores + (INT64 + 2 * FP32) * chosen, count=1),
    ]
    if step.sigmoid:
        forward.append(many(w, "router.sigmoid", "elementwise", bytes_=2 * FP32 * scores, count=2))
        normalise = many(w, "router.normalise", "elementwise", bytes_=2 * FP32 * chosen, count=3)
        forward += [w.memory("router.topk", "topk", rows=tokens, width=model.experts), gather, normalise]
        backward.insert(0, many(w, "router.normalise.backward", "elementwise", bytes_=3 * FP32 * chosen, count=6))
        backward.append(many(w, "router.sigmoid.backward", "elementwise", bytes_=3 * FP32 * scores))
    else:
        forward.append(w.memory("router.softmax", "softmax", rows=tokens, width=model.experts))
        forward += [w.memory("router.topk", "topk", rows=tokens, width=model.experts), gather]
        backward.append(w.memory("router.softmax.backward", "softmax_backward", rows=tokens, width=model.experts))
    backward.append(many(w, "router.cast.backward", "cast", bytes_=(BF16 + FP32) * scores))
    return chain(
        ([], [sum_of(w, "router.branch.backward", tokens, model.hidden)]),
        linear(w, "router.gate", m=tokens, k=model.hidden, n=model.experts),
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
        small(w, "permute.zeros", 1),
        many(w, "permute.ones", "zero", bytes_=float(INT64) * out),
        w.memory("permute.count", "histogram", rows=out),
        w.memory("permute.sort", "sort", rows=out),
        many(w, "permute.tokens", "elementwise", bytes_=2.0 * INT64 * out),
        w.memory("permute.gather", "permute", rows=out, width=step.model.hidden),
    ]
    back = _scatter_rows(w, "permute.gather.backward", out, step.model.hidden, into=step.tokens)
    return forward, [back]


def _exchange_rows(w: KernelWriter, loads: LayerLoads) -> Passes:
    """Counts, their read-back, and the rows."""
    assert loads.counts is not None
    forward = [
        transfer("dispatch.counts", "dispatch_exposed", (loads.counts,), layer=w.layer, launches=2),
        small(w.part("permute"), "dispatch.sums", 3),
        readback("dispatch.readback", layer=w.layer),
        transfer("dispatch", "dispatch_exposed", loads.dispatch_M, layer=w.layer, launches=3),
    ]
    return forward, [transfer("dispatch.backward", "combine_exposed", loads.combine_M, layer=w.layer, launches=3)]


def _sort_arrived(w: KernelWriter, loads: LayerLoads, hidden: int) -> Passes:
    """The arrived rows by local expert."""
    rows = loads.rows_MSR
    forward = [
        small(w, "permute.local_ids", 4),
        many(w, "permute.local_rows", "elementwise", bytes_=float(INT64) * rows),
        w.memory("permute.local_sort", "sort", rows=rows),
        many(w, "permute.inverse", "elementwise", bytes_=2.0 * INT64 * rows, count=2),
        small(w, "permute.offsets", 2),
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
        many(w, "combine.gates", "elementwise", bytes_=float(INT64 + 2 * FP32) * out, count=2),
        many(w, "combine.zeros", "zero", bytes_=float(BF16 * step.tokens * h)),
        w.memory("combine.scale", "mul", rows=out, width=h),
        w.memory("combine.add", "unpermute", rows=out, width=h),
    ]
    backward = [
        w.memory("combine.add.backward", "unpermute_backward", rows=out, width=h),
        w.memory("combine.scale.backward", "mul", rows=out, width=h),
        many(w, "combine.products.backward", "elementwise", bytes_=3.0 * BF16 * h * out, launches=0),
        w.memory("combine.sums.backward", "reduce", rows=out, width=h),
        many(w, "combine.gates.backward", "elementwise", bytes_=float(INT64 + 2 * FP32) * out, count=3),
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
        routed = chain(([small(p, "permute.offsets", 1)], []), experts)
    parts = [
        branch(router, "ffn.branch", step),
        norm(router, "ffn_norm", step.tokens, model.hidden),
        _router(router, step),
        _sort_rows(p, step, loads),
        routed,
        _combine_rows(p, step, loads),
    ]
    if model.shared_experts:
        shared, width = w.part("shared_experts"), model.shared_experts * model.expert_intermediate
        parts.append(([], [sum_of(shared, "shared.branch.backward", step.tokens, model.hidden)]))
        parts.append(gated(shared, "shared", tokens=step.tokens, hidden=model.hidden, width=width))
        parts.append(([sum_of(shared, "shared.sum", step.tokens, model.hidden)], []))
    parts.append(residual(router, "ffn.residual", step))
    return chain(*parts)


def dense_ffn_part(w: KernelWriter, step: Step) -> Passes:
    """Norm, the dense feed-forward network and residual sum."""
    model = step.model
    return chain(
        branch(w, "ffn.branch", step),
        norm(w, "ffn_norm", step.tokens, model.hidden),
        gated(w, "ffn", tokens=step.tokens, hidden=model.hidden, width=model.dense_intermediate),
        residual(w, "ffn.residual", step),
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
            many(w, "logits.cast", "cast", bytes_=(BF16 + FP32) * logits),
            w.memory("cross_entropy", "cross_entropy_fp32", rows=tokens, width=model.vocab, launches=2),
            small(w, "loss", 1),
        ],
        [
            small(w, "loss.backward", 1),
            w.memory(
                "cross_entropy.backward", "cross_entropy_fp32_backward", rows=tokens, width=model.vocab, launches=2
            ),
            many(w, "logits.cast.backward", "cast", bytes_=(BF16 + FP32) * logits),
        ],
    )
    return chain(
        norm(w, "final_norm", tokens, model.hidden), linear(w, "head", m=tokens, k=model.hidden, n=model.vocab), loss
    )


def accumulation(w: KernelWriter, *, parameters: float) -> list[Operation]:
    """The gradients of all parameters added to those of earlier micro-batches."""
    return [many(w, "gradients.add", "elementwise", bytes_=3.0 * BF16 * parameters)]


def flat_copies(w: KernelWriter, *, parameters: float) -> tuple[list[Operation], list[Operation]]:
    """Gradients of `parameters` parameters into one flat buffer before their all-reduce, and back behind it."""
    if not parameters:
        return [], []
    moved = 2.0 * BF16 * parameters
    return (
        [many(w, "gradients.flatten", "copy", bytes_=moved)],
        [many(w, "gradients.unflatten", "copy", bytes_=moved)],
    )
