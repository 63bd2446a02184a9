"""What a step does outside of layers, by the switches: embedding, final norm, logits and loss, and the optimizer.

The optimizer is Adam over the parameters that a rank updates, and the norm of their gradients. Of p parameters with
gradients of g bytes, moments of o, weights of w, and perhaps a master copy of 4:
    flat      one kernel: g + 4 o + 2 w; with a master copy g + 4 o + 8 and the weights written, w, or, where they are
              cast behind it, 4 + w by a kernel of its own; as fast as an elementwise kernel's bytes pass
    fused     the same bytes by torch's kernel, which is slower; tensors of few numbers take a launch's time
    foreach   torch's eight kernels over lists of tensors: 4 w + 2 g + 14 o, of the master copy where there is one
    loop      the same eight over every tensor
Behind it the weights of GEMMs in fp8 or fp4 are cast (`moesim.program.gemms`).
"""

import math
from dataclasses import replace

import numpy as np

from moesim.kernels import KernelModel
from moesim.kernels.unprofiled import SINGLY, adam_floor
from moesim.program.gemms import (
    ACTIVATION_BYTES,
    collective,
    column_parallel,
    gather_tokens,
    scatter_tokens,
    weight_casts,
)
from moesim.program.host import backward, forward
from moesim.program.norms_and_rotary import norm
from moesim.program.operations import Block, Operation
from moesim.program.sizes import Passes, Step, chain
from moesim.program.writer import BF16, FP32, KernelWriter
from moesim.results.spans import Collective, Part, Phase
from moesim.scenario import Scenario
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


TENSORS_OF_LAYER = 12  # of weights, about: what a loop over them launches


def optimizer_block(
    scenario: Scenario, kernels: KernelModel, *, parameters: float, gemms: float = 0.0, launches: float = 1.0
) -> Block:
    """AdamW over `parameters` local parameters, behind the norm of their gradients where these are clipped.

    `gemms`: local weights that GEMMs of few bits read; they are cast anew behind it. `launches`: what a fused
    step costs the host.
    """
    precision, software = scenario.workload.precision, scenario.implementation.software
    switches = scenario.implementation.switches
    w = KernelWriter(kernels, dtype=precision.kernels, part=Part.OPTIMIZER).during(Phase.OPTIMIZER)
    in_bf16, is_flat = software.bf16_optimizer and precision.optimizer == "bf16", switches.optimizer == "flat"
    kind = "elementwise" if is_flat else "optimizer_bf16" if in_bf16 else "optimizer_fp32"
    size, has_master = BYTES_PER_ELEMENT, precision.master == "fp32"
    gradients, moments = size[precision.gradients], size[precision.optimizer]
    weights = size["fp32"] if has_master else size[precision.weights]
    tensors = _tensors(scenario)
    out: list[Operation] = _norm(w, scenario, parameters=parameters, tensors=tensors)
    cast_behind = has_master and (switches.weight_copy or not switches.updates_in_one)
    if switches.updates_in_one:
        per_parameter = gradients + 4 * moments + 2 * size[precision.weights]
        if has_master:
            per_parameter += 2 * size["fp32"] - size[precision.weights]  # the weights are then only written
        if cast_behind:
            per_parameter -= size[precision.weights]
        step = w.moved("adamw", kind, launches, bytes_=parameters * per_parameter)
        out.append(step if is_flat else _in_blocks(step, parameters, tensors))
    else:
        launches = forward("plain") * (tensors if switches.optimizer == "loop" else 1)
        steps = {
            "decay": 2 * weights,
            "first_moment": 2 * moments + gradients,
            "second_moment": 2 * moments,
            "square": 2 * moments + gradients,
            "root": 2 * moments,
            "correction": 2 * moments,
            "epsilon": 2 * moments,
            "update": 2 * weights + 2 * moments,
        }
        for name, bytes_each in steps.items():
            out.append(w.moved(f"adamw.{name}", "elementwise", launches, bytes_=parameters * bytes_each))
    if cast_behind:
        bytes_each = size["fp32"] + size[precision.weights]
        copies = tensors * forward("plain") if switches.gradient_norm == "loop" else 1.0
        out.append(w.moved("weights.cast", "cast", copies, bytes_=parameters * bytes_each))
    out += weight_casts(w, weights=gemms, are_narrow=precision.weights == "fp8")
    return Block("optimizer", tuple(out))


def _in_blocks(step: Operation, parameters: float, tensors: float) -> Operation:
    """A fused step that takes as long as the blocks that it is launched in, where its tensors are small."""
    assert step.seconds_MSR is not None
    return replace(step, seconds_MSR=np.maximum(step.seconds_MSR, adam_floor(parameters, tensors)))


def _tensors(scenario: Scenario) -> float:
    """Weights of a rank, about; experts that run one by one have two each."""
    of_layer = float(TENSORS_OF_LAYER)
    if scenario.implementation.switches.expert_gemms == "each":
        of_layer += 2 * scenario.model.experts / scenario.parallelism.expert
    return of_layer * scenario.model.layers / scenario.parallelism.pipeline


def _norm(w: KernelWriter, scenario: Scenario, *, parameters: float, tensors: float) -> list[Operation]:
    """The norm of the gradients; by torch's foreach also their scaling, which it does at any norm.

    In a loop each tensor's norm is read back, and its scaled copy copied over it.
    """
    way = scenario.implementation.switches.gradient_norm
    if scenario.workload.gradient_clipping is None or way == "free":
        return []
    size = parameters * BYTES_PER_ELEMENT[scenario.workload.precision.gradients]
    if way == "loop":
        return [
            w.moved("gradients.norm", "reduce", tensors * forward("reduce", "reduce"), bytes_=size),
            w.moved("gradients.scale", "elementwise", tensors * forward("mul", "plain"), bytes_=4 * size),
        ]
    read = w.moved("gradients.norm", "reduce", forward("reduce"), bytes_=size)
    scaled = w.moved("gradients.scale", "elementwise", forward("mul"), bytes_=2 * size)
    return [read, scaled] if way == "foreach" else [read]
