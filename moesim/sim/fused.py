"""`implementation: {kind: fused}`: a well-tuned training stack, as operations.

What it assumes. Kernels are fused where such stacks fuse them: residual add with the norm, rotary embedding in one
pass, softmax and top-k of the router in one kernel, SiLU-times-gate in one kernel, the weighted sum of a token's
results with the residual add, softmax and loss of the head in place. Weight gradients are added into the gradient
buffer by the matrix product itself. Every such kernel reaches the bandwidth of a plain elementwise kernel, norms and
gathers that of their own. The host has captured the step in graphs or runs ahead: it never limits, and no
count is read back. Shared experts run beside the dispatch. Recomputation: none.

One micro-batch, forward, per MoE layer:
    attention   norm+residual, q/k/v projections (MLA: down, norm, up), rotary, fused attention, output projection
    router      norm+residual, gate product, softmax+top-k (in fp32)
    permute     [quantise to the dispatch dtype,] gather into the send buffer
    dispatch    transfer                 | beside it: shared experts (two products and the activation)
    permute     gather the arrived copies into expert order
    experts     grouped W1/W3, activation, grouped W2
    permute     sum the rows of one copy
    combine     transfer
    permute     weighted sum of a token's copies
The backward pass walks the same way back: the gradient of combine travels as a dispatch and the gradient of dispatch as
a combine. With one expert-parallel rank there is no transfer and rows are gathered once.

Legend: see `moesim.sim.loads`.
"""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesim.compute import KernelModel
from moesim.scenario import Model
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.scenario.model import LocalGlobal, Mla
from moesim.sim.executor import FREE_HOST, HostModel
from moesim.sim.loads import LayerLoads
from moesim.sim.operations import MAIN, SIDE, Operation, fork, join, transfer
from moesim.sim.sizes import Passes, Step, chain
from moesim.sim.writer import KernelWriter

ACTIVATION_BYTES = BYTES_PER_ELEMENT["bf16"]  # activations between kernels


def host_model(kernels: KernelModel) -> HostModel:
    """The host never limits, whatever the GPU."""
    del kernels
    return FREE_HOST


def _norm(w: KernelWriter, name: str, tokens: int, width: int) -> Passes:
    """RMS norm fused with the residual add: the sum is written beside the normalised rows."""
    residual = 2 * tokens * width * ACTIVATION_BYTES
    forward = w.moved(name, "rms_norm", bytes_=2 * residual)
    backward = w.moved(f"{name}.backward", "rms_norm", bytes_=2 * residual)
    return [forward], [backward]


def _projection(w: KernelWriter, name: str, *, m: int, k: int, n: int, dtype: str | None = None) -> Passes:
    return [w.gemm(name, m=m, k=k, n=n, dtype=dtype)], w.gemm_backward(name, m=m, k=k, n=n, dtype=dtype)


def _query_key_value(w: KernelWriter, model: Model, tokens: int) -> Passes:
    h, heads, d = model.hidden, model.heads, model.head_dim
    if not isinstance(model.attention, Mla):
        return _projection(w, "qkv", m=tokens, k=h, n=(heads + 2 * model.kv_heads) * d)
    mla = model.attention
    value, rope = mla.value_head_dim or d, mla.rope_head_dim
    query: list[Passes]
    if mla.q_lora_rank is None:
        query = [_projection(w, "q", m=tokens, k=h, n=heads * (d + rope))]
    else:
        query = [
            _projection(w, "q_down", m=tokens, k=h, n=mla.q_lora_rank),
            _norm(w, "q_norm", tokens, mla.q_lora_rank),
            _projection(w, "q_up", m=tokens, k=mla.q_lora_rank, n=heads * (d + rope)),
        ]
    return chain(
        *query,
        _projection(w, "kv_down", m=tokens, k=h, n=mla.kv_lora_rank + rope),
        _norm(w, "kv_norm", tokens, mla.kv_lora_rank),
        _projection(w, "kv_up", m=tokens, k=mla.kv_lora_rank, n=heads * (d + value)),
    )


def _core_attention(w: KernelWriter, step: Step) -> Passes:
    """Fused attention. A window attends to itself and the one before it; global tokens cost as a short causal pass."""
    model = step.model
    extra = model.attention.rope_head_dim if isinstance(model.attention, Mla) else 0
    value = (model.attention.value_head_dim or model.head_dim) if isinstance(model.attention, Mla) else model.head_dim
    kv_heads = model.heads if isinstance(model.attention, Mla) else model.kv_heads
    attend = partial(
        w.attention, heads=model.heads, kv_heads=kv_heads, head_dim=model.head_dim + extra, value_dim=value
    )
    if not isinstance(model.attention, LocalGlobal):
        forward = attend("attention", batch=step.batch, sequence=step.sequence)
        backward = attend("attention.backward", batch=step.batch, sequence=step.sequence, direction="backward")
        return [forward], [backward]
    window, every = model.attention.window, model.attention.global_every
    windows = step.batch * step.sequence / window
    # Queries x global tokens, causal: n * (n / every) / 2 pairs, those of a causal pass over n / sqrt(every) tokens.
    reduced = step.sequence / np.sqrt(every)
    forward_ops = [
        attend("local", batch=windows, sequence=window, causal=False),
        attend("global", batch=step.batch, sequence=reduced),
    ]
    backward_ops = [
        attend("local.backward", batch=windows, sequence=window, causal=False, direction="backward"),
        attend("global.backward", batch=step.batch, sequence=reduced, direction="backward"),
    ]
    return forward_ops, backward_ops


