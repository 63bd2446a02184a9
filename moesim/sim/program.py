"""The program of one optimizer step: blocks of operations per rank group, reductions and the optimizer, as data.

Legend: M micro-batches, S routing samples, R ranks of an expert group, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moesim.compute import KernelModel
from moesim.scenario import Scenario
from moesim.scenario.base import BYTES_PER_ELEMENT
from moesim.sim.executor import FREE_HOST, HostModel
from moesim.sim.loads import LayerLoads
from moesim.sim.operations import Block, Operation
from moesim.sim.reductions import Reduction
from moesim.sim.sizes import Step
from moesim.sim.software import SOFTWARE
from moesim.sim.writer import KernelWriter


@dataclass(frozen=True, kw_only=True)
class GroupProgram:
    """What one expert group executes: a list of (block, micro-batch, backward) in order."""

    ranks_R: NDArray[np.int64]
    schedule: tuple[tuple[Block, int, bool], ...]


@dataclass(frozen=True, kw_only=True)
class StepProgram:
    """One optimizer step of all groups.

    `reductions` follow the last micro-batch, then `optimizer` runs on every rank, then `gathers`.
    """

    groups: tuple[GroupProgram, ...]
    reductions: tuple[Reduction, ...]
    optimizer: Block
    gathers: tuple[Reduction, ...]
    host: HostModel
    slowdown: float
    samples: int

    def rows(self, group: GroupProgram) -> int:
        """Most spans that a group can emit: every operation, and a host stall before it unless the host is free."""
        operations = sum(len(block.operations) for block, _, _ in group.schedule) + len(self.optimizer.operations)
        per_operation = 1 if self.host == FREE_HOST else 2
        return per_operation * operations + len(self.reductions) + len(self.gathers)


def micro_batch_blocks(scenario: Scenario, kernels: KernelModel, loads_L: Sequence[LayerLoads]) -> tuple[Block, Block]:
    """The forward and the backward block of one group; `loads_L` holds its MoE layers in order."""
    model, workload = scenario.model, scenario.workload
    step = Step(
        model=model,
        batch=workload.micro_batch,
        sequence=workload.sequence_length,
        quantise=scenario.dispatch.dtype == "fp8",
        remote=scenario.parallelism.expert > 1,
        sigmoid=model.experts > 0 and scenario.router_shape().kind == "deepseek_v3",
    )
    software = SOFTWARE[scenario.implementation.kind]

    def writer(category: str, layer: int) -> KernelWriter:
        return KernelWriter(kernels, dtype=workload.precision.gemm, category=category, layer=layer)

    parts = [software.embedding_part(writer("embedding_head", -1), step)]
    for layer in range(model.layers):
        loads = loads_L[layer - model.dense_layers] if layer >= model.dense_layers else None
        parts.append(software.layer_part(writer("attention", layer), step, loads))
    parts.append(software.head_part(writer("embedding_head", -1), step))
    forward = tuple(operation for part in parts for operation in part[0])
    backward = tuple(operation for part in reversed(parts) for operation in part[1])
    return Block("forward", forward), Block("backward", backward)


def optimizer_block(scenario: Scenario, kernels: KernelModel, *, parameters: float) -> Block:
    """Fused AdamW over `parameters` local parameters: gradient read, weight, master copy and both states updated."""
    precision = scenario.workload.precision
    size = BYTES_PER_ELEMENT
    per_parameter = size[precision.gradients] + 4 * size[precision.optimizer] + 2 * size[precision.weights]
    if precision.master == "fp32":
        per_parameter += 2 * size["fp32"] - size[precision.weights]  # the weights are then only written
    kind = "optimizer_fp32" if precision.optimizer == "fp32" else "optimizer_bf16"
    writer = KernelWriter(kernels, dtype=precision.gemm, category="optimizer", layer=-1)
    operation: Operation = writer.moved("adamw", kind, bytes_=parameters * per_parameter)
    return Block("optimizer", (operation,))
