"""The optimizer by the switches: Adam over the parameters that a rank updates, and the norm of their gradients.

Of p parameters with gradients of g bytes, moments of o, weights of w, and perhaps a master copy of 4:
    fused     one kernel: g + 4 o + 2 w; with a master copy g + 4 o + 8 and the weights written, w, or, where they are
              cast behind it, 4 + w by a kernel of its own; tensors of few numbers take a launch's time
    foreach   torch's eight kernels over lists of tensors: 4 w + 2 g + 14 o, of the master copy where there is one
    loop      the same eight over every tensor
Behind it the weights of products in fp8 or fp4 are cast (`moesim.program.gemms`).
"""

from dataclasses import replace

import numpy as np

from moesim.kernels import KernelModel
from moesim.kernels.unprofiled import adam_floor
from moesim.program.gemms import weight_casts
from moesim.program.host import forward
from moesim.program.operations import Block, Operation
from moesim.program.writer import KernelWriter
from moesim.results.spans import Part, Phase
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT

TENSORS_OF_LAYER = 12  # of weights, about: what a loop over them launches


def optimizer_block(
    scenario: Scenario, kernels: KernelModel, *, parameters: float, products: float = 0.0, launches: float = 1.0
) -> Block:
    """AdamW over `parameters` local parameters, behind the norm of their gradients where these are clipped.

    `products`: local weights that products of few bits read; they are cast anew behind it. `launches`: what a fused
    step costs the host.
    """
    precision, software = scenario.workload.precision, scenario.implementation.software
    switches = scenario.implementation.switches
    w = KernelWriter(kernels, dtype=precision.kernels, part=Part.OPTIMIZER).during(Phase.OPTIMIZER)
    in_bf16 = software.bf16_optimizer and precision.optimizer == "bf16"
    kind = "optimizer_bf16" if in_bf16 else "optimizer_fp32"
    size, has_master = BYTES_PER_ELEMENT, precision.master == "fp32"
    gradients, moments = size[precision.gradients], size[precision.optimizer]
    weights = size["fp32"] if has_master else size[precision.weights]
    tensors = _tensors(scenario)
    out: list[Operation] = _norm(w, scenario, parameters=parameters, tensors=tensors)
    cast_behind = has_master and (switches.weight_copy or switches.optimizer != "fused")
    if switches.optimizer == "fused":
        per_parameter = gradients + 4 * moments + 2 * size[precision.weights]
        if has_master:
            per_parameter += 2 * size["fp32"] - size[precision.weights]  # the weights are then only written
        if cast_behind:
            per_parameter -= size[precision.weights]
        out.append(_in_blocks(w.moved("adamw", kind, launches, bytes_=parameters * per_parameter), parameters, tensors))
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
    out += weight_casts(w, weights=products, are_narrow=precision.weights == "fp8")
    return Block("optimizer", tuple(out))


def _in_blocks(step: Operation, parameters: float, tensors: float) -> Operation:
    """A fused step that takes as long as the blocks that it is launched in, where its tensors are small."""
    assert step.seconds_MSR is not None
    return replace(step, seconds_MSR=np.maximum(step.seconds_MSR, adam_floor(parameters, tensors)))


def _tensors(scenario: Scenario) -> float:
    """Weights of a rank, about; experts that run one by one have two each."""
    of_layer = float(TENSORS_OF_LAYER)
    if scenario.implementation.switches.expert_products == "each":
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