def attention_part(w: KernelWriter, step: Step) -> Passes:
    """Norm, projections, rotary embedding, attention and output projection."""
    model, tokens = step.model, step.tokens
    mla = isinstance(model.attention, Mla)
    value = (model.attention.value_head_dim or model.head_dim) if isinstance(model.attention, Mla) else model.head_dim
    rotated = model.attention.rope_head_dim if isinstance(model.attention, Mla) else model.head_dim
    rotary = (model.heads + (1 if mla else model.kv_heads)) * rotated
    rope = (
        [w.memory("rotary", "copy", rows=tokens, width=rotary)],
        [w.memory("rotary.backward", "copy", rows=tokens, width=rotary)],
    )
    return chain(
        _norm(w, "attention_norm", tokens, model.hidden),
        _query_key_value(w, model, tokens),
        rope,
        _core_attention(w, step),
        _projection(w, "attention_out", m=tokens, k=model.heads * value, n=model.hidden),
    )


def _swiglu(w: KernelWriter, name: str, *, tokens: int, hidden: int, width: int) -> Passes:
    """W2(silu(W1 x) * W3 x) with W1 and W3 in one product and the activation in one kernel."""
    # silu(a) * b reads two values and writes one; its gradient reads three and writes two.
    inner = tokens * width * ACTIVATION_BYTES
    activation = (
        [w.moved(f"{name}.activation", "elementwise", bytes_=3 * inner)],
        [w.moved(f"{name}.activation.backward", "elementwise", bytes_=5 * inner)],
    )
    return chain(
        _projection(w, f"{name}.w13", m=tokens, k=hidden, n=2 * width),
        activation,
        _projection(w, f"{name}.w2", m=tokens, k=width, n=hidden),
    )


def dense_ffn_part(w: KernelWriter, step: Step) -> Passes:
    """Norm and the dense feed-forward network."""
    model = step.model
    return chain(
        _norm(w, "ffn_norm", step.tokens, model.hidden),
        _swiglu(w, "ffn", tokens=step.tokens, hidden=model.hidden, width=model.dense_intermediate),
    )


def _router_part(w: KernelWriter, step: Step) -> Passes:
    model, tokens = step.model, step.tokens
    scores = tokens * model.experts * BYTES_PER_ELEMENT["fp32"]
    select = (
        [w.moved("router.topk", "elementwise", bytes_=2 * scores)],
        [w.moved("router.topk.backward", "elementwise", bytes_=3 * scores)],
    )
    return chain(
        _norm(w, "ffn_norm", tokens, model.hidden),
        _projection(w, "router.gate", m=tokens, k=model.hidden, n=model.experts, dtype="bf16"),
        select,
    )


