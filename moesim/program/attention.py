"""Attention by the switches: projections, rotary embedding, the kernel itself, copies between orders, output.

Tensor parallelism shares the heads (`gemms`). The down-projections of latent attention stay whole: every rank makes
the compressed queries, keys and values of its own tokens, which are gathered before they are expanded, as Megatron-Core
does. Context parallelism is the ring of Megatron-Core's and Transformer Engine's default (arXiv 2310.01889): in each
of `context` steps a rank attends from its queries to the keys and values of one rank of the ring, while those of the
next are on their way; backward also the gradients of keys and values go around, and one hop more, home. A step ends
when its attention and its hop are done. Tokens lie in zig-zag (`moesim.parallel.mesh`): the first step is causal
over a rank's own tokens, every other one is half of a full square, so that all cost the same.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from moesim.kernels.unprofiled import DROPOUT, JOINED, SINGLY
from moesim.program.gemms import (
    ACTIVATION_BYTES,
    collective,
    column_parallel,
    gather_tokens,
    projection,
    row_parallel,
    scatter_tokens,
)
from moesim.program.host import backward, forward
from moesim.program.norms_and_rotary import branch, norm, residual, rotary
from moesim.program.operations import SIDE, Operation, fork, join
from moesim.program.sizes import Passes, Step, chain, repeated_whole
from moesim.program.writer import BF16, FP32, KernelWriter, accumulated, copied, reordered
from moesim.results.spans import Collective, Part, Phase
from moesim.scenario.model import LocalGlobal, Mla


def _repeated(w: KernelWriter, name: str, step: Step, *, narrow: int, wide: int) -> Passes:
    """`narrow` numbers per token repeated to `wide`; the gradients of the copies are summed."""
    tokens = step.gathered_tokens
    if not step.switches.repeat_keys or narrow == wide:
        return [], []
    bytes_ = float(BF16 * tokens * (narrow + wide))
    return (
        [reordered(w, name, forward("view", "view", "cat"), numbers=tokens * wide)],
        [w.backward.moved(name, "reduce", backward("reduce", "view", "view"), bytes_=bytes_)],
    )


def _normed(w: KernelWriter, name: str, step: Step, *, heads: int) -> Passes:
    """A norm of every head; fused with what turns it where norms are, and not of a software that has none."""
    if not step.model.query_key_norms or not step.software.query_key_norms or step.switches.norm == "fused":
        return [], []
    return norm(w, f"{name}.norm", step, tokens=step.gathered_tokens * heads, width=step.model.head_dim)


def _input(w: KernelWriter, name: str, step: Step, *, width: int) -> Passes:
    """What tensor ranks exchange for GEMMs that share an input: gathered once, also for the weights' gradients."""
    late = w.during(Phase.WEIGHT_GRADIENT)
    return (
        gather_tokens(w, f"{name}.gather", step, width=width),
        [
            *gather_tokens(late, f"{name}.gather.wgrad", step, width=width),
            *scatter_tokens(w.backward, f"{name}.scatter", step, width=width),
        ],
    )


def _separate(w: KernelWriter, step: Step) -> Passes:
    """Queries, keys and values by GEMMs of their own; all but the last add their gradients of the input."""
    model, tokens = step.model, step.gathered_tokens
    d, h = model.head_dim, model.hidden
    wide, narrow = step.heads * d, step.kv_heads * d
    fused = step.switches.rotary == "fused"

    def turn(name: str, width: int) -> Passes:
        return ([], []) if fused else rotary(w, f"{name}.rotary", step, width=width, head_dim=d)

    return chain(
        _input(w, "qkv", step, width=h),
        projection(w, "q", m=tokens, k=h, n=wide),
        accumulated(w, "q.branch", tokens, h),
        _normed(w, "q", step, heads=step.heads),
        turn("q", wide),
        projection(w, "k", m=tokens, k=h, n=narrow),
        accumulated(w, "k.branch", tokens, h),
        _normed(w, "k", step, heads=step.kv_heads),
        turn("k", narrow),
        projection(w, "v", m=tokens, k=h, n=narrow),
        rotary(w, "rotary", step, width=wide + narrow, head_dim=d) if fused else ([], []),
    )


def _joined(w: KernelWriter, step: Step) -> Passes:
    model, d = step.model, step.model.head_dim
    wide, narrow = step.heads * d, step.kv_heads * d
    whole = 2.0 * BF16 * step.gathered_tokens * (wide + 2 * narrow)
    pieces = [w.backward.moved("qkv.pieces", "copy", backward("cat"), bytes_=whole)]
    gemm = chain(
        column_parallel(w, "qkv", step, k=model.hidden, n=(model.heads + 2 * model.kv_heads) * d),
        ([], [] if step.switches.layout_copies == "none" else pieces),
        _normed(w, "q", step, heads=step.heads),
        _normed(w, "k", step, heads=step.kv_heads),
    )
    if step.switches.rotary == "fused":
        return chain(gemm, rotary(w, "rotary", step, width=wide + narrow, head_dim=d))
    return chain(
        gemm,
        rotary(w, "q.rotary", step, width=wide, head_dim=d),
        rotary(w, "k.rotary", step, width=narrow, head_dim=d),
    )


