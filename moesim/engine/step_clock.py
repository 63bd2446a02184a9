"""The clock of a whole step: the power limit acts on the mean of all kernels, not on each of them alone.

Power is regulated over tens of milliseconds, in which many kernels run. The load of a rank is the FLOPs of its step
over its seconds at the clock of low loads; the busiest rank counts, and every kernel runs at the clock that this load
leaves (`moesim.kernels.power`: the same law as for a kernel that runs alone). So heavy GEMMs are faster in a step
with much lighter work than in a benchmark of their own.
"""

import math
from collections.abc import Sequence

import numpy as np

from moesim.engine.step import simulate_step
from moesim.kernels import KernelModel, MixedKernels
from moesim.network import Fabric
from moesim.program.build import build_program
from moesim.program.loads import RoutingSample
from moesim.results.spans import SpanTable, Stream
from moesim.scenario import Scenario
from moesim.scenario.failures import Speeds
from moesim.scenario.flops import TRAINING_PASSES, WIDE_PARTS, forward_flops_per_token
from moesim.scenario.schema import PipelineSchedule

FEW_LAYERS = 8


def step_kernels(
    scenario: Scenario, *, fabric: Fabric, kernels: KernelModel, samples: Sequence[RoutingSample]
) -> KernelModel:
    """`kernels` at the clock of the scenario's step, from a simulation of the first sample's `small_part`.

    Of several kinds of GPU each gets the clock of a small part whose ranks are all of its kind.
    """
    if isinstance(kernels, MixedKernels):
        alone = {kind: _only(scenario, kind) for kind in kernels.models}
        return MixedKernels(
            {
                kind: step_kernels(alone[kind], fabric=fabric, kernels=model, samples=samples)
                for kind, model in kernels.models.items()
            }
        )
    light = kernels.at_load(0.0)
    if light is kernels:
        return kernels  # a model without a power limit
    part = small_part(scenario)
    outcome = simulate_step(build_program(part, fabric=fabric, kernels=light, samples=samples[:1], merge=True))
    return kernels.at_load(unevenness(outcome.tables) * step_flops(part, kernels) / float(outcome.step_S.mean()))


def _only(scenario: Scenario, kind: int) -> Scenario:
    """The scenario with the GPUs of one pool in all pools."""
    gpu = scenario.cluster.pools[kind].gpu
    pools = tuple(pool.model_copy(update={"gpu": gpu}) for pool in scenario.cluster.pools)
    return scenario.model_copy(update={"cluster": scenario.cluster.model_copy(update={"pools": pools})})


def small_part(scenario: Scenario) -> Scenario:
    """One rank group without a pipeline, with few layers and no micro-batch twice: as heavy, and soon simulated."""
    mesh, model, workload = scenario.parallelism, scenario.model, scenario.workload
    shared = mesh.tensor * mesh.context
    data = math.lcm(mesh.expert * mesh.expert_tensor, shared) // shared
    dense = min(FEW_LAYERS if model.experts == 0 else 1, model.dense_layers)
    few = model.with_few_layers(dense=dense, moe=min(FEW_LAYERS, model.moe_layers))
    batches = scenario.num_drawn_micro_batches
    alone: dict[str, object] = {"data": data, "pipeline": 1, "stages": None, "schedule": PipelineSchedule()}
    alone |= {"across_pools": None, "batch_share": "even"}
    return scenario.model_copy(
        update={
            "parallelism": mesh.model_copy(update=alone),
            "cluster": scenario.cluster.model_copy(update={"speeds": Speeds(), "slowdowns": (), "jitter": False}),
            "model": few.model_copy(update={"mtp_layers": 0}),
            "workload": workload.model_copy(update={"global_batch": batches * data * workload.micro_batch}),
        }
    )


def unevenness(tables: Sequence[SpanTable]) -> float:
    """Compute seconds of the busiest rank over the mean: the step waits for it, so its clock is the one that counts."""
    busy = []
    for table in tables:
        rows_N = table.rows(Stream.COMPUTE)
        busy.append((table.finish_NSR[rows_N] - table.start_NSR[rows_N]).sum(axis=(0, 1)))
    busy_R = np.concatenate(busy)
    return float(busy_R.max() / busy_R.mean())


def step_flops(scenario: Scenario, kernels: KernelModel) -> float:
    """Model FLOPs of one rank and step, each counted by the power that one of its format takes."""
    workload = scenario.workload
    precision = workload.precision
    narrow, wide = (kernels.power_share(dtype) for dtype in (precision.kernels, precision.wide))
    ahead = forward_flops_per_token(scenario.model, sequence_length=workload.sequence_length, causal=True)
    per_token = sum(flops * (wide if part in WIDE_PARTS else narrow) for part, flops in ahead.items())
    return TRAINING_PASSES * per_token * scenario.tokens_per_step / scenario.parallelism.world_size
