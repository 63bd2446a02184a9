"""`implementation: {kind: torch_eager}`: plain eager PyTorch, operation by operation.

It describes the software of `moesim.routing.sharded_model` and `moesim.routing.expert_parallel`, which
`moesim validate` runs.
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
    router      RMS norm; gate product; to fp32; softmax (or sigmoid); + bias; top-k; gather; gates
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

Legend: see `moesim.program.loads`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moesim.kernels import KernelModel
from moesim.program.eager_attention import attention_part
from moesim.program.eager_host import backward, forward
from moesim.program.eager_kernels import (
    BF16,
    FP32,
    INT64,
    accumulated,
    activation,
    branch,
    gated,
    issued,
    moved,
    norm,
    product,
    residual,
    small,
)
from moesim.program.host import HostModel
from moesim.program.loads import LayerLoads
from moesim.program.operations import Operation, Transfer, readback, transfer
from moesim.program.sizes import Passes, Step, chain
from moesim.program.writer import KernelWriter
from moesim.results.spans import Part, Phase


def host_model(kernels: KernelModel) -> HostModel:
    """The host issues every operation, and waits at read-backs."""
    return HostModel(
        forward_launch=kernels.host.launch,
        backward_launch=kernels.host.backward_launch,
        readback=kernels.host.readback,
    )


def _router(w: KernelWriter, step: Step) -> Passes:
    """Gate product, affinities, top-k and the gates of the selected."""
    model, tokens = step.model, step.tokens
    scores, chosen = float(tokens * model.experts), float(tokens * model.top_k)
    picked = (INT64 + 2 * FP32) * chosen
    cast = (BF16 + FP32) * scores
    topk = issued(w.memory("router.topk", "topk", rows=tokens, width=model.experts), forward("topk", "view"))
    gather = moved(w, "router.gather", "elementwise", forward("gather"), bytes_=picked)
    gather_back = [
        moved(w.backward, "router.gather", "zero", backward("gather"), bytes_=FP32 * scores),
        moved(w.backward, "router.scatter", "elementwise", 0.0, bytes_=picked),
    ]
    to_fp32 = (
        [moved(w, "router.cast", "cast", forward("module", "cast"), bytes_=cast)],
        [moved(w.backward, "router.cast", "elementwise", backward("cast"), bytes_=cast)],
    )
    each = 2 * FP32 * scores
    affinities: Passes
    if step.router.affinity == "sigmoid":
        affinities = (
            [moved(w, "router.sigmoid", "elementwise", forward("silu"), bytes_=each)],
            [moved(w.backward, "router.sigmoid", "elementwise", backward("silu"), bytes_=1.5 * each)],
        )
    else:
        softmax = w.memory("router.softmax", "softmax", rows=tokens, width=model.experts)
        back = w.backward.memory("router.softmax", "softmax_backward", rows=tokens, width=model.experts)
        affinities = [issued(softmax, forward("softmax"))], [issued(back, backward("softmax"))]
    if step.router.biased:
        affinities[0].append(moved(w, "router.bias", "elementwise", forward("plain"), bytes_=each))
    return chain(
        accumulated(w, "router.branch", tokens, model.hidden),
        product(w, "router.gate", m=tokens, k=model.hidden, n=model.experts, module=False),
        to_fp32,
        affinities,
        ([topk, gather], gather_back),
        _gates(w, step),
    )


def _gates(w: KernelWriter, step: Step) -> Passes:
    """Affinities of the selected divided by their sum, times the factor, as the router's facts say."""
    normalised, scaled = step.router.normalised, step.router.scaled
    if not normalised and not scaled:
        return [], []
    name = "router.normalise" if normalised else "router.scale"
    calls = ("reduce", "mul") * normalised + ("mul",) * scaled
    backs = ("mul",) * scaled + ("mul", "mul", "reduce", "accumulate") * normalised
    count = 5 * normalised + scaled  # a division's gradients: one of each side, negated, summed and added up
    return (
        [small(w, name, forward(*calls), count=len(calls))],
        [small(w.backward, name, backward(*backs), count=count)],
    )


def _gathered(w: KernelWriter, name: str, *, rows: NDArray[Any], of: ArrayLike, hidden: int) -> Passes:
    """`rows` rows gathered from `of` rows; backward they are added into as many zeros."""
    zeros = float(BF16 * hidden) * np.asarray(of, dtype=np.float64)
    return (
        [issued(w.memory(name, "permute", rows=rows, width=hidden), forward("index_select"))],
        [
            moved(w.backward, name, "zero", backward("index_select"), bytes_=zeros),
            issued(w.backward.memory(name, "unpermute", rows=rows, width=hidden), 0.0),
        ],
    )


