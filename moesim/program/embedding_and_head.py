"""Both ends of the model by the switches: embedding, final norm, logits and loss."""

import math

from moesim.kernels.unprofiled import SINGLY
from moesim.program.gemms import ACTIVATION_BYTES, collective, column_parallel, gather_tokens, scatter_tokens
from moesim.program.host import backward, forward
from moesim.program.norms_and_rotary import norm
from moesim.program.operations import Operation
from moesim.program.sizes import Passes, Step, chain
from moesim.program.writer import BF16, FP32, KernelWriter
from moesim.results.spans import Collective, Part, Phase
from moesim.scenario.base import BYTES_PER_ELEMENT

# Megatron-Core's cross entropy over shares of the vocabulary, in fp32: (name, kind, bytes per logit, operation). A
# number of each row beside the logits is a broadcast operand (`SINGLY`), and a cast to bf16 is vectorised, as traced.
ROWWISE = float(SINGLY[FP32])
PARALLEL = (
    ("cast", "cast", BF16 + FP32, "cast"),
    ("max", "reduce", FP32, "reduce"),
    ("shift", "mul", ROWWISE, "plain"),
    ("exp", "elementwise", 2 * FP32, "plain"),
    ("sum", "reduce", FP32, "reduce"),
    ("divide", "mul", ROWWISE, "plain"),
)
PARALLEL_BACKWARD = (("scale", "mul", ROWWISE, "mul"), ("cast", "elementwise", BF16 + FP32, "cast"))


def embedding_part(w: KernelWriter, step: Step) -> Passes:
    """Token embedding; tensor ranks look up their share of the vocabulary for all tokens and add up.

    By torch its gradient starts from a table of zeros; tables of positions, where a step makes them once.
    """
    rows, width = step.gathered_tokens, step.model.hidden
    ahead = w.memory("embedding", "embedding", forward("module", "index_select"), rows=rows, width=width)
    kind = "embedding" if step.switches.embedding == "gather" else "embedding_backward"
    back = w.backward.memory("embedding", kind, backward("index_select"), rows=rows, width=width)
    tables = [w.small("positions", forward(*["plain"] * 18), count=18)] if step.switches.rotary == "cached" else []
    return (
        [ahead, *scatter_tokens(w, "embedding.scatter", step, width=width), *tables],
        [*gather_tokens(w.backward, "embedding.gather", step, width=width), back],
    )


def head_part(w: KernelWriter, step: Step) -> Passes:
    """Final norm, logits and mean cross entropy; in chunks, a weight's gradients are added up chunk by chunk."""
    model, chunks = step.model, step.switches.loss_chunks
    columns = math.ceil(model.vocab / step.tensor)
    logits = column_parallel(w, "head", step, k=model.hidden, n=model.vocab, dtype=w.wide_dtype)
    more: Passes = ([], [])
    if chunks > 1:
        late, size = w.during(Phase.WEIGHT_GRADIENT), 3.0 * BF16 * columns * model.hidden
        more = ([], [late.moved("head.chunks", "elementwise", backward("accumulate"), bytes_=(chunks - 1) * size)])
    return chain(
        norm(w, "final_norm", step, tokens=step.tokens, width=model.hidden), more, logits, _loss(w.at(Part.LOSS), step)
    )


def _loss(w: KernelWriter, step: Step) -> Passes:
    """Mean cross entropy; tensor ranks with a share of the vocabulary add up maxima, sums and the targets' logits."""
    ways = {"fused": _in_place, "fp32": _in_fp32, "parallel": _step_by_step}
    ahead, back = ways[step.switches.loss](w, step)
    if step.tensor == 1:
        return ahead, back
    assert step.links is not None
    prepared = step.links.reduce(step.tensor_peers, float(step.gathered_tokens * BYTES_PER_ELEMENT["fp32"]))
    sums = [
        collective(w, f"cross_entropy.{what}", step, prepared, step.tensor_peers, kind=Collective.ALL_REDUCE)
        for what in ("max", "sum", "target")
    ]
    return [*sums, *ahead], back


def _in_place(w: KernelWriter, step: Step) -> Passes:
    """The logits read once, and their gradients written in their place."""
    logits = step.gathered_tokens * math.ceil(step.model.vocab / step.tensor) * ACTIVATION_BYTES
    ahead = [w.moved("cross_entropy", "elementwise", bytes_=logits)]
    return ahead, [w.backward.moved("cross_entropy", "elementwise", bytes_=2 * logits)]


def _in_fp32(w: KernelWriter, step: Step) -> Passes:
    """A copy in fp32, torch's cross entropy of it, and the gradient back in bf16."""
    tokens, columns = step.gathered_tokens, math.ceil(step.model.vocab / step.tensor)
    cast = float(BF16 + FP32) * tokens * columns
    shape, name = {"rows": tokens, "width": columns}, "cross_entropy"
    return chain(
        (
            [w.moved("logits.cast", "cast", forward("view", "cast"), bytes_=cast)],
            [w.backward.moved("logits.cast", "elementwise", backward("cast", "view"), bytes_=cast)],  # vectorised
        ),
        (
            [w.memory(name, "cross_entropy_fp32", forward(name), **shape)],
            [w.backward.memory(name, "cross_entropy_fp32_backward", backward(name), **shape)],
        ),
        ([w.small("loss", forward("mul"))], [w.backward.small("loss", backward("mul", "mul"), count=2)]),
    )


def _step_by_step(w: KernelWriter, step: Step) -> Passes:
    """In fp32 kernel by kernel, the last result in place of the logits, and the gradient back in bf16."""
    logits = float(step.gathered_tokens * math.ceil(step.model.vocab / step.tensor))
    ahead: list[Operation] = [
        w.moved(f"cross_entropy.{name}", kind, forward(call), bytes_=bytes_ * logits)
        for name, kind, bytes_, call in PARALLEL
    ]
    back = [
        w.backward.moved(f"cross_entropy.{name}", kind, backward(call), bytes_=bytes_ * logits)
        for name, kind, bytes_, call in PARALLEL_BACKWARD
    ]
    return ahead, back
