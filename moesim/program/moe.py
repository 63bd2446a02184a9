"""A layer with experts: router, permutation, dispatch, experts, combine, shared experts; and the order of them.

One micro-batch, forward:
    router     norm, gate GEMM, selection: one kernel behind the GEMM, or one for each step
    permute    [quantise to the dispatch dtype,] rows that leave      (`moesim.program.permutation`)
    dispatch   [counts, their read-back,] transfer   | beside it, where the software does so: shared experts
    permute    the arrived copies in the order of the experts
    experts    W1/W3, activation, W2                                  (`moesim.program.networks`)
    permute    results in the order of arrival
    combine    transfer
    permute    weighted sum of a token's results
The backward pass walks the same way back: the gradient of combine travels as a dispatch and the gradient of dispatch as
a combine. With one expert-parallel rank there is no transfer and rows are gathered once.

The router is whole on every rank and routes the tokens that the rank holds. Expert-tensor ranks hold slices of the same
experts: behind the dispatch they gather each other's arrived copies, before the combine they reduce and scatter the
partial sums (Megatron-Core's all-to-all dispatcher).

Legend: see `moesim.program.loads`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moesim.program.gemms import cast_along, cast_both_ways, projection
from moesim.program.host import backward, forward, in_phase
from moesim.program.loads import LayerLoads
from moesim.program.networks import Shared, experts_part, latent_part, shared_experts, shares_casts
from moesim.program.norms_and_rotary import branch, norm, residual, summed_gradients
from moesim.program.operations import SIDE, Operation, Transfer, fork, join, readback, transfer
from moesim.program.permutation import expand, permute, reduce, unpermute
from moesim.program.sizes import Passes, Step, chain, repeated_whole
from moesim.program.writer import BF16, FP32, INT64, KernelWriter
from moesim.results.spans import Collective, Part, Phase
from moesim.scenario.base import BYTES_PER_ELEMENT


def router_part(w: KernelWriter, step: Step) -> Passes:
    """Norm, gate GEMM, affinities, and the selected experts with their gates."""
    model, tokens = step.model, step.tokens
    normed = norm(w, "ffn_norm", step, tokens=tokens, width=model.hidden)
    if step.switches.router == "unfused":
        return chain(normed, _kernel_by_kernel(w, step))
    scores = tokens * model.experts * BYTES_PER_ELEMENT["fp32"]
    select = (
        [w.moved("router.topk", "elementwise", bytes_=2 * scores)],
        [w.backward.moved("router.topk", "elementwise", bytes_=3 * scores)],
    )
    return chain(normed, summed_gradients(w, "router.branch", step, tokens=tokens), *_gate_gemm(w, step)[:-1], select)


def _gate_gemm(w: KernelWriter, step: Step) -> list[Passes]:
    """Scores of all experts in fp32: by a GEMM in fp32 of casts, or by one in bf16 whose result is cast, last."""
    model, tokens = step.model, step.tokens
    wide = step.switches.router_dtype == "fp32"
    dtype = "fp32" if wide else w.wide_dtype
    gemm = projection(w, "router.gate", m=tokens, k=model.hidden, n=model.experts, dtype=dtype, module=False)
    values = float(model.hidden * (tokens + model.experts)) if wide else float(tokens * model.experts)
    bytes_ = (BF16 + FP32) * values
    cast = (
        [w.moved("router.cast", "cast", forward("module", "cast"), bytes_=bytes_)],
        [w.backward.moved("router.cast", "elementwise", backward("cast"), bytes_=bytes_)],
    )
    return [cast, gemm, ([], [])] if wide else [gemm, cast]


def _kernel_by_kernel(w: KernelWriter, step: Step) -> Passes:
    """Gate GEMM, affinities, top-k and the gates of the selected."""
    model, tokens = step.model, step.tokens
    scores, chosen = float(tokens * model.experts), float(tokens * model.top_k)
    picked = (INT64 + 2 * FP32) * chosen
    topk = w.memory("router.topk", "topk", forward("topk", "view"), rows=tokens, width=model.experts)
    gather = w.moved("router.gather", "elementwise", forward("gather"), bytes_=picked)
    gather_back = [
        w.backward.moved("router.gather", "zero", backward("gather"), bytes_=FP32 * scores),
        w.backward.moved("router.scatter", "elementwise", 0.0, bytes_=picked),
    ]
    each = 2 * FP32 * scores
    affinities: Passes
    if step.router.affinity == "sigmoid":
        affinities = (
            [w.moved("router.sigmoid", "elementwise", forward("silu"), bytes_=each)],
            [w.backward.moved("router.sigmoid", "elementwise", backward("silu"), bytes_=1.5 * each)],
        )
    else:
        shape = {"rows": tokens, "width": model.experts}
        affinities = (
            [w.memory("router.softmax", "softmax", forward("softmax"), **shape)],
            [w.backward.memory("router.softmax", "softmax_backward", backward("softmax"), **shape)],
        )
    if step.router.biased:
        affinities[0].append(w.moved("router.bias", "elementwise", forward("plain"), bytes_=each))
    return chain(
        summed_gradients(w, "router.branch", step, tokens=tokens),
        *_gate_gemm(w, step),
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
        [w.small(name, forward(*calls), count=len(calls))],
        [w.backward.small(name, backward(*backs), count=count)],
    )


def _exchange(w: KernelWriter, name: str, category: str, transfers_M: Sequence[Transfer], **more: Any) -> Operation:
    way: dict[str, Any] = {"layer": w.layer, "phase": w.phase, "part": w.part, **more}
    return transfer(w.label(name).name, category, tuple(transfers_M), launches=in_phase(w.phase, "exchange"), **way)


def counted_rows(w: KernelWriter, step: Step, loads: LayerLoads) -> list[Operation]:
    """The exchange of how many rows will come, and its read-back."""
    if loads.counts is None or not step.switches.counts:
        return []
    counted = w.at(Part.PERMUTE).at(Part.ROW_COUNTS)
    return [
        _exchange(counted, "dispatch.counts", "dispatch_exposed", (loads.counts,)),
        counted.small("dispatch.sums", forward("reduce", "reduce", "cat", "view", "view"), count=3),
        readback("dispatch.readback", layer=w.layer),
    ]


def send(loads: LayerLoads, w: KernelWriter, *, beside: list[Operation]) -> list[Operation]:
    """Rows to their experts, kernels beside that, and then to the other slices of these experts."""
    out = [_exchange(w, w.part, "dispatch_exposed", loads.dispatch_M, peers=loads.peers)] if loads.dispatch_M else []
    way = {"peers": loads.slice_peers, "collective": Collective.ALL_GATHER}
    shares = [_exchange(w, "experts.gather", "tensor", loads.gather_M, **way)] if loads.gather_M else []
    return [*out, *beside, *shares]


def send_back(loads: LayerLoads, w: KernelWriter) -> list[Operation]:
    """The way back of `send`."""
    way = {"peers": loads.slice_peers, "collective": Collective.REDUCE_SCATTER}
    shares = [_exchange(w, "experts.scatter", "tensor", loads.scatter_M, **way)] if loads.scatter_M else []
    back = [_exchange(w, w.part, "combine_exposed", loads.combine_M, peers=loads.peers)] if loads.combine_M else []
    return [*shares, *back]


def _quantised(w: KernelWriter, step: Step) -> Passes:
    """What the dispatch carries in FP8: tokens and, on the way back, gradients of the layer's result.

    With scales of the recipe; where shared experts take the same copies, gradients are cast both ways.
    """
    if not step.quantise:
        return [], []
    if w.recipe is None or not w.recipe.fuses:
        ways = [[each.memory("quantise", "quantise", rows=step.tokens, width=step.model.row_width)]
                for each in (w, w.backward)]  # fmt: skip
        return ways[0], ways[1]
    values = float(step.tokens * step.model.row_width)
    if shares_casts(w, step):
        return [cast_along(w, "quantise", values)], cast_both_ways(w.backward, "quantise", values)
    return [cast_along(w, "quantise", values)], [cast_along(w.backward, "quantise", values)]


def _remote(w: KernelWriter, step: Step, loads: LayerLoads, shared: tuple[Shared, Shared], experts: Passes) -> Passes:
    """Everything between router and latent projection where rows travel."""
    p = w.at(Part.PERMUTE)
    moves = permute(p, step, loads), expand(p, step, loads), reduce(p, step, loads)
    last = unpermute(p if step.switches.combine == "fused" else p.at(Part.COMBINE), step, loads)
    quantise = _quantised(p, step)
    ahead, behind = shared
    in_order = not (step.software.shared_beside or step.shared_beside)  # nothing of the layer runs beside anything
    begin, end = ([], []) if in_order else ([fork(layer=w.layer)], [join(layer=w.layer)])
    forward_pass = [*ahead.before, *quantise[0], *moves[0][0], *counted_rows(w.at(Part.DISPATCH), step, loads), *begin]
    forward_pass += [*send(loads, w.at(Part.DISPATCH), beside=ahead.beside), *moves[1][0], *experts[0], *moves[2][0]]
    forward_pass += [*send_back(loads, w.at(Part.COMBINE)), *end, *ahead.behind, *last[0], *ahead.last]
    backward_pass = [*quantise[1], *behind.last, *behind.before, *last[1], *begin]
    backward_pass += send(loads, w.at(Part.COMBINE).backward, beside=behind.beside)
    home = send_back(loads, w.at(Part.DISPATCH).backward)
    early = experts[1]
    if step.weights_beside:  # what ran beside the experts is waited for, then these GEMMs run beside the way back
        put_off = [operation.phase is Phase.WEIGHT_GRADIENT for operation in experts[1]]
        early = [operation for operation, later in zip(experts[1], put_off, strict=True) if not later]
        late = [replace(each, chain=SIDE) for each, later in zip(experts[1], put_off, strict=True) if later]
        home, end = [join(layer=w.layer), fork(layer=w.layer), *home, *late], [join(layer=w.layer)]
    backward_pass += [*moves[2][1], *early, *moves[1][1], *home, *end]
    return forward_pass, [*backward_pass, *behind.behind, *moves[0][1]]


def _alone(w: KernelWriter, step: Step, loads: LayerLoads, shared: tuple[Shared, Shared], experts: Passes) -> Passes:
    """The same where all experts are on one rank."""
    p, (ahead, behind) = w.at(Part.PERMUTE), shared
    first, second, third = permute(p, step, loads), expand(p, step, loads), reduce(p, step, loads)
    last = unpermute(p if step.switches.combine == "fused" else p.at(Part.COMBINE), step, loads)
    return (
        [*first[0], *second[0], *ahead.beside, *experts[0], *third[0], *last[0], *ahead.last],
        [*behind.last, *last[1], *behind.beside, *third[1], *experts[1], *second[1], *first[1]],
    )


def moe_part(w: KernelWriter, step: Step, loads: LayerLoads) -> Passes:
    """Router, shared experts, routed experts and what moves tokens between them; residual sum."""
    rest = w.at(Part.ROUTER).at(Part.RESIDUAL)
    down, up = latent_part(w.at(Part.EXPERTS), step)
    shared = shared_experts(w.at(Part.SHARED_EXPERTS), step)
    flow = _remote if step.remote else _alone
    layer = chain(
        router_part(w.at(Part.ROUTER), step),
        down,
        flow(w, step, loads, shared, experts_part(w.at(Part.EXPERTS), step, loads)),
        up,
    )
    return chain(
        branch(rest, "ffn.branch", step),
        repeated_whole("moe", layer, but=Part.NORM),
        residual(rest, "ffn.residual", step),
    )
