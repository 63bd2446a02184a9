"""Norms and attention of the `fused` implementation, whole or shared by tensor- and context-parallel ranks.

Tensor parallelism shares the heads (`products`). The down-projections of latent attention stay whole: every rank makes
the compressed queries, keys and values of its own tokens, which are gathered before they are expanded, as Megatron-Core
does. Context parallelism is the ring of Megatron-Core's and Transformer Engine's default (arXiv 2310.01889): in each
of `context` steps a rank attends from its queries to the keys and values of one rank of the ring, while those of the
next are on their way; backward also the gradients of keys and values go around, and one hop more, home. A step ends
when its attention and its hop are done. Tokens lie in zig-zag (`moesim.parallel.ownership`): the first step is causal
over a rank's own tokens, every other one is half of a full square, so that all cost the same.
"""

from functools import partial

import numpy as np

from moesim.program.gemms import ACTIVATION_BYTES, collective, column_parallel, projection, row_parallel
from moesim.program.operations import SIDE, Operation, fork, join
from moesim.program.sizes import Passes, Step, chain
from moesim.program.writer import KernelWriter
from moesim.results.spans import Collective, Part
from moesim.scenario.model import LocalGlobal, Mla


def norm(w: KernelWriter, name: str, tokens: int, width: int) -> Passes:
    """RMS norm fused with the residual add: the sum is written beside the normalised rows."""
    residual = 2 * tokens * width * ACTIVATION_BYTES
    w = w.at(Part.NORM)
    forward = w.repeated_by("rms_norm").moved(name, "rms_norm", bytes_=2 * residual)
    return [forward], [w.backward.moved(name, "rms_norm", bytes_=2 * residual)]


def _query_key_value(w: KernelWriter, step: Step) -> Passes:
    model = step.model
    h, heads, d = model.hidden, model.heads, model.head_dim
    if not isinstance(model.attention, Mla):
        return column_parallel(w, "qkv", step, k=h, n=(heads + 2 * model.kv_heads) * d)
    mla = model.attention
    value, rope = mla.value_head_dim or d, mla.rope_head_dim
    up = w.repeated_by("mla_up_projection")
    query: list[Passes]
    if mla.q_lora_rank is None:
        query = [column_parallel(w, "q", step, k=h, n=heads * (d + rope))]
    else:
        query = [
            projection(w, "q_down", m=step.tokens, k=h, n=mla.q_lora_rank),
            norm(w, "q_norm", step.tokens, mla.q_lora_rank),
            column_parallel(up, "q_up", step, k=mla.q_lora_rank, n=heads * (d + rope)),
        ]
    compressed = mla.kv_lora_rank + rope
    return chain(
        *query,
        projection(w, "kv_down", m=step.tokens, k=h, n=compressed),
        norm(w, "kv_norm", step.tokens, mla.kv_lora_rank),
        column_parallel(up, "kv_up", step, k=mla.kv_lora_rank, n=heads * (d + value), width=compressed),
    )


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


def _core_attention(w: KernelWriter, step: Step) -> Passes:
    """Fused attention over the pairs that `keys_per_query` counts; global tokens cost as a short causal pass."""
    model = step.model
    extra = model.attention.rope_head_dim if isinstance(model.attention, Mla) else 0
    attend = partial(
        w.attention,
        heads=step.heads,
        kv_heads=step.kv_heads,
        head_dim=model.head_dim + extra,
        value_dim=_value_width(step),
    )
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


def _ring_attention(w: KernelWriter, step: Step, attend: "partial[Operation]") -> Passes:
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
    """Norm, projections, rotary embedding, attention and output projection."""
    model = step.model
    mla = isinstance(model.attention, Mla)
    rotated = model.attention.rope_head_dim if isinstance(model.attention, Mla) else model.head_dim
    rotary = (step.heads + (1 if mla else step.kv_heads)) * rotated
    rope = (
        [w.memory("rotary", "copy", rows=step.gathered_tokens, width=rotary)],
        [w.backward.memory("rotary", "copy", rows=step.gathered_tokens, width=rotary)],
    )
    return chain(
        norm(w, "attention_norm", step.tokens, model.hidden),
        _query_key_value(w, step),
        rope,
        _core_attention(w, step),
        row_parallel(w, "attention_out", step, k=model.heads * _value_width(step), n=model.hidden),
    )
