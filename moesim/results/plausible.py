"""What no result may break, whatever was simulated: checked on every run before anything is written.

Numbers are finite, parts of the step are not negative and add up to it, no GPU computes faster than its peak, and no
byte moves faster than its memory or its links. A result that breaks one of these is a mistake of this program.

Legend: C categories, W ranks of the world, P pipeline ranks, S routing samples.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moesim.errors import InternalError
from moesim.network import Fabric
from moesim.results.store import RunRecord
from moesim.strict_json import json_text

TOLERANCE = 1e-6  # relative, of sums of many seconds


class Bound(NamedTuple):
    """The least seconds that a step can take, and why."""

    seconds: float
    why: str


def check_plausible(record: RunRecord, fabric: Fabric) -> None:
    """Raises InternalError in one line for a result that cannot be."""
    json_text(record.result)
    step_s = record.result["step_time_s"]
    for name, values in record.arrays.items():
        if not np.isfinite(values).all():
            _refuse(record, f"{name} holds numbers that are not finite")
    if step_s <= 0:
        _refuse(record, f"the step takes {step_s:.4g} s")
    for section in ("attribution_s", "attribution_balanced_s"):
        least = min(record.result[section], key=record.result[section].__getitem__)
        if record.result[section][least] < 0:
            _refuse(record, f"{section}.{least} is {record.result[section][least]:.4g} s")
    parts_s = sum(record.result["attribution_s"].values())
    if abs(parts_s - step_s) > TOLERANCE * step_s:
        _refuse(record, f"the parts of the step add up to {parts_s:.6g} s, not to its {step_s:.6g} s")
    for bound in bounds(record, fabric):
        if step_s < bound.seconds * (1 - TOLERANCE):
            _refuse(record, f"a step of {step_s:.4g} s, but {bound.why} take {bound.seconds:.4g} s at least")


def bounds(record: RunRecord, fabric: Fabric) -> Iterator[Bound]:
    """What physics asks of a step: FLOPs over peak, bytes over bandwidth."""
    scenario, result = record.scenario, record.result
    cluster, mesh, gemm = scenario.cluster, scenario.parallelism, scenario.workload.precision.gemm
    gpu = max((pool.spec for pool in cluster.pools), key=lambda spec: spec.memory_bandwidth)
    speed_W = cluster.speeds.of_ranks(mesh.world_size, seed=scenario.seed)
    fastest = 1.0 if speed_W is None else max(1.0, float(speed_W.max()))
    # MFU = FLOPs / (ranks * peak * step), so FLOPs / (ranks * peak) is MFU times the step. Of kept rows and of causal
    # attention: dropped rows and the other half of the scores are not computed.
    compute_s = result["effective"]["mfu_causal"] * result["step_time_s"] / fastest
    yield Bound(compute_s, f"its FLOPs at the {gemm} peak of {gpu.name} (MFU {result['effective']['mfu_causal']:.0%})")
    held = record.arrays["held_bytes_P"].max() - scenario.memory.reserved
    # Weights, gradients and optimizer states are all touched once; what fits into the cache may be touched there.
    memory_s = float(held - gpu.l2_bytes) / (gpu.memory_bandwidth * fastest)
    yield Bound(memory_s, f"weights, gradients and optimizer states at the memory bandwidth of {gpu.name}")
    moved = result["communication"]["intra_node_bytes"] + result["communication"]["inter_node_bytes"]
    ports = {f"gpu{rank}" for rank in range(scenario.parallelism.world_size)}
    out = sum(
        float(bandwidth)
        for (source, _), bandwidth in zip(fabric.links, fabric.bandwidth_X, strict=True)
        if source in ports
    )
    if moved:
        yield Bound(moved / out, "dispatched and combined bytes over the links of the GPUs")


def _refuse(record: RunRecord, what: str) -> None:
    raise InternalError(f"{record.scenario.name}: {what}: that cannot be")
