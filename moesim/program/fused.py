"""`implementation: {kind: fused}`: an ideal training stack, a bound, as operations.

What it assumes. Kernels are fused where such stacks fuse them: residual add with the norm, rotary embedding in one
pass, softmax and top-k of the router in one kernel, SiLU-times-gate (in FP8 with the casts of its result, and of the
gradients of its inputs: `fp8_casts`) in one kernel, the weighted sum of a token's
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

Tensor-parallel ranks share products as in `products`, context-parallel ranks attention as in `fused_attention`. The
router is whole on every rank and routes the tokens that the rank holds. Expert-tensor ranks hold slices of the same
experts: behind the dispatch they gather each other's arrived copies, before the combine they reduce and scatter the
partial sums (Megatron-Core's all-to-all dispatcher).

Legend: see `moesim.program.loads`.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moesim.kernels import KernelModel
from moesim.program.fp8_casts import NO_CASTS, fp8_casts
from moesim.program.fused_attention import attention_part, norm
from moesim.program.gemms import (
    ACTIVATION_BYTES,
    collective,
    column_parallel,
    gather_tokens,
    projection,
    row_parallel,
    scatter_tokens,
)
from moesim.program.host import FREE_HOST, HostModel
from moesim.program.loads import LayerLoads
from moesim.program.operations import SIDE, Operation, fork, join, transfer
from moesim.program.sizes import Passes, Step, chain
from moesim.program.writer import KernelWriter
from moesim.results.spans import Collective, Part, Phase
from moesim.scenario.base import BYTES_PER_ELEMENT


def host_model(kernels: KernelModel) -> HostModel:
    """The host never limits, whatever the GPU."""
    del kernels
    return FREE_HOST


def _activation_bytes(w: KernelWriter, inputs: int) -> tuple[float, float]:
    """Bytes per value of the result, forward and backward, of an activation of so many inputs.

    All inputs read and one result written; backward those read and the gradients written. In FP8 the result is written
    in FP8, and each gradient in FP8 both ways, which are as many bytes as in bf16.
    """
    result = BYTES_PER_ELEMENT["fp8"] if w.dtype == "fp8" else ACTIVATION_BYTES
    return inputs * ACTIVATION_BYTES + result, (2 * inputs + 1) * ACTIVATION_BYTES


class _GatedNetwork:
    """W2(silu(W1 x) * W3 x) with W1 and W3 in one product and the activation in one kernel, shared by tensor ranks.

    Where the model's networks are not gated, W2 act(W1 x).
    """

    def __init__(self, w: KernelWriter, name: str, step: Step, *, width: int) -> None:
        self.w, self.name, self.step = w, name, step
        self.width = width // step.tensor
        self.inputs = step.model.ffn_matrices - 1
        forward, backward = _activation_bytes(w, self.inputs)
        inner = step.gathered_tokens * self.width
        self.activation: Passes = (
            [w.repeated_by("swiglu").moved(f"{name}.activation", "elementwise", bytes_=forward * inner)],
            [w.backward.moved(f"{name}.activation", "elementwise", bytes_=backward * inner)],
        )

    def in_line(self) -> Passes:
        """All of it on the writer's chain, collectives beside products where they can be."""
        w, name, step, hidden = self.w, self.name, self.step, self.step.model.hidden
        width = self.width * step.tensor
        return chain(
            column_parallel(w, f"{name}.w13", step, k=hidden, n=self.inputs * width, gradient_is_turned=True),
            self.activation,
            row_parallel(w, f"{name}.w2", step, k=width, n=hidden, input_is_fp8=True),
        )

    def products(self) -> Passes:
        """The kernels alone, for gathered tokens."""
        m, hidden = self.step.gathered_tokens, self.step.model.hidden
        return chain(
            projection(self.w, f"{self.name}.w13", m=m, k=hidden, n=self.inputs * self.width, gradient_is_turned=True),
            self.activation,
            projection(self.w, f"{self.name}.w2", m=m, k=self.width, n=hidden, input_is_fp8=True),
        )

    def enter(self) -> Passes:
        """The gathers before the kernels; backward those of the result's gradient and, once more, of the input."""
        w, name, step, hidden = self.w, self.name, self.step, self.step.model.hidden
        backward = gather_tokens(w.backward, f"{name}.w2.gather", step, width=hidden)
        backward += gather_tokens(w.during(Phase.WEIGHT_GRADIENT), f"{name}.w13.gather.wgrad", step, width=hidden)
        return gather_tokens(w, f"{name}.w13.gather", step, width=hidden), backward

    def leave(self) -> Passes:
        """The reduce-scatters behind the kernels."""
        w, name, step, hidden = self.w, self.name, self.step, self.step.model.hidden
        forward = scatter_tokens(w, f"{name}.w2.scatter", step, width=hidden)
        return forward, scatter_tokens(w.backward, f"{name}.w13.scatter", step, width=hidden)