def _grouped_query(w: KernelWriter, step: Step) -> Passes:
    d = step.model.head_dim
    narrow, wide = step.kv_heads * d, step.heads * d
    return chain(
        _separate(w, step) if step.switches.qkv == "separate" else _joined(w, step),
        _repeated(w, "k.repeat", step, narrow=narrow, wide=wide),
        _repeated(w, "v.repeat", step, narrow=narrow, wide=wide),
    )


def _latent(w: KernelWriter, step: Step, mla: Mla) -> Passes:
    """Compressed queries, keys and values, and what they are expanded to."""
    model, tokens, copies = step.model, step.gathered_tokens, step.switches.layout_copies
    h, d, rope = model.hidden, model.head_dim, mla.rope_head_dim
    value, up = mla.value_head_dim or d, w.repeated_by("mla_up_projection")
    wide = model.heads * (d + rope)
    query: list[Passes]
    if mla.q_lora_rank is None and step.software.plain_queries:
        query = [column_parallel(w, "q", step, k=h, n=wide)]
        if copies != "none":
            query.append(accumulated(w, "q.branch", step.tokens, h))
    else:
        rank = mla.q_lora_rank or h
        query = [
            projection(w, "q_down", m=step.tokens, k=h, n=rank),
            ([], []) if copies == "none" else accumulated(w, "q_down.branch", step.tokens, h),
            norm(w, "q_norm", step, tokens=step.tokens, width=rank),
            column_parallel(up, "q_up", step, k=rank, n=wide),
        ]
    compressed, single = mla.kv_lora_rank + rope, copies == "single"
    shared = step.tensor == 1 or not (mla.q_lora_rank is None and step.software.plain_queries)  # what queries have cast
    return chain(
        *query,
        projection(w, "kv_down", m=step.tokens, k=h, n=compressed, input_is_shared=shared),
        copied(w, "latent", tokens * mla.kv_lora_rank) if single else ([], []),
        ([], [_joined_gradient(w, tokens * compressed)] if copies == "double" else []),
        norm(w, "kv_norm", step, tokens=step.tokens, width=mla.kv_lora_rank),
        column_parallel(up, "kv_up", step, k=mla.kv_lora_rank, n=model.heads * (d + value), width=compressed),
        _latent_rotary(w, step, rope),
        _pieces(w, "q.cat", step, width=step.heads * (d + rope), again=step.heads * (d + rope)),
        _pieces(
            w,
            "k.cat",
            step,
            width=step.heads * (d + rope),
            again=step.heads * (4 * d + 4 * rope + 2 * value),
            joined=_joined_keys(up, step, rope=rope),
        ),
    )


def _joined_gradient(w: KernelWriter, numbers: int) -> Operation:
    """Of the compressed keys and values, from its two pieces."""
    return w.backward.moved("latent", "copy", backward("cat"), bytes_=2.0 * BF16 * numbers)


def _latent_rotary(w: KernelWriter, step: Step, rope: int) -> Passes:
    if step.switches.rotary == "fused":
        return rotary(w, "rotary", step, width=(step.heads + 1) * rope, head_dim=rope)
    return chain(
        rotary(w, "k.rotary", step, width=rope, head_dim=rope, in_pairs=True),
        rotary(w, "q.rotary", step, width=step.heads * rope, head_dim=rope, in_pairs=True),
    )


def _joined_keys(w: KernelWriter, step: Step, *, rope: int) -> Passes:
    """Keys from what is expanded and from the part with a position, which all heads share, in one kernel; and back."""
    numbers = step.gathered_tokens * (step.heads * (2 * step.model.head_dim + rope) + rope)
    bytes_ = JOINED * BF16 * numbers
    return [w.moved("k.join", "copy", forward("cat"), bytes_=bytes_)], [
        w.backward.moved("k.join", "copy", backward("cat"), bytes_=bytes_)
    ]


