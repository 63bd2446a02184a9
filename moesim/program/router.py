"""The router by the switches: its gate's product, and one kernel behind it or one for each step."""

from moesim.program.gemms import projection
from moesim.program.norms import norm, summed_gradients
from moesim.program.sizes import Passes, Step, chain
from moesim.program.torch_host import backward, forward
from moesim.program.torch_kernels import BF16, FP32, INT64, issued, moved, small
from moesim.program.writer import KernelWriter
from moesim.scenario.base import BYTES_PER_ELEMENT


def router_part(w: KernelWriter, step: Step) -> Passes:
    """Norm, gate product, affinities, and the selected experts with their gates."""
    model, tokens = step.model, step.tokens
    normed = norm(w, "ffn_norm", step, tokens=tokens, width=model.hidden)
    if step.switches.router == "unfused":
        return chain(normed, _kernel_by_kernel(w, step))
    scores = tokens * model.experts * BYTES_PER_ELEMENT["fp32"]
    select = (
        [w.moved("router.topk", "elementwise", bytes_=2 * scores)],
        [w.backward.moved("router.topk", "elementwise", bytes_=3 * scores)],
    )
    return chain(
        normed, summed_gradients(w, "router.branch", step, tokens=tokens), *_gate_product(w, step)[:-1], select
    )


def _gate_product(w: KernelWriter, step: Step) -> list[Passes]:
    """Scores of all experts in fp32: by a product in fp32 of casts, or by one in bf16 whose result is cast, last."""
    model, tokens = step.model, step.tokens
    wide = step.switches.router_dtype == "fp32"
    dtype = "fp32" if wide else w.wide_dtype
    product = projection(w, "router.gate", m=tokens, k=model.hidden, n=model.experts, dtype=dtype, module=False)
    values = float(model.hidden * (tokens + model.experts)) if wide else float(tokens * model.experts)
    bytes_ = (BF16 + FP32) * values
    cast = (
        [moved(w, "router.cast", "cast", forward("module", "cast"), bytes_=bytes_)],
        [moved(w.backward, "router.cast", "elementwise", backward("cast"), bytes_=bytes_)],
    )
    return [cast, product, ([], [])] if wide else [product, cast]


def _kernel_by_kernel(w: KernelWriter, step: Step) -> Passes:
    """Gate product, affinities, top-k and the gates of the selected."""
    model, tokens = step.model, step.tokens
    scores, chosen = float(tokens * model.experts), float(tokens * model.top_k)
    picked = (INT64 + 2 * FP32) * chosen
    topk = issued(w.memory("router.topk", "topk", rows=tokens, width=model.experts), forward("topk", "view"))
    gather = moved(w, "router.gather", "elementwise", forward("gather"), bytes_=picked)
    gather_back = [
        moved(w.backward, "router.gather", "zero", backward("gather"), bytes_=FP32 * scores),
        moved(w.backward, "router.scatter", "elementwise", 0.0, bytes_=picked),
    ]
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
        summed_gradients(w, "router.branch", step, tokens=tokens),
        *_gate_product(w, step),
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