def _sort_rows(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """The rows of this rank in expert order."""
    out = loads.copies_out_MSR
    order = [
        small(w, "permute.zeros", forward("zeros", "view")),
        moved(w, "permute.ones", "zero", forward("zeros"), bytes_=float(INT64) * out),
        issued(w.memory("permute.count", "histogram", rows=out), forward("plain")),
        issued(w.memory("permute.sort", "sort", rows=out), forward("sort")),
        moved(w, "permute.tokens", "copy", forward("plain"), bytes_=2.0 * INT64 * out),
    ]
    return chain((order, []), _gathered(w, "permute.gather", rows=out, of=step.tokens, hidden=step.model.hidden))


def _exchange(w: KernelWriter, name: str, category: str, transfers_M: Sequence[Transfer]) -> Operation:
    launches = (forward if w.phase is Phase.FORWARD else backward)("exchange")
    name, transfers_M = w.label(name).name, tuple(transfers_M)
    return issued(transfer(name, category, transfers_M, layer=w.layer, phase=w.phase, part=w.part), launches)


def _exchange_rows(w: KernelWriter, loads: LayerLoads) -> Passes:
    """Counts, their read-back, and the rows."""
    assert loads.counts is not None
    counted, w = w.at(Part.PERMUTE).at(Part.ROW_COUNTS), w.at(Part.DISPATCH)
    ahead = [
        _exchange(counted, "dispatch.counts", "dispatch_exposed", (loads.counts,)),
        small(
            counted.at(Part.PERMUTE).at(Part.ROW_COUNTS),
            "dispatch.sums",
            forward("reduce", "reduce", "cat", "view", "view"),
            count=3,
        ),
        readback("dispatch.readback", layer=w.layer),
        _exchange(w, "dispatch", "dispatch_exposed", loads.dispatch_M),
    ]
    return ahead, [_exchange(w.backward, "dispatch", "combine_exposed", loads.combine_M)]


def _sort_arrived(w: KernelWriter, loads: LayerLoads, hidden: int) -> Passes:
    """The arrived rows by local expert."""
    rows = loads.rows_MSR
    order = [
        small(w, "permute.local_ids", forward("plain", "plain", "cumsum"), count=3),
        moved(w, "permute.local_rows", "zero", forward("plain"), bytes_=float(INT64) * rows),
        moved(w, "permute.local_experts", "copy", forward("index_select"), bytes_=2.0 * INT64 * rows),
        issued(w.memory("permute.local_sort", "sort", rows=rows), forward("sort")),
        moved(w, "permute.numbers", "zero", forward("empty", "plain"), bytes_=float(INT64) * rows),
        moved(w, "permute.inverse", "elementwise", forward("plain"), bytes_=3.0 * INT64 * rows),
        small(w, "permute.offsets", forward("reduce", "cumsum"), count=2),
    ]
    return chain((order, []), _gathered(w, "permute.expand", rows=rows, of=rows, hidden=hidden))


def _experts(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """The routed experts of every rank; durations follow the rows of its slots."""
    h, width = step.model.hidden, step.model.expert_intermediate

    def grouped(name: str, k: int, n: int) -> Passes:
        slots, half = loads.slot_rows_MSRP, backward("grouped") / 2
        dgrad = w.grouped_gemm(name, rows=slots, k=k, n=n, direction="dgrad")
        wgrad = w.grouped_gemm(name, rows=slots, k=k, n=n, direction="wgrad")
        ahead = w.grouped_gemm(name, rows=slots, k=k, n=n)
        return [issued(ahead, forward("grouped"))], [issued(dgrad, half), issued(wgrad, half)]

    return chain(
        grouped("experts.w13", h, 2 * width),
        activation(w, "experts.activation", rows=loads.rows_MSR, width=width),
        grouped("experts.w2", width, h),
    )


def _combine_rows(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """The weighted sum of every token's results."""
    out, h = loads.copies_out_MSR, step.model.hidden
    gates = float(INT64 + 2 * FP32) * out
    ahead = [
        moved(w, "combine.gates", "elementwise", forward("view", "index_select"), bytes_=gates),
        moved(w, "combine.cast", "cast", forward("cast", "view"), bytes_=float(BF16 + FP32) * out),
        moved(w, "combine.zeros", "zero", forward("zeros"), bytes_=float(BF16 * step.tokens * h)),
        issued(w.memory("combine.scale", "mul", rows=out, width=h), forward("mul")),
        issued(w.memory("combine.add", "unpermute", rows=out, width=h), forward("index_add")),
    ]
    back = [
        issued(w.backward.memory("combine.add", "unpermute_backward", rows=out, width=h), backward("index_add")),
        issued(w.backward.memory("combine.scale", "mul_backward", rows=out, width=h), backward("mul", "mul", "reduce")),
        small(w.backward, "combine.cast", backward("view", "cast")),
        moved(w.backward, "combine.gates", "elementwise", backward("index_select", "view"), bytes_=gates),
    ]
    return ahead, back


def moe_part(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """Norm, router, exchange, routed experts, shared experts and residual sum."""
    model = step.model
    p, router, combine = w.at(Part.PERMUTE), w.at(Part.ROUTER), w.at(Part.COMBINE)
    rest = router.at(Part.RESIDUAL)
    routed = _experts(w.at(Part.EXPERTS), step, loads)
    if step.remote:
        rows = loads.rows_MSR
        way_back = (
            [_exchange(combine, "combine", "combine_exposed", loads.combine_M)],
            [_exchange(combine.backward, "combine", "dispatch_exposed", loads.dispatch_M)],
        )
        routed = chain(
            _exchange_rows(w, loads),
            _sort_arrived(p, loads, model.hidden),
            routed,
            _gathered(p, "permute.restore", rows=rows, of=rows, hidden=model.hidden),
            way_back,
        )
    else:
        routed = chain(([small(p, "permute.offsets", forward("cumsum"))], []), routed)
    parts = [
        branch(rest, "ffn.branch", step),
        norm(router, "ffn_norm", step.tokens, model.hidden),
        _router(router, step),
        _sort_rows(p, step, loads),
        routed,
        _combine_rows(p.at(Part.COMBINE), step, loads),
    ]
    if model.shared_experts:
        shared, width = w.at(Part.SHARED_EXPERTS), model.shared_experts * model.expert_intermediate
        parts.append(accumulated(shared, "shared.branch", step.tokens, model.hidden))
        parts.append(gated(shared, "shared", tokens=step.tokens, hidden=model.hidden, width=width))
        parts.append(residual(shared, "shared.sum", step))
    parts.append(residual(rest, "ffn.residual", step))
    return chain(*parts)


def dense_ffn_part(w: KernelWriter, step: Step) -> Passes:
    """Norm, the dense feed-forward network and residual sum."""
    model = step.model
    return chain(
        branch(w.at(Part.RESIDUAL), "ffn.branch", step),
        norm(w, "ffn_norm", step.tokens, model.hidden),
        gated(w, "ffn", tokens=step.tokens, hidden=model.hidden, width=model.dense_intermediate),
        residual(w.at(Part.RESIDUAL), "ffn.residual", step),
    )


def layer_part(w: KernelWriter, step: Step, loads: LayerLoads | None) -> Passes:
    """One transformer layer; `loads` is None for a dense layer."""
    attention = attention_part(w.at(Part.ATTENTION), step)
    if loads is None:
        return chain(attention, dense_ffn_part(w.at(Part.DENSE_FFN), step))
    return chain(attention, moe_part(w, step, loads))


def embedding_part(w: KernelWriter, step: Step) -> Passes:
    """Token embedding; its gradient starts from a table of zeros."""
    rows, width = step.tokens, step.model.hidden
    back = w.backward.memory("embedding", "embedding_backward", rows=rows, width=width)
    return (
        [issued(w.memory("embedding", "embedding", rows=rows, width=width), forward("module", "index_select"))],
        [issued(back, backward("index_select"))],
    )


def head_part(w: KernelWriter, step: Step) -> Passes:
    """Final norm, logits, and mean cross entropy in fp32."""
    model, tokens = step.model, step.tokens
    cast = float(BF16 + FP32) * tokens * model.vocab
    last = w.at(Part.LOSS)
    loss = last.memory("cross_entropy", "cross_entropy_fp32", rows=tokens, width=model.vocab)
    loss_back = last.backward.memory("cross_entropy", "cross_entropy_fp32_backward", rows=tokens, width=model.vocab)
    return chain(
        norm(w, "final_norm", tokens, model.hidden),
        product(w, "head", m=tokens, k=model.hidden, n=model.vocab),
        (
            [moved(last, "logits.cast", "cast", forward("view", "cast"), bytes_=cast)],
            [moved(last.backward, "logits.cast", "elementwise", backward("cast", "view"), bytes_=cast)],  # vectorised
        ),
        ([issued(loss, forward("cross_entropy"))], [issued(loss_back, backward("cross_entropy"))]),
        ([small(last, "loss", forward("mul"))], [small(last.backward, "loss", backward("mul", "mul"), count=2)]),
    )


def accumulation(w: KernelWriter, *, parameters: float) -> list[Operation]:
    """The gradients of all parameters added to those of earlier micro-batches."""
    w = w.during(Phase.WEIGHT_GRADIENT)
    return [moved(w, "gradients.add", "elementwise", backward("accumulate"), bytes_=3.0 * BF16 * parameters)]


def flat_copies(w: KernelWriter, *, parameters: float) -> tuple[list[Operation], list[Operation]]:
    """Gradients of `parameters` parameters into one flat buffer before their all-reduce, and back behind it."""
    if not parameters:
        return [], []
    w, both = w.during(Phase.NONE), 2.0 * BF16 * parameters
    return (
        [moved(w, "gradients.flatten", "copy", forward("cat"), bytes_=both)],
        [moved(w, "gradients.unflatten", "copy", forward("cat"), bytes_=both)],
    )