def _pieces(w: KernelWriter, name: str, step: Step, *, width: int, again: int, joined: Passes | None = None) -> Passes:
    """The pieces with and without a position joined; where copies are double, gradients move as `again` numbers more.

    Of queries: their own order once more. Of keys, as autograd takes apart a tensor that was filled in place: whole
    gradients of the filled tensor, its pieces in an order of their own, and joined with those of the values. `joined`:
    what is left of it where nothing is copied.
    """
    tokens = step.gathered_tokens
    if step.switches.layout_copies == "none":
        return joined or ([], [])
    forward_pass, backward_pass = copied(w, name, tokens * width)
    if step.switches.layout_copies == "double":
        late = w.backward.moved(f"{name}.again", "copy", backward("cat", "view"), bytes_=2.0 * BF16 * tokens * again)
        backward_pass = [*backward_pass, late]
    return forward_pass, backward_pass


def _value_width(step: Step) -> int:
    attention = step.model.attention
    return (attention.value_head_dim or step.model.head_dim) if isinstance(attention, Mla) else step.model.head_dim


def _window(step: Step) -> tuple[int, int | None]:
    """Tokens that a query sees near itself, all of the sequence without a window, and the distance of global ones."""
    model = step.model
    if step.local and model.local is not None:
        return model.local.window, None
    if isinstance(model.attention, LocalGlobal):
        return model.attention.window, model.attention.global_every
    return step.sequence, None


def _attend(w: KernelWriter, step: Step, attend: "partial[Operation]") -> Callable[..., Operation]:
    """A kernel of attention with what it costs the host; one that draws a random number for each score is slower."""

    def kernel(name: str, **sizes: object) -> Operation:
        is_back = sizes.get("direction") == "backward"
        operation = attend(name, (backward if is_back else forward)("attention"), **sizes)
        if step.switches.dropout and operation.seconds_MSR is not None:
            slower = operation.seconds_MSR * DROPOUT["backward" if is_back else "forward"]
            return replace(operation, seconds_MSR=slower)
        return operation

    return kernel


def _unfused_attention(w: KernelWriter, step: Step, *, head_dim: int, value_dim: int) -> Passes:
    """GEMMs over all pairs, also those that the mask takes away; softmax in bf16, or between casts in fp32."""
    rows = step.batch * step.heads * step.sequence
    scores = float(rows) * step.sequence
    wide = w.wide_dtype
    gemms = projection(w, "attention.scores", m=rows, k=head_dim, n=step.sequence, dtype=wide, module=False)
    sums = projection(w, "attention.values", m=rows, k=step.sequence, n=value_dim, dtype=wide, module=False)
    back = w.backward
    in_fp32 = (
        [
            w.moved("attention.widen", "cast", forward("cast"), bytes_=(BF16 + FP32) * scores),
            w.moved("attention.mask", "mul", forward("plain"), bytes_=float(SINGLY[FP32]) * scores),
            w.moved("attention.softmax", "softmax", forward("softmax"), bytes_=2 * FP32 * scores),
            w.moved("attention.narrow", "elementwise", forward("cast"), bytes_=(BF16 + FP32) * scores),
        ],
        [
            back.moved("attention.widen", "cast", backward("cast"), bytes_=(BF16 + FP32) * scores),
            *[back.moved("attention.softmax", "elementwise", backward("mul"), bytes_=3 * FP32 * scores)] * 2,
            back.moved("attention.mask.copy", "copy", backward("mul") / 2, bytes_=2 * FP32 * scores),
            back.moved("attention.mask", "mul", backward("mul") / 2, bytes_=float(SINGLY[FP32]) * scores),
            back.moved("attention.narrow", "elementwise", backward("cast"), bytes_=(BF16 + FP32) * scores),
        ],
    )
    in_bf16 = (
        [
            w.moved("attention.mask", "elementwise", forward("plain"), bytes_=2 * BF16 * scores),
            w.moved("attention.softmax", "softmax", forward("softmax"), bytes_=2 * BF16 * scores),
        ],
        [
            back.moved("attention.softmax", "softmax_backward", backward("softmax"), bytes_=3 * BF16 * scores),
            back.moved("attention.mask", "elementwise", backward("mul"), bytes_=2 * BF16 * scores),
        ],
    )
    drop = (2.0 * BF16 + 1) * scores  # with one byte of the mask
    dropout = (
        [w.moved("attention.dropout", "elementwise", forward("mul"), bytes_=drop)],
        [back.moved("attention.dropout", "elementwise", backward("mul"), bytes_=drop)],
    )
    softmax = in_fp32 if step.switches.attention == "fp32" else in_bf16
    return chain(gemms, softmax, dropout if step.switches.dropout else ([], []), sums)