def _experts_part(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """The routed experts of every rank; durations follow the rows of its slots."""
    h, width = step.model.hidden, step.model.expert_intermediate
    slots, rows = loads.slot_rows_MSRP, loads.rows_MSR
    inner_MSR = rows * float(width * ACTIVATION_BYTES)
    forward = [
        w.grouped_gemm("experts.w13", rows=slots, k=h, n=2 * width),
        w.moved("experts.activation", "elementwise", bytes_=3 * inner_MSR),
        w.grouped_gemm("experts.w2", rows=slots, k=width, n=h),
    ]
    backward = [
        w.grouped_gemm("experts.w2.dgrad", rows=slots, k=width, n=h, direction="dgrad"),
        w.grouped_gemm("experts.w2.wgrad", rows=slots, k=width, n=h, direction="wgrad"),
        w.moved("experts.activation.backward", "elementwise", bytes_=5 * inner_MSR),
        w.grouped_gemm("experts.w13.dgrad", rows=slots, k=h, n=2 * width, direction="dgrad"),
        w.grouped_gemm("experts.w13.wgrad", rows=slots, k=h, n=2 * width, direction="wgrad"),
    ]
    return forward, backward


def _sum_bytes(read_rows: NDArray[Any], written_rows: NDArray[Any] | int, hidden: int) -> NDArray[np.float64]:
    """A fused weighted sum reads every row once and writes every sum once."""
    return np.asarray((read_rows + written_rows) * float(hidden * ACTIVATION_BYTES))


def _moe_forward(
    w: KernelWriter,
    step: Step,
    loads: LayerLoads,
    router: list[Operation],
    shared: list[Operation],
    experts: list[Operation],
) -> list[Operation]:
    h, tokens, layer = step.model.hidden, step.tokens, w.layer
    p = w.part("permute")
    out = [*router]
    if not step.remote:
        out += [p.memory("permute", "permute", rows=loads.rows_MSR, width=h), *shared, *experts]
        return [*out, p.moved("unpermute", "elementwise", bytes_=_sum_bytes(loads.rows_MSR, tokens, h))]
    if step.quantise:
        out.append(p.memory("quantise", "quantise", rows=tokens, width=h))
    out.append(p.memory("permute", "permute", rows=loads.copies_out_MSR, width=h))
    dispatch = transfer("dispatch", "dispatch_exposed", loads.dispatch_M, layer=layer)
    combine = transfer("combine", "combine_exposed", loads.combine_M, layer=layer)
    out += [fork(layer=layer), dispatch, *shared]
    out += [p.memory("expand", "permute", rows=loads.rows_MSR, width=h), *experts]
    out.append(p.moved("reduce", "elementwise", bytes_=_sum_bytes(loads.rows_MSR, loads.copies_in_MSR, h)))
    out += [combine, join(layer=layer)]
    return [*out, p.moved("unpermute", "elementwise", bytes_=_sum_bytes(loads.copies_out_MSR, tokens, h))]


def _moe_backward(
    w: KernelWriter,
    step: Step,
    loads: LayerLoads,
    router: list[Operation],
    shared: list[Operation],
    experts: list[Operation],
) -> list[Operation]:
    h, tokens, layer = step.model.hidden, step.tokens, w.layer
    p = w.part("permute")
    if not step.remote:
        spread = p.memory("unpermute.backward", "permute", rows=loads.rows_MSR, width=h)
        gather = p.moved("permute.backward", "elementwise", bytes_=_sum_bytes(loads.rows_MSR, tokens, h))
        return [spread, *shared, *experts, gather, *router]
    out: list[Operation] = []
    if step.quantise:
        out.append(p.memory("quantise.backward", "quantise", rows=tokens, width=h))
    out.append(p.memory("unpermute.backward", "permute", rows=loads.copies_out_MSR, width=h))
    dispatch = transfer("combine.backward", "dispatch_exposed", loads.dispatch_M, layer=layer)
    combine = transfer("dispatch.backward", "combine_exposed", loads.combine_M, layer=layer)
    out += [fork(layer=layer), dispatch, *shared]
    out += [p.memory("reduce.backward", "permute", rows=loads.rows_MSR, width=h), *experts]
    out.append(p.moved("expand.backward", "elementwise", bytes_=_sum_bytes(loads.rows_MSR, loads.copies_in_MSR, h)))
    out += [combine, join(layer=layer)]
    out.append(p.moved("permute.backward", "elementwise", bytes_=_sum_bytes(loads.copies_out_MSR, tokens, h)))
    return out + router


def moe_part(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """Router, shared experts, routed experts and what moves tokens between them."""
    model = step.model
    router_forward, router_backward = _router_part(w.part("router"), step)
    shared: Passes = ([], [])
    if model.shared_experts:
        beside = w.part("shared_experts", chain=SIDE if step.remote and step.shared_beside else MAIN)
        width = model.shared_experts * model.expert_intermediate
        shared = _swiglu(beside, "shared", tokens=step.tokens, hidden=model.hidden, width=width)
    experts_forward, experts_backward = _experts_part(w.part("experts"), step, loads)
    forward = _moe_forward(w, step, loads, router_forward, shared[0], experts_forward)
    backward = _moe_backward(w, step, loads, router_backward, shared[1], experts_backward)
    return forward, backward


def layer_part(w: KernelWriter, step: Step, loads: LayerLoads | None) -> Passes:
    """One transformer layer; `loads` is None for a dense layer."""
    attention = attention_part(w.part("attention"), step)
    if loads is None:
        return chain(attention, dense_ffn_part(w.part("dense_ffn"), step))
    return chain(attention, moe_part(w, step, loads))


def embedding_part(w: KernelWriter, step: Step) -> Passes:
    """Token embedding."""
    rows, width = step.tokens, step.model.hidden
    forward = w.memory("embedding", "embedding", rows=rows, width=width)
    return [forward], [w.memory("embedding.backward", "embedding", rows=rows, width=width)]


def head_part(w: KernelWriter, step: Step) -> Passes:
    """Final norm, logits and mean cross entropy."""
    model, tokens = step.model, step.tokens
    logits = tokens * model.vocab * ACTIVATION_BYTES
    loss = (
        [w.moved("cross_entropy", "elementwise", bytes_=logits)],
        [w.moved("cross_entropy.backward", "elementwise", bytes_=2 * logits)],
    )
    return chain(
        _norm(w, "final_norm", tokens, model.hidden),
        _projection(w, "head", m=tokens, k=model.hidden, n=model.vocab, dtype="bf16"),
        loss,
    )


def accumulation(w: KernelWriter, *, parameters: float) -> list[Operation]:
    """Nothing: the weight-gradient product adds into the buffer, micro-batch after micro-batch."""
    del w, parameters
    return []


def flat_copies(w: KernelWriter, *, parameters: float) -> tuple[list[Operation], list[Operation]]:
    """Nothing: gradients are written into the buffer that is reduced."""
    del w, parameters
    return [], []