def dense_ffn_part(w: KernelWriter, step: Step) -> Passes:
    """Norm and the dense feed-forward network."""
    model = step.model
    return chain(
        norm(w, "ffn_norm", step.tokens, model.hidden),
        _GatedNetwork(w, "ffn", step, width=model.dense_intermediate).in_line(),
    )


def _router_part(w: KernelWriter, step: Step) -> Passes:
    model, tokens = step.model, step.tokens
    scores = tokens * model.experts * BYTES_PER_ELEMENT["fp32"]
    select = (
        [w.moved("router.topk", "elementwise", bytes_=2 * scores)],
        [w.backward.moved("router.topk", "elementwise", bytes_=3 * scores)],
    )
    return chain(
        norm(w, "ffn_norm", tokens, model.hidden),
        projection(w, "router.gate", m=tokens, k=model.hidden, n=model.experts, dtype=w.wide_dtype),
        select,
    )


def _experts_part(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """The routed experts of every rank; durations follow the rows of its slots."""
    h, width = step.model.row_width, step.model.expert_intermediate // step.expert_tensor
    inputs = step.model.ffn_matrices - 1
    activation, gradient = _activation_bytes(w, inputs)
    slots, rows = loads.slot_rows_MSRP, loads.rows_MSR
    inner_MSR = rows * float(width)
    casts13 = casts2 = NO_CASTS
    if w.dtype == "fp8":
        arrives = step.quantise and step.remote  # as the dispatch carries it, both ways
        casts13 = fp8_casts(
            w,
            "experts.w13",
            inputs=rows * float(h),
            outputs=inner_MSR * inputs,
            input_is_fp8=arrives,
            gradient_is_turned=True,
        )
        casts2 = fp8_casts(
            w, "experts.w2", inputs=inner_MSR, outputs=rows * float(h), input_is_fp8=True, gradient_is_fp8=arrives
        )
    forward = [
        *casts13.forward,
        w.grouped_gemm("experts.w13", rows=slots, k=h, n=inputs * width),
        w.repeated_by("swiglu").moved("experts.activation", "elementwise", bytes_=activation * inner_MSR),
        w.grouped_gemm("experts.w2", rows=slots, k=width, n=h),
    ]
    backward = [
        *casts2.input_gradient,
        w.grouped_gemm("experts.w2", rows=slots, k=width, n=h, direction="dgrad"),
        *casts2.weight_gradient,
        w.grouped_gemm("experts.w2", rows=slots, k=width, n=h, direction="wgrad"),
        w.backward.moved("experts.activation", "elementwise", bytes_=gradient * inner_MSR),
        w.grouped_gemm("experts.w13", rows=slots, k=h, n=inputs * width, direction="dgrad"),
        *casts13.weight_gradient,
        w.grouped_gemm("experts.w13", rows=slots, k=h, n=inputs * width, direction="wgrad"),
    ]
    return forward, backward


def _latent_part(w: KernelWriter, step: Step) -> tuple[Passes, Passes]:
    """The projections of tokens to the width of the experts' rows, and of their results back; none for most models."""
    model = step.model
    if not model.expert_hidden:
        return ([], []), ([], [])
    hidden, width, tokens = model.hidden, model.expert_hidden, step.tokens
    down = projection(w, "experts.down", m=tokens, k=hidden, n=width)
    return down, projection(w, "experts.up", m=tokens, k=width, n=hidden)


def _sum_bytes(read_rows: NDArray[Any], written_rows: NDArray[Any] | int, hidden: int) -> NDArray[np.float64]:
    """A fused weighted sum reads every row once and writes every sum once."""
    return np.asarray((read_rows + written_rows) * float(hidden * ACTIVATION_BYTES))


class _Shared(NamedTuple):
    """One direction of the shared experts: what comes before the dispatch, beside it, and behind the combine."""

    before: list[Operation]
    beside: list[Operation]
    behind: list[Operation]


def _shared_experts(w: KernelWriter, step: Step) -> tuple[_Shared, _Shared]:
    """Forward, backward. Beside the dispatch their collectives lie around it, as in Megatron-Core's overlap."""
    model = step.model
    if not model.shared_experts:
        return _Shared([], [], []), _Shared([], [], [])
    width = model.shared_width
    if not (step.remote and step.shared_beside):
        forward, backward = _GatedNetwork(w, "shared", step, width=width).in_line()
        return _Shared([], forward, []), _Shared([], backward, [])
    network = _GatedNetwork(w.at(Part.SHARED_EXPERTS, chain=SIDE), "shared", step, width=width)
    enter, products, leave = network.enter(), network.products(), network.leave()
    return _Shared(enter[0], products[0], leave[0]), _Shared(enter[1], products[1], leave[1])


def _send(loads: LayerLoads, w: KernelWriter, *, beside: list[Operation]) -> list[Operation]:
    """Rows to their experts, kernels beside that, and then to the other slices of these experts."""
    way: dict[str, Any] = {"layer": w.layer, "phase": w.phase, "part": w.part}
    out = [transfer(w.label(w.part).name, "dispatch_exposed", loads.dispatch_M, peers=loads.peers, **way)]
    way |= {"collective": Collective.ALL_GATHER}
    shares = [transfer(w.label("experts.gather").name, "tensor", loads.gather_M, peers=loads.slice_peers, **way)]
    return [*out[: len(loads.dispatch_M)], *beside, *shares[: len(loads.gather_M)]]


def _return(loads: LayerLoads, w: KernelWriter) -> list[Operation]:
    """The way back of `_send`."""
    way: dict[str, Any] = {"layer": w.layer, "phase": w.phase, "part": w.part}
    back = [transfer(w.label(w.part).name, "combine_exposed", loads.combine_M, peers=loads.peers, **way)]
    way |= {"collective": Collective.REDUCE_SCATTER}
    shares = [transfer(w.label("experts.scatter").name, "tensor", loads.scatter_M, peers=loads.slice_peers, **way)]
    return [*shares[: len(loads.scatter_M)], *back[: len(loads.combine_M)]]


def _moe_forward(
    w: KernelWriter, step: Step, loads: LayerLoads, router: list[Operation], shared: _Shared, experts: list[Operation]
) -> list[Operation]:
    h, tokens, layer = step.model.row_width, step.tokens, w.layer
    p = w.at(Part.PERMUTE)
    out = [*router]
    if not step.remote:
        out += [p.memory("permute", "permute", rows=loads.rows_MSR, width=h), *shared.beside, *experts]
        return [*out, p.moved("unpermute", "elementwise", bytes_=_sum_bytes(loads.rows_MSR, tokens, h))]
    out += shared.before
    if step.quantise:
        out.append(p.memory("quantise", "quantise", rows=tokens, width=h))
    out.append(p.memory("permute", "permute", rows=loads.copies_out_MSR, width=h))
    out += [fork(layer=layer), *_send(loads, w.at(Part.DISPATCH), beside=shared.beside)]
    out += [p.memory("expand", "permute", rows=loads.rows_MSR, width=h), *experts]
    out.append(p.moved("reduce", "elementwise", bytes_=_sum_bytes(loads.rows_MSR, loads.copies_in_MSR, h)))
    out += [*_return(loads, w.at(Part.COMBINE)), join(layer=layer), *shared.behind]
    return [*out, p.moved("unpermute", "elementwise", bytes_=_sum_bytes(loads.copies_out_MSR, tokens, h))]


def _moe_backward(
    w: KernelWriter, step: Step, loads: LayerLoads, router: list[Operation], shared: _Shared, experts: list[Operation]
) -> list[Operation]:
    h, tokens, layer = step.model.row_width, step.tokens, w.layer
    p = w.at(Part.PERMUTE)
    if not step.remote:
        spread = p.backward.memory("unpermute", "permute", rows=loads.rows_MSR, width=h)
        gather = p.backward.moved("permute", "elementwise", bytes_=_sum_bytes(loads.rows_MSR, tokens, h))
        return [spread, *shared.beside, *experts, gather, *router]
    out = [*shared.before]
    if step.quantise:
        out.append(p.backward.memory("quantise", "quantise", rows=tokens, width=h))
    out.append(p.backward.memory("unpermute", "permute", rows=loads.copies_out_MSR, width=h))
    out += [fork(layer=layer), *_send(loads, w.at(Part.COMBINE).backward, beside=shared.beside)]
    out += [p.backward.memory("reduce", "permute", rows=loads.rows_MSR, width=h), *experts]
    out.append(p.backward.moved("expand", "elementwise", bytes_=_sum_bytes(loads.rows_MSR, loads.copies_in_MSR, h)))
    out += [*_return(loads, w.at(Part.DISPATCH).backward), join(layer=layer)]
    out += shared.behind
    out.append(p.backward.moved("permute", "elementwise", bytes_=_sum_bytes(loads.copies_out_MSR, tokens, h)))
    return out + router


def moe_part(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """Router, shared experts, routed experts and what moves tokens between them."""
    router_forward, router_backward = _router_part(w.at(Part.ROUTER), step)
    down, up = _latent_part(w.at(Part.EXPERTS), step)
    shared_forward, shared_backward = _shared_experts(w.at(Part.SHARED_EXPERTS), step)
    experts_forward, experts_backward = _experts_part(w.at(Part.EXPERTS), step, loads)
    forward = _moe_forward(w, step, loads, [*router_forward, *down[0]], shared_forward, experts_forward)
    backward = _moe_backward(w, step, loads, [*down[1], *router_backward], shared_backward, experts_backward)
    return [*forward, *up[0]], [*up[1], *backward]


def layer_part(w: KernelWriter, step: Step, loads: LayerLoads | None) -> Passes:
    """One transformer layer; `loads` is None for a dense layer."""
    attention = attention_part(w.at(Part.ATTENTION), step)
    if loads is None:
        return chain(attention, dense_ffn_part(w.at(Part.DENSE_FFN), step))
    return chain(attention, moe_part(w, step, loads))


def embedding_part(w: KernelWriter, step: Step) -> Passes:
    """Token embedding; tensor ranks look up their share of the vocabulary for all tokens and add up."""
    rows, width = step.gathered_tokens, step.model.hidden
    forward = [w.memory("embedding", "embedding", rows=rows, width=width)]
    backward = [w.backward.memory("embedding", "embedding", rows=rows, width=width)]
    return (
        [*forward, *scatter_tokens(w, "embedding.scatter", step, width=width)],
        [*gather_tokens(w.backward, "embedding.gather", step, width=width), *backward],
    )


def _loss(w: KernelWriter, step: Step) -> Passes:
    """Mean cross entropy; tensor ranks with a share of the vocabulary add up maxima, sums and the targets' logits."""
    rows = step.gathered_tokens
    logits = rows * math.ceil(step.model.vocab / step.tensor) * ACTIVATION_BYTES
    forward = [w.moved("cross_entropy", "elementwise", bytes_=logits)]
    backward = [w.backward.moved("cross_entropy", "elementwise", bytes_=2 * logits)]
    if step.tensor == 1:
        return forward, backward
    assert step.links is not None
    prepared = step.links.reduce(step.tensor_peers, float(rows * BYTES_PER_ELEMENT["fp32"]))
    sums = [
        collective(w, f"cross_entropy.{what}", step, prepared, step.tensor_peers, kind=Collective.ALL_REDUCE)
        for what in ("max", "sum", "target")
    ]
    return [*sums, *forward], backward


def head_part(w: KernelWriter, step: Step) -> Passes:
    """Final norm, logits and mean cross entropy."""
    model = step.model
    return chain(
        norm(w, "final_norm", step.tokens, model.hidden),
        column_parallel(w, "head", step, k=model.hidden, n=model.vocab, dtype=w.wide_dtype),
        _loss(w.at(Part.LOSS), step),
    )


def accumulation(w: KernelWriter, *, parameters: float) -> list[Operation]:
    """Nothing: the weight-gradient product adds into the buffer, micro-batch after micro-batch."""
    del w, parameters
    return []


def flat_copies(w: KernelWriter, *, parameters: float) -> tuple[list[Operation], list[Operation]]:
    """Nothing: gradients are written into the buffer that is reduced."""
    del w, parameters
    return [], []