def core_attention(w: KernelWriter, step: Step) -> Passes:
    """Fused attention over the pairs that `keys_per_query` counts; global tokens cost as a short causal pass."""
    model = step.model
    extra = model.attention.rope_head_dim if isinstance(model.attention, Mla) else 0
    plain = partial(
        w.attention,
        heads=step.heads,
        kv_heads=step.heads if step.switches.repeat_keys else step.kv_heads,
        head_dim=model.head_dim + extra,
        value_dim=_value_width(step),
    )
    attend = _attend(w, step, plain)
    if step.switches.attention != "fused":
        return _unfused_attention(w, step, head_dim=model.head_dim + extra, value_dim=_value_width(step))
    if step.context > 1:
        return _ring_attention(w, step, attend)
    window, every = _window(step)
    if window >= step.sequence:
        forward = attend("attention", batch=step.batch, sequence=step.sequence)
        backward = attend("attention", batch=step.batch, sequence=step.sequence, direction="backward")
        return [forward], [backward]
    if step.local and model.local is not None and model.local.chunked:
        chunks = partial(attend, batch=step.batch * step.sequence / window, sequence=window)
        return [chunks("attention")], [chunks("attention", direction="backward")]
    # W keys for every query but the first W, which see half as many: so many whole squares of W queries by W keys.
    squares = step.batch * (step.sequence / window - (window - 1) / (2 * window))
    local = partial(attend, batch=squares, sequence=window, causal=False)
    forward_ops = [local("local")]
    backward_ops = [local("local", direction="backward")]
    if every is not None:
        # m = n - W tokens beyond the window: m * (m / every) / 2 pairs, those of a causal pass over m / sqrt(every).
        beyond = partial(attend, batch=step.batch, sequence=(step.sequence - window) / np.sqrt(every))
        forward_ops.append(beyond("global"))
        backward_ops.append(beyond("global", direction="backward"))
    return forward_ops, backward_ops


def _ring_attention(w: KernelWriter, step: Step, attend: Callable[..., Operation]) -> Passes:
    """`context` steps of attention, each beside the hop that brings the next keys and values."""
    rows, held = step.gathered_tokens, step.sequence // step.context
    extra = step.model.attention.rope_head_dim if isinstance(step.model.attention, Mla) else 0
    values = step.heads * _value_width(step)
    pair_width = step.kv_heads * (step.model.head_dim + extra + _value_width(step))
    pair_bytes = float(rows * pair_width * ACTIVATION_BYTES)  # keys and values of one rank
    own = {"batch": step.batch, "sequence": held, "causal": True}
    # Half of the keys for all queries, or all keys for half of the queries: twice half by half.
    other = {"batch": 2 * step.batch, "sequence": held // 2, "causal": False}
    # A step's result is weighed against the sum of those before: read both, write one.
    merge = w.moved("attention.merge", "elementwise", bytes_=3 * rows * values * ACTIVATION_BYTES)

    def hop(writer: KernelWriter, name: str, pairs: int) -> Operation:
        assert step.links is not None
        prepared = step.links.hop(step.context_peers, pairs * pair_bytes)
        kind = Collective.SEND_RECEIVE
        return collective(writer, name, step, prepared, step.context_peers, kind=kind, chain=SIDE)

    forward: list[Operation] = []
    backward: list[Operation] = []
    for index in range(step.context):
        sizes, first, last = (own if index == 0 else other), index == 0, index == step.context - 1
        kernels = [attend("attention", **sizes), *([] if first else [merge])]
        if last:
            forward += kernels
        else:
            forward += [fork(layer=w.layer), hop(w, "attention.ring", 1), *kernels, join(layer=w.layer)]
        # On their way beside a step: keys and values of the next, and the gradients that the one before has added to.
        moving = (not last) + (not first)
        backward += [fork(layer=w.layer), hop(w.backward, "attention.ring.backward", moving)]
        backward += [attend("attention", **sizes, direction="backward"), join(layer=w.layer)]
    backward += [fork(layer=w.layer), hop(w.backward, "attention.ring.backward", 1), join(layer=w.layer)]
    return forward, backward


def attention_part(w: KernelWriter, step: Step) -> Passes:
    """Norm, projections, rotary embedding, attention, output projection and residual sum."""
    mla, values = step.model.attention, step.heads * _value_width(step)
    alike = step.switches.layout_copies == "none"
    merge: Passes = ([], []) if alike else copied(w, "merge", step.gathered_tokens * values, both=False)
    return chain(
        branch(w.at(Part.RESIDUAL), "attention.branch", step),
        norm(w, "attention_norm", step, tokens=step.tokens, width=step.model.hidden),
        _latent(w, step, mla) if isinstance(mla, Mla) else _grouped_query(w, step),
        repeated_whole("core_attention", core_attention(w, step)),
        merge,
        row_parallel(w, "attention_out", step, k=step.model.heads * _value_width(step), n=step.model.hidden),
        residual(w.at(Part.RESIDUAL), "attention.residual", step),
    )
